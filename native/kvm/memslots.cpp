#include "kvm/memslots.hpp"

#include <algorithm>
#include <cstdio>
#include <string>

#include "base/error.hpp"
#include "base/mapping.hpp"
#include "kvm/ioctl.hpp"

namespace polyvisor::kvm {

namespace {

// Where no machine and no process has anything, below any CPU's limit of physical addresses.
constexpr u64 kNowhere = (u64{1} << 36) - kPageSize;

}  // namespace

// A page that no vCPU can write needs no log; the host's own writes are noted by GuestMemory.
u32 Memslots::flags_of(const GuestMemory::Region& region) const {
    if (region.read_only) return KVM_MEM_READONLY;
    return log_dirty_ ? KVM_MEM_LOG_DIRTY_PAGES : 0;
}

void Memslots::set(Slot& slot, u32 flags) const {
    kvm_userspace_memory_region kernel{};
    kernel.slot = slot.id;
    kernel.flags = flags;
    kernel.guest_phys_addr = slot.region->start.value;
    kernel.memory_size = slot.region->size;
    kernel.userspace_addr = reinterpret_cast<u64>(slot.region->mapping.data());
    int result = try_ioctl(vm_fd_, KVM_SET_USER_MEMORY_REGION, &kernel);
    if (result < 0) {
        char where[96];
        std::snprintf(where, sizeof where, " at 0x%llx+0x%llx, slot %u, flags 0x%x",
                      static_cast<unsigned long long>(kernel.guest_phys_addr),
                      static_cast<unsigned long long>(kernel.memory_size), slot.id, flags);
        errno = -result;
        throw_errno("KVM_SET_USER_MEMORY_REGION failed for memory region '" + slot.region->name +
                    "'" + where);
    }
    slot.flags = flags;
}

void Memslots::sync() {
    const auto& regions = memory_.regions();
    const std::size_t count = memory_.count();
    if (synced_.load(std::memory_order_acquire) == count) return;
    std::lock_guard lock(mutex_);
    if (count > limit_) {
        throw ConfigError("memory", "guest memory has " + std::to_string(count) +
                                        " regions, but this host's KVM has only " +
                                        std::to_string(limit_) +
                                        " memory slots; join adjacent regions");
    }
    for (std::size_t n = 0; n < count; ++n) {
        const GuestMemory::Region* region = regions[n].get();
        bool known = std::any_of(slots_.begin(), slots_.end(),
                                 [&](const Slot& slot) { return slot.region == region; });
        if (known) continue;
        Slot slot{static_cast<u32>(slots_.size()), region, 0};
        set(slot, flags_of(*region));
        slots_.push_back(slot);
    }
    synced_.store(slots_.size(), std::memory_order_release);
}

void Memslots::switch_log(bool on) {
    log_dirty_ = on;
    for (Slot& slot : slots_) {
        u32 flags = flags_of(*slot.region);
        if (slot.flags != flags) set(slot, flags);
    }
}

void Memslots::log_dirty(bool on) {
    std::lock_guard lock(mutex_);
    try {
        if (on && log_dirty_) switch_log(false);  // the kernel forgets what it noted
        switch_log(on);
    } catch (const HostError&) {
        log_dirty_ = false;
        for (Slot& slot : slots_) {
            try {
                if (slot.flags & KVM_MEM_LOG_DIRTY_PAGES) set(slot, flags_of(*slot.region));
            } catch (const HostError&) {
                // The first failure is the one to tell.
            }
        }
        throw;
    }
}

void Memslots::forget_tables() const {
    std::lock_guard lock(mutex_);
    kvm_userspace_memory_region slot{};
    slot.slot = limit_ - 1;
    slot.guest_phys_addr = kNowhere;
    slot.memory_size = kPageSize;
    Mapping page(-1, 0, kPageSize);
    slot.userspace_addr = reinterpret_cast<u64>(page.data());
    call_ioctl(vm_fd_, KVM_SET_USER_MEMORY_REGION, &slot);
    slot.memory_size = 0;
    call_ioctl(vm_fd_, KVM_SET_USER_MEMORY_REGION, &slot);
}

std::vector<Memslots::Slot> Memslots::slots() const {
    std::lock_guard lock(mutex_);
    return slots_;
}

}  // namespace polyvisor::kvm
