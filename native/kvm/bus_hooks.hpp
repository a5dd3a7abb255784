// What the kernel serves of the buses without an exit to us: doorbells become ioeventfds, posted
// writes are collected in the coalesced ring and delivered before anything else is.
//
// The ring is one per VM and in order, but the kernel tells nobody that it put something there. A
// vCPU that has left KVM_RUN, for whatever reason, drains it first; so a device sees the guest's
// accesses in the guest's order, and nothing is left when the vCPUs stand still. A guest that does
// not exit again leaves its last writes there for ever, which only some devices can bear
// (PostedRange::max_delay). Ranges of the others are given to the kernel only while the guest is
// busy with them (several writes within kWindow exits), and a timer drains the ring meanwhile; when
// it has found nothing kIdlePolls times, their writes become exits again, and an idle machine has
// no timer at all.
//
// Whatever the kernel refuses is served by exits, as on an engine without any of this.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "base/fd.hpp"
#include "bus/bus.hpp"
#include "bus/clock.hpp"

namespace polyvisor::kvm {

class Vm;

class BusHooks {
  public:
    /// Exits between two looks at who writes much, and how many of them make a range busy.
    static constexpr u32 kWindow = 32, kBusy = 8;
    /// Fruitless polls after which a range is idle.
    static constexpr u32 kIdlePolls = 20;

    /// Observes both buses until it is destroyed.
    explicit BusHooks(Vm& vm);
    ~BusHooks();
    BusHooks(const BusHooks&) = delete;
    BusHooks& operator=(const BusHooks&) = delete;

    /// The first vCPU's kvm_run, which holds the ring of coalesced writes; nullptr: gone again.
    /// While no vCPU runs.
    void set_ring(void* kvm_run);
    /// Delivers what was collected, in order. By every vCPU whenever KVM_RUN has returned, before
    /// anything else is done about its exit.
    void drain() {
        if (zones_known_.load(std::memory_order_relaxed)) drain_and_adapt();
    }

    /// What the kernel serves now.
    struct Counts {
        std::size_t doorbells = 0;      ///< ioeventfds
        std::size_t posted_ranges = 0;  ///< coalesced
        u64 delivered = 0;              ///< writes that came through the ring, ever
        u64 refused = 0;                ///< ranges that the kernel did not take, ever
    };
    Counts counts() const;

  private:
    struct Bell {
        bool port;
        u64 range;  // start of the bus's range it is in
        u64 address;
        u32 size;
        bool matches;
        u64 value;
        OwnedFd fd;  // our duplicate: removing it works even if the device has closed its own
    };
    struct Zone {
        bool port;
        u64 range;
        u64 address;
        u32 size;
        u64 max_delay;
        const Device* device;
        bool registered = false;
        bool refused = false;
        u64 seen_writes = 0;
        u32 idle = 0;
    };

    void changed(bool port, const Bus::Range& range, bool attached);
    void add_bell(bool port, const Bus::Range& range, const Doorbell& bell);
    bool assign(const Bell& bell, bool on);
    void set_registered(Zone& zone, bool on);
    void drain_and_adapt();
    void drain_ring();
    void adapt();
    void poll();
    void note(bool port, u64 address, const char* what, int error);

    Vm& vm_;
    bool any_length_;
    u64 ring_page_;  // page of kvm_run's mapping where the ring is; 0: no coalescing
    bool ports_coalesce_;
    std::atomic<bool> zones_known_{false};  // there was a zone, ever
    std::atomic<u8*> ring_{nullptr};
    std::atomic<u32> exits_{0};  // only roughly: increments of two vCPUs may become one
    std::atomic<u64> delivered_{0};
    std::mutex mutex_;  // one drainer at a time; before a device's

    mutable std::mutex ranges_mutex_;  // what follows; inside a bus's, before the clock's
    std::vector<Bell> bells_;
    std::vector<Zone> zones_;
    u64 refused_ = 0;
    std::unique_ptr<Timer> timer_;  // while there is a ring
};

}  // namespace polyvisor::kvm
