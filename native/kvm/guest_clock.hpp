// The guest's clocks on hardware: the TSC and kvmclock run with the host's, and have to agree with
// the machine's virtual time (bus/clock.hpp), which stands still while the machine is paused.
//
//     guest TSC = host TSC (scaled) + offset of the vCPU
//
// The offset of a vCPU with CpuState.msr.tsc_offset 0 is the machine's base offset. It is computed
// once, when the machine first runs or its time is set, and moved back by the length of every
// pause, so that the guest's TSC goes on exactly where it stopped.
#pragma once

#include "kvm/abi.hpp"

#include <atomic>
#include <mutex>

#include "bus/clock.hpp"

namespace polyvisor::kvm {

class GuestClock {
  public:
    GuestClock(int vm_fd, Clock& clock) : vm_fd_(vm_fd), clock_(clock) {}

    /// Brings kvmclock and the base offset up to the machine's time if it was moved (paused, set)
    /// since the last call. Returns a number that changes whenever the base did. `vcpu_fd`: the
    /// calling thread's own vCPU.
    u64 sync(int vcpu_fd);
    /// Guest TSC minus scaled host TSC of a vCPU with tsc_offset 0.
    s64 base_offset() const { return base_.load(std::memory_order_relaxed); }
    /// How far the hardware's TSC has run ahead of the machine's clock, in ticks: the two count on
    /// different oscillators. Only while the machine runs.
    s64 drift(int vcpu_fd) const;
    /// The host's TSC frequency (KVM_GET_TSC_KHZ).
    void set_host_khz(u64 khz);

  private:
    s64 ticks(s64 nanoseconds) const;
    u64 scaled_host_tsc(int vcpu_fd) const;

    int vm_fd_;
    Clock& clock_;
    bool scaled_ = false;  // the guest's frequency is not the host's
    std::mutex mutex_;     // a leaf; writers of what follows hold it
    std::atomic<s64> base_{0};
    std::atomic<u64> generation_{0};
    std::atomic<u64> seen_offset_{0};  // Clock::host_offset() at the last sync()
};

}  // namespace polyvisor::kvm
