#include "machine/exit_handler.hpp"

#include <cstdio>

namespace polyvisor {

namespace {

std::string access_text(const Exit& exit, u32 cpu) {
    char text[96];
    std::snprintf(text, sizeof text, "CPU %u: %s of %u bytes at 0x%llx", cpu,
                  exit.write ? "write" : "read", exit.size,
                  static_cast<unsigned long long>(exit.address));
    return text;
}

}  // namespace

Next handle_exit(Exit& exit, u32 cpu, Log& log, StopInfo& stop) {
    switch (exit.reason) {
        case ExitReason::kIo:
        case ExitReason::kMmio:
            // What floats on a bus without a driver reads as ones; writes go nowhere.
            if (!exit.write) exit.data.fill(0xff);
            log.note(exit.reason == ExitReason::kIo ? "unclaimed port" : "unclaimed memory",
                     access_text(exit, cpu) + ", which nothing claims");
            return Next::kRun;
        case ExitReason::kMsr:
            if (!exit.write) exit.data.fill(0);
            log.note("unknown msr", access_text(exit, cpu) + ", an unknown MSR");
            return Next::kRun;
        case ExitReason::kHypercall:
            exit.data.fill(0xff);  // -1: no such call
            log.note("unknown hypercall", "CPU " + std::to_string(cpu) + ": unknown hypercall");
            return Next::kRun;
        case ExitReason::kInterrupted:
            return Next::kRun;
        case ExitReason::kHalt:
            return Next::kHalted;
        case ExitReason::kDebug:
            return Next::kPause;
        case ExitReason::kShutdown:
            stop = {StopReason::kTripleFault, 0,
                    exit.text.empty() ? "CPU " + std::to_string(cpu) + " shut down" : exit.text,
                    cpu};
            return Next::kEnd;
        case ExitReason::kFail:
            break;
    }
    stop = {StopReason::kEngineFailure, 0,
            exit.text.empty() ? "the engine gave no reason" : exit.text, cpu};
    return Next::kEnd;
}

}  // namespace polyvisor
