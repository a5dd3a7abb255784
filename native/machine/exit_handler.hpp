// What each exit of a vCPU means for the machine. A free function without a machine, so that tests
// feed it synthetic exits.
#pragma once

#include <array>
#include <atomic>

#include "base/log.hpp"
#include "cpu/exit.hpp"
#include "machine/stop_info.hpp"

namespace polyvisor {

/// How often each reason came, for one vCPU. Written by its thread, read by any.
class ExitCounters {
  public:
    void count(ExitReason reason) {
        counts_[static_cast<unsigned>(reason)].fetch_add(1, std::memory_order_relaxed);
    }
    u64 of(ExitReason reason) const {
        return counts_[static_cast<unsigned>(reason)].load(std::memory_order_relaxed);
    }
    static constexpr unsigned kReasons = static_cast<unsigned>(ExitReason::kFail) + 1;

  private:
    std::array<std::atomic<u64>, kReasons> counts_{};
};

enum class Next : u8 {
    kRun,     ///< run the vCPU again (unless the machine is paused or has ended)
    kHalted,  ///< nothing but INIT or NMI can wake this CPU
    kPause,   ///< a breakpoint of the host, or an INT3: Breakpoints::stopped() knows
    kEnd,     ///< end the machine as `stop` says
};

/// Decides what to do after `exit` of vCPU `cpu`. For reads, fills exit.data with what the guest
/// gets: all ones from addresses that nobody claims, zero from an unknown MSR. Sets `stop` with
/// kEnd.
Next handle_exit(Exit& exit, u32 cpu, Log& log, StopInfo& stop);

}  // namespace polyvisor
