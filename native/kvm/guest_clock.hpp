// The guest's clocks on hardware: the TSC and kvmclock run with the host's, and have to agree with
// the machine's virtual time (bus/clock.hpp), which stands still while the machine is paused.
//
//     guest TSC = host TSC (scaled) + offset of the vCPU
//
// The offset of a vCPU with CpuState.msr.tsc_offset 0 is the machine's base offset. It is computed
// once, when the machine first runs or its time is set, and moved back by the length of every
// pause, so that the guest's TSC goes on exactly where it stopped.
#pragma once

#include <linux/kvm.h>

#include <atomic>
#include <mutex>

#include "bus/clock.hpp"

namespace polyvisor::kvm {

class GuestClock {
  public:
    GuestClock(int vm_fd, Clock& clock) : vm_fd_(vm_fd), clock_(clock) {}

    /// Brings kvmclock and the base offset up to the machine's time if it was moved (paused, set)
    /// since the last call. Returns a number that changes whenever the base did.
    u64 sync();
    /// Guest TSC minus scaled host TSC of a vCPU with tsc_offset 0.
    s64 base_offset() const { return base_.load(std::memory_order_relaxed); }
    /// The scaled host TSC now.
    u64 scaled_host_tsc() const;
    /// Virtual time at which a vCPU with tsc_offset 0 reads `tsc` (for timers of ours).
    Nanoseconds time_of_tsc(u64 tsc) const;
    /// The host's TSC frequency, once the first vCPU exists (KVM_GET_TSC_KHZ).
    void set_host_khz(u64 khz) { host_khz_ = khz; }
    u64 host_khz() const { return host_khz_; }

  private:
    int vm_fd_;
    Clock& clock_;
    u64 host_khz_ = 0;
    std::mutex mutex_;  // a leaf
    u64 last_host_offset_ = 0;
    u64 last_virtual_ = 0;
    std::atomic<s64> base_{0};
    std::atomic<u64> generation_{0};
    std::atomic<u64> seen_offset_{0};
};

}  // namespace polyvisor::kvm
