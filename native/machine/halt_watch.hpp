// Notices that a machine whose local APICs are the engine's has halted for good. Our own APICs tell
// of a HLT with interrupts off; an in-kernel one just sleeps. So the threads' CPU time is looked at
// now and then: when none has moved since the last look, they are asked (RunControl::ask_dormant).
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "bus/clock.hpp"
#include "machine/run_control.hpp"
#include "machine/vcpu_thread.hpp"

namespace polyvisor {

class HaltWatch {
  public:
    HaltWatch(Clock& clock, RunControl& control,
              const std::vector<std::unique_ptr<VcpuThread>>& threads);
    /// With the threads running.
    void start();

  private:
    static constexpr Nanoseconds kFirst = 1'000'000, kLongest = 250'000'000;
    void look();

    Clock& clock_;
    RunControl& control_;
    const std::vector<std::unique_ptr<VcpuThread>>& threads_;
    Nanoseconds period_ = kFirst;
    u64 last_ = 0;
    bool asked_ = false;  // since the threads last moved on their own
    Timer timer_;
};

}  // namespace polyvisor
