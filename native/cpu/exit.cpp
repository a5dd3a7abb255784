#include "cpu/exit.hpp"

namespace polyvisor {

const char* to_string(ExitReason reason) {
    switch (reason) {
        case ExitReason::kIo:
            return "io";
        case ExitReason::kMmio:
            return "mmio";
        case ExitReason::kHypercall:
            return "hypercall";
        case ExitReason::kMsr:
            return "msr";
        case ExitReason::kHalt:
            return "halt";
        case ExitReason::kShutdown:
            return "shutdown";
        case ExitReason::kInterrupted:
            return "interrupted";
        case ExitReason::kDebug:
            return "debug";
        case ExitReason::kFail:
            return "fail";
    }
    return "unknown";
}

}  // namespace polyvisor
