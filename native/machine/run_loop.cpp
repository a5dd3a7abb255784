#include <exception>

#include "machine/vcpu_thread.hpp"

namespace polyvisor {

namespace {

constexpr u64 kInterruptFlag = 1 << 9;

// Nothing but another CPU (or the host) could make it execute again.
bool is_dormant(const Vcpu& vcpu) {
    CpuState state = vcpu.save();
    return state.activity == Activity::kWaitForSipi ||
           (state.activity == Activity::kHalted && !(state.rflags & kInterruptFlag));
}

}  // namespace

void run_loop(Vcpu& vcpu, RunControl& control, Breakpoints& breakpoints, ExitCounters& counters,
              Log& log) {
    const u32 cpu = vcpu.id();
    try {
        while (control.enter()) {
            Exit exit = vcpu.run();
            counters.count(exit.reason);
            StopInfo stop;
            switch (handle_exit(exit, cpu, log, stop)) {
                case Next::kRun:
                    if (control.wants_reports()) control.report(cpu, is_dormant(vcpu));
                    break;
                case Next::kHalted:
                    control.halted(cpu);
                    break;
                case Next::kPause:
                    if (breakpoints.stopped(vcpu, exit)) control.request_pause();
                    break;
                case Next::kEnd:
                    control.end(std::move(stop));
                    break;
            }
        }
    } catch (const std::exception& error) {
        control.end({StopReason::kEngineFailure, 0, error.what(), cpu});
    }
}

}  // namespace polyvisor
