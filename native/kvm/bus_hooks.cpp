#include "kvm/bus_hooks.hpp"

#include <fcntl.h>
#include "kvm/abi.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "kvm/ioctl.hpp"
#include "kvm/vm.hpp"

namespace polyvisor::kvm {

namespace {

constexpr u64 kPage = 4096;

// struct kvm_coalesced_mmio_ring: two indices and entries up to the end of the page. The kernel's
// header declares the array in a way that C++ lays out differently.
constexpr std::size_t kRingHeader = 8;
constexpr u32 kRingEntries = (kPage - kRingHeader) / sizeof(kvm_coalesced_mmio);

struct Ring {
    explicit Ring(u8* page)
        : first(reinterpret_cast<u32*>(page)[0]),
          last(reinterpret_cast<u32*>(page)[1]),
          entries(reinterpret_cast<const kvm_coalesced_mmio*>(page + kRingHeader)) {}
    std::atomic_ref<u32> first;  // ours: the oldest entry not yet delivered
    std::atomic_ref<u32> last;   // the kernel's: where it puts the next
    const kvm_coalesced_mmio* entries;
};

bool fits(u64 value, u32 size) {
    return size >= 8 || value >> (8 * size) == 0;
}

}  // namespace

BusHooks::BusHooks(Vm& vm)
    : vm_(vm),
      any_length_(vm.check(KVM_CAP_IOEVENTFD_ANY_LENGTH) > 0),
      ring_page_(static_cast<u64>(std::max(vm.check(KVM_CAP_COALESCED_MMIO), 0))),
      ports_coalesce_(vm.check(KVM_CAP_COALESCED_PIO) > 0) {
    const EngineConfig& config = vm_.config();
    config.pio.set_observer(
        [this](const Bus::Range& range, bool attached) { changed(true, range, attached); });
    config.mmio.set_observer(
        [this](const Bus::Range& range, bool attached) { changed(false, range, attached); });
}

BusHooks::~BusHooks() {
    // What the kernel was given goes with the VM.
    timer_.reset();
    vm_.config().pio.set_observer({});
    vm_.config().mmio.set_observer({});
}

void BusHooks::set_ring(void* kvm_run) {
    if (ring_page_ == 0) return;
    if (kvm_run == nullptr) {
        timer_.reset();  // without the lock: its callback takes it
        {
            std::lock_guard lock(ranges_mutex_);
            for (Zone& zone : zones_) set_registered(zone, false);
        }
        drain_ring();
        std::lock_guard lock(mutex_);
        ring_.store(nullptr, std::memory_order_release);
        return;
    }
    timer_ = std::make_unique<Timer>(vm_.config().clock, [this] { poll(); });
    std::lock_guard lock(ranges_mutex_);
    ring_.store(static_cast<u8*>(kvm_run) + ring_page_ * kPage, std::memory_order_release);
    for (Zone& zone : zones_) {
        if (zone.max_delay == 0) set_registered(zone, true);
    }
}

BusHooks::Counts BusHooks::counts() const {
    std::lock_guard lock(ranges_mutex_);
    Counts counts;
    counts.doorbells = bells_.size();
    counts.posted_ranges = static_cast<std::size_t>(std::count_if(
        zones_.begin(), zones_.end(), [](const Zone& zone) { return zone.registered; }));
    counts.delivered = delivered_.load(std::memory_order_relaxed);
    counts.refused = refused_;
    return counts;
}

void BusHooks::changed(bool port, const Bus::Range& range, bool attached) {
    std::lock_guard lock(ranges_mutex_);
    if (!attached) {
        std::erase_if(bells_, [&](const Bell& bell) {
            if (bell.port != port || bell.range != range.start) return false;
            assign(bell, false);
            return true;
        });
        std::erase_if(zones_, [&](Zone& zone) {
            if (zone.port != port || zone.range != range.start) return false;
            set_registered(zone, false);
            return true;
        });
        return;  // what the ring still has is delivered with the next exit
    }
    for (const Doorbell& bell : range.device->doorbells()) add_bell(port, range, bell);
    for (const PostedRange& posted : range.device->posted()) {
        // What of it is inside the range: [base, base + size) are the offsets it shows.
        u64 from = std::max(posted.offset, range.base);
        u64 to = std::min(posted.offset + posted.size, range.base + range.size);
        if (from >= to || to - from > ~u32{0}) continue;
        Zone zone{port,
                  range.start,
                  range.start + (from - range.base),
                  static_cast<u32>(to - from),
                  posted.max_delay,
                  range.device.get()};
        zone.seen_writes = range.device->writes();
        zones_.push_back(zone);
        zones_known_.store(true, std::memory_order_relaxed);
        if (zone.max_delay == 0 && ring_.load(std::memory_order_relaxed) != nullptr) {
            set_registered(zones_.back(), true);
        }
    }
}

void BusHooks::add_bell(bool port, const Bus::Range& range, const Doorbell& bell) {
    if (bell.offset < range.base || bell.offset - range.base >= range.size) return;
    u64 room = range.size - (bell.offset - range.base);
    u64 address = range.start + (bell.offset - range.base);
    // KVM compares values of one size at a time, so "any size" is several bells then.
    std::vector<u32> sizes{bell.size};
    if (bell.size == 0 && (bell.matches || !any_length_)) sizes = {1, 2, 4, 8};
    for (u32 size : sizes) {
        if (size > room || (port && size > 4) || (bell.matches && !fits(bell.value, size)))
            continue;
        int copy = ::fcntl(bell.event_fd, F_DUPFD_CLOEXEC, 0);
        if (copy < 0) {
            note(port, address, "a doorbell's event file descriptor", errno);
            continue;
        }
        Bell made{port, range.start, address, size, bell.matches, bell.value, OwnedFd(copy)};
        if (assign(made, true)) bells_.push_back(std::move(made));
    }
}

bool BusHooks::assign(const Bell& bell, bool on) {
    kvm_ioeventfd request{};
    request.addr = bell.address;
    request.len = bell.size;
    request.fd = bell.fd.get();
    request.datamatch = bell.matches ? bell.value : 0;
    request.flags = (bell.port ? u32{KVM_IOEVENTFD_FLAG_PIO} : 0) |
                    (bell.matches ? u32{KVM_IOEVENTFD_FLAG_DATAMATCH} : 0) |
                    (on ? 0 : u32{KVM_IOEVENTFD_FLAG_DEASSIGN});
    int result = try_ioctl(vm_.fd(), KVM_IOEVENTFD, &request);
    if (result < 0) note(bell.port, bell.address, "an ioeventfd", -result);
    return result >= 0;
}

// ranges_mutex_ is held.
void BusHooks::set_registered(Zone& zone, bool on) {
    if (zone.registered == on || zone.refused || (zone.port && !ports_coalesce_)) return;
    kvm_coalesced_mmio_zone request{};
    request.addr = zone.address;
    request.size = zone.size;
    request.pio = zone.port ? 1 : 0;
    int result = try_ioctl(
        vm_.fd(), on ? KVM_REGISTER_COALESCED_MMIO : KVM_UNREGISTER_COALESCED_MMIO, &request);
    if (result < 0) {
        note(zone.port, zone.address, "coalesced writes", -result);
        zone.refused = true;
        return;
    }
    zone.registered = on;
}

void BusHooks::note(bool port, u64 address, const char* what, int error) {
    ++refused_;
    if (vm_.config().log == nullptr) return;
    char where[32];
    std::snprintf(where, sizeof where, "0x%llx", static_cast<unsigned long long>(address));
    vm_.config().log->note("kvm", std::string("the kernel does not take ") + what + " at " +
                                      (port ? "port " : "address ") + where + " (" +
                                      std::strerror(error) + "): served by exits");
}

void BusHooks::drain_and_adapt() {
    drain_ring();
    u32 exits = exits_.load(std::memory_order_relaxed) + 1;
    exits_.store(exits, std::memory_order_relaxed);
    if (PV_UNLIKELY(exits % kWindow == 0)) adapt();
}

void BusHooks::drain_ring() {
    u8* page = ring_.load(std::memory_order_acquire);
    if (page == nullptr) return;
    {
        // An entry leaves the ring after it was delivered, so an empty ring means that everything
        // was, also by another thread.
        Ring ring(page);
        if (ring.first.load(std::memory_order_acquire) ==
            ring.last.load(std::memory_order_acquire)) {
            return;
        }
    }
    std::lock_guard lock(mutex_);
    page = ring_.load(std::memory_order_acquire);
    if (page == nullptr) return;
    Ring ring(page);
    // Only what is there now: vCPUs that go on writing must not keep this one here.
    u32 end = ring.last.load(std::memory_order_acquire) % kRingEntries;
    u64 delivered = 0;
    for (u32 at = ring.first.load(std::memory_order_relaxed) % kRingEntries; at != end;) {
        const kvm_coalesced_mmio& entry = ring.entries[at];
        std::span<const u8> data(entry.data, std::min<std::size_t>(entry.len, sizeof entry.data));
        Bus& bus = entry.pio != 0 ? vm_.config().pio : vm_.config().mmio;
        bus.write(entry.phys_addr, data);
        at = (at + 1) % kRingEntries;
        ring.first.store(at, std::memory_order_release);
        ++delivered;
    }
    delivered_.fetch_add(delivered, std::memory_order_relaxed);
}

// Gives the kernel the ranges that most of the last exits were about.
void BusHooks::adapt() {
    std::lock_guard lock(ranges_mutex_);
    if (ring_.load(std::memory_order_relaxed) == nullptr) return;
    u64 delay = 0;
    for (Zone& zone : zones_) {
        if (zone.max_delay == 0 || zone.registered) continue;
        u64 writes = zone.device->writes();
        u64 recent = writes - zone.seen_writes;
        zone.seen_writes = writes;
        if (recent < kBusy) continue;
        zone.idle = 0;
        set_registered(zone, true);
        if (zone.registered) delay = delay == 0 ? zone.max_delay : std::min(delay, zone.max_delay);
    }
    if (delay != 0) timer_->arm(std::min(timer_->deadline(), vm_.config().clock.now() + delay));
}

void BusHooks::poll() {
    drain_ring();
    std::lock_guard lock(ranges_mutex_);
    u64 delay = 0;
    for (Zone& zone : zones_) {
        if (zone.max_delay == 0 || !zone.registered) continue;
        u64 writes = zone.device->writes();
        zone.idle = writes == zone.seen_writes ? zone.idle + 1 : 0;
        zone.seen_writes = writes;
        if (zone.idle >= kIdlePolls) set_registered(zone, false);
        if (zone.registered) delay = delay == 0 ? zone.max_delay : std::min(delay, zone.max_delay);
    }
    if (delay != 0) timer_->arm(vm_.config().clock.now() + delay);
}

}  // namespace polyvisor::kvm
