// What the kernel serves of the buses without an exit to us: doorbells become ioeventfds, posted
// writes are collected in the coalesced ring and delivered before anything else is.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "base/mapping.hpp"
#include "bus/bus.hpp"

namespace polyvisor::kvm {

class Vm;

class BusHooks {
  public:
    /// Observes both buses until it is destroyed.
    explicit BusHooks(Vm& vm);
    ~BusHooks();

    /// The first vCPU's kvm_run, which holds the ring of coalesced writes; nullptr: gone again.
    void set_ring(void* kvm_run);
    /// Delivers what was collected, in order. Before a vCPU's exit is served, and by
    /// Engine::flush_posted().
    void drain() {
        if (coalescing_.load(std::memory_order_relaxed)) drain_ring();
    }

  private:
    void changed(bool port, const Bus::Range& range, bool attached);
    void drain_ring();

    Vm& vm_;
    std::atomic<bool> coalescing_{false};
    std::mutex mutex_;  // one drainer at a time; before a device's
    void* ring_ = nullptr;
};

}  // namespace polyvisor::kvm
