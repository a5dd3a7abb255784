#include <exception>

#include "machine/vcpu_thread.hpp"

namespace polyvisor {

void run_loop(Vcpu& vcpu, RunControl& control, ExitCounters& counters, Log& log) {
    const u32 cpu = vcpu.id();
    try {
        while (control.enter()) {
            Exit exit = vcpu.run();
            counters.count(exit.reason);
            StopInfo stop;
            switch (handle_exit(exit, cpu, log, stop)) {
                case Next::kRun: break;
                case Next::kHalted: control.halted(cpu); break;
                case Next::kPause: control.request_pause(); break;
                case Next::kEnd: control.end(std::move(stop)); break;
            }
        }
    } catch (const std::exception& error) {
        control.end({StopReason::kEngineFailure, 0, error.what(), cpu});
    }
}

}  // namespace polyvisor
