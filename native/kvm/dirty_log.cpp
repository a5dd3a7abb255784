#include "kvm/dirty_log.hpp"

#include <algorithm>
#include <bit>

#include "base/error.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/vcpu.hpp"
#include "kvm/vm.hpp"

namespace polyvisor::kvm {

namespace {

// The kernel holds a lock that every page fault of the guest needs while it clears a range.
constexpr u64 kClearAtOnce = (u64{1} << 30) >> kPageShift;
constexpr u32 kSmallestRing = kPageSize / sizeof(kvm_dirty_gfn);
constexpr u32 kIdleLimit = 1000;

bool is_dirty(const kvm_dirty_gfn& entry) {
    return __atomic_load_n(&entry.flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY;
}

}  // namespace

KvmDirtyLog::KvmDirtyLog(Vm& vm) : vm_(vm) {
    if (vm_.config().dirty_ring != 0) {
        enable_ring();
        return;
    }
    if (!(vm_.check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)) {
        return;
    }
    kvm_enable_cap request{};
    request.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    request.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    call_ioctl(vm_.fd(), KVM_ENABLE_CAP, &request);
    manual_clear_ = true;
}

KvmDirtyLog::~KvmDirtyLog() = default;

void KvmDirtyLog::enable_ring() {
    u32 entries = vm_.config().dirty_ring;
    u32 most = static_cast<u32>(vm_.check(KVM_CAP_DIRTY_LOG_RING)) / sizeof(kvm_dirty_gfn);
    if (most == 0) {
        throw ConfigError("dirty_ring",
                          "this host's KVM has no dirty rings; leave dirty_ring out, and the dirty "
                          "log keeps bitmaps");
    }
    kvm_enable_cap request{};
    request.cap = KVM_CAP_DIRTY_LOG_RING;
    request.args[0] = u64{entries} * sizeof(kvm_dirty_gfn);
    bool possible = std::has_single_bit(entries) && entries >= kSmallestRing && entries <= most;
    int result = possible ? try_ioctl(vm_.fd(), KVM_ENABLE_CAP, &request) : -EINVAL;
    if (result == -EINVAL) {
        throw ConfigError("dirty_ring", "a dirty ring cannot have " + std::to_string(entries) +
                                            " entries; give a power of two from " +
                                            std::to_string(kSmallestRing) +
                                            " (1024 where the processor logs pages itself) to " +
                                            std::to_string(most));
    }
    if (result < 0) throw_ioctl(KVM_ENABLE_CAP, -result);
    ring_entries_ = entries;
    rings_.resize(vm_.config().cpus);
}

bool KvmDirtyLog::active() const {
    std::lock_guard lock(mutex_);
    return active_;
}

void KvmDirtyLog::start() {
    vm_.check_process();
    std::lock_guard lock(mutex_);
    vm_.memslots().sync();
    vm_.memslots().log_dirty(true);
    active_ = true;
    // What was written before: the kernel's bitmaps are new, the rings and our own bits are not.
    if (ring_entries_ != 0) harvest_all();
    for (const auto& region : vm_.config().memory.regions()) {
        scratch_.resize(region->bitmap_words());
        region->take_dirty(scratch_);
    }
}

void KvmDirtyLog::stop() {
    std::lock_guard lock(mutex_);
    if (!active_) return;
    active_ = false;
    vm_.memslots().log_dirty(false);
    if (ring_entries_ != 0) harvest_all();
}

void KvmDirtyLog::fetch(const GuestMemory::Region& region, std::span<u64> bitmap) {
    vm_.check_process();
    std::lock_guard lock(mutex_);
    if (!active_) throw StateMismatch("the dirty log is not active; start() it first");
    if (ring_entries_ != 0) {
        harvest_all();
    } else if (!region.read_only) {
        fetch_bitmap(region, bitmap);
    }
    region.take_dirty(bitmap);
}

// --- Bitmaps -------------------------------------------------------------------------------------

void KvmDirtyLog::fetch_bitmap(const GuestMemory::Region& region, std::span<u64> bitmap) {
    const auto slots = vm_.memslots().slots();
    auto slot = std::find_if(slots.begin(), slots.end(),
                             [&](const auto& candidate) { return candidate.region == &region; });
    if (slot == slots.end()) return;  // no vCPU has seen it yet
    scratch_.assign(region.bitmap_words(), 0);
    kvm_dirty_log request{};
    request.slot = slot->id;
    request.dirty_bitmap = scratch_.data();
    call_ioctl(vm_.fd(), KVM_GET_DIRTY_LOG, &request);
    if (manual_clear_) clear(slot->id, scratch_, region.pages());
    for (std::size_t n = 0; n < scratch_.size(); ++n) bitmap[n] |= scratch_[n];
}

void KvmDirtyLog::clear(u32 slot, std::span<u64> pages, u64 count) const {
    for (u64 first = 0; first < count; first += kClearAtOnce) {
        u64 here = std::min(count - first, kClearAtOnce);
        auto words = pages.subspan(first / 64, (here + 63) / 64);
        if (std::all_of(words.begin(), words.end(), [](u64 word) { return word == 0; })) continue;
        kvm_clear_dirty_log request{};
        request.slot = slot;
        request.first_page = first;
        request.num_pages = static_cast<u32>(here);
        request.dirty_bitmap = words.data();
        call_ioctl(vm_.fd(), KVM_CLEAR_DIRTY_LOG, &request);
    }
}

// --- Rings ---------------------------------------------------------------------------------------

// False: there is no such vCPU yet, and no ring. The mapping stays when the vCPU ends, so that what
// it wrote last is still found.
bool KvmDirtyLog::open_ring(u32 vcpu) {
    Ring& ring = rings_[vcpu];
    if (ring.mapping.data() != nullptr) return true;
    KvmVcpu* owner = vm_.vcpu(vcpu);
    if (owner == nullptr) return false;
    ring.mapping = Mapping(owner->fd(), u64{KVM_DIRTY_LOG_PAGE_OFFSET} * kPageSize,
                           u64{ring_entries_} * sizeof(kvm_dirty_gfn));
    return true;
}

kvm_dirty_gfn& KvmDirtyLog::entry(const Ring& ring, u32 index) const {
    return reinterpret_cast<kvm_dirty_gfn*>(ring.mapping.data())[index & (ring_entries_ - 1)];
}

// An entry is the kernel's until it has F_DIRTY, and again from when it has F_RESET. Returns how
// many there were.
u32 KvmDirtyLog::harvest(u32 vcpu) {
    if (!open_ring(vcpu)) return 0;
    Ring& ring = rings_[vcpu];
    if (PV_UNLIKELY(ring.overrun)) find_next(ring);
    const auto slots = vm_.memslots().slots();
    u32 first = ring.next;
    for (;; ++ring.next) {
        kvm_dirty_gfn& found = entry(ring, ring.next);
        if (!is_dirty(found)) break;
        u32 id = found.slot & 0xffff;  // above it, the address space: SMM's is not used
        if (id < slots.size() && found.offset < slots[id].region->pages()) {
            const auto& region = *slots[id].region;
            region.mark_dirty(region.start.value + (found.offset << kPageShift), 1);
        }
        __atomic_store_n(&found.flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
    if (ring.next - first >= ring_entries_) ring.overrun = true;
    return ring.next - first;
}

// After an overrun the kernel goes on some entries further than where we are, and will not pass
// those in between by itself: they were reset once, as the ones that were overwritten.
void KvmDirtyLog::find_next(Ring& ring) const {
    u32 ahead = 0;
    while (ahead < ring_entries_ && !is_dirty(entry(ring, ring.next + ahead))) ++ahead;
    if (ahead == ring_entries_) return;  // it has not gone on yet
    while (ahead > 0 && is_dirty(entry(ring, ring.next + ahead - 1))) --ahead;  // came meanwhile
    for (; ahead > 0; --ahead, ++ring.next) {
        __atomic_store_n(&entry(ring, ring.next).flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    }
    ring.overrun = false;
}

void KvmDirtyLog::finish_harvest(bool overrun) {
    call_ioctl(vm_.fd(), KVM_RESET_DIRTY_RINGS);
    if (PV_LIKELY(!overrun)) return;
    ++overruns_;
    if (!active_) return;
    vm_.memslots().log_dirty(true);
    for (const auto& slot : vm_.memslots().slots()) {
        if (!slot.region->read_only) {
            slot.region->mark_dirty(slot.region->start.value, slot.region->size);
        }
    }
}

void KvmDirtyLog::harvest_all() {
    bool overrun = false;
    for (u32 vcpu = 0; vcpu < rings_.size(); ++vcpu) overrun |= harvest(vcpu) >= ring_entries_;
    finish_harvest(overrun);
}

void KvmDirtyLog::collect(u32 vcpu) {
    std::lock_guard lock(mutex_);
    if (vcpu >= rings_.size()) return;
    u32 found = harvest(vcpu);
    finish_harvest(found >= ring_entries_);
    // Another thread's fetch() may have been quicker, once.
    u32& idle = rings_[vcpu].idle;
    idle = found == 0 ? idle + 1 : 0;
    if (idle < kIdleLimit) return;
    throw HostError(EIO, {},
                    "the dirty ring of CPU " + std::to_string(vcpu) +
                        " is full, but has nothing to collect: this host's KVM has overrun it; "
                        "use the dirty log without dirty_ring");
}

u64 KvmDirtyLog::overruns() const {
    std::lock_guard lock(mutex_);
    return overruns_;
}

}  // namespace polyvisor::kvm
