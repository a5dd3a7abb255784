#include "kvm/guest_clock.hpp"

#include <x86intrin.h>

#include "kvm/ioctl.hpp"

namespace polyvisor::kvm {

namespace {

constexpr u32 kTscMsr = 0x10;

}  // namespace

s64 GuestClock::ticks(s64 nanoseconds) const {
    __extension__ using wide = __int128;
    return static_cast<s64>(static_cast<wide>(nanoseconds) * static_cast<s64>(clock_.tsc_khz()) /
                            1'000'000);
}

u64 GuestClock::scaled_host_tsc(int vcpu_fd) const {
    if (!scaled_) return __rdtsc();
    // Only KVM knows its scaling to the last bit: what the guest reads, less its offset.
    WithEntries<kvm_msrs> msrs(1);
    msrs->nmsrs = 1;
    msrs->entries[0].index = kTscMsr;
    call_ioctl(vcpu_fd, KVM_GET_MSRS, msrs.head());
    s64 offset = 0;
    kvm_device_attr attribute{};
    attribute.group = KVM_VCPU_TSC_CTRL;
    attribute.attr = KVM_VCPU_TSC_OFFSET;
    attribute.addr = reinterpret_cast<u64>(&offset);
    call_ioctl(vcpu_fd, KVM_GET_DEVICE_ATTR, &attribute);
    return msrs->entries[0].data - static_cast<u64>(offset);
}

void GuestClock::set_host_khz(u64 khz) {
    scaled_ = khz != clock_.tsc_khz();
}

u64 GuestClock::sync(int vcpu_fd) {
    u64 now_offset = clock_.host_offset();
    u64 generation = generation_.load(std::memory_order_acquire);
    if (generation != 0 && seen_offset_.load(std::memory_order_relaxed) == now_offset) {
        return generation;
    }
    std::lock_guard lock(mutex_);
    now_offset = clock_.host_offset();
    if (generation_ != 0 && seen_offset_ == now_offset) return generation_;
    if (generation_ == 0) {
        base_ = static_cast<s64>(clock_.tsc() - scaled_host_tsc(vcpu_fd));
    } else {
        base_ = base_ - ticks(static_cast<s64>(now_offset - seen_offset_));
    }
    kvm_clock_data data{};
    data.clock = clock_.now();
    call_ioctl(vm_fd_, KVM_SET_CLOCK, &data);
    seen_offset_ = now_offset;
    generation_.fetch_add(1, std::memory_order_release);
    return generation_;
}

s64 GuestClock::drift(int vcpu_fd) const {
    return static_cast<s64>(scaled_host_tsc(vcpu_fd) + static_cast<u64>(base_.load()) -
                            clock_.tsc());
}

}  // namespace polyvisor::kvm
