#include "cpu/engine.hpp"

namespace polyvisor {

const char* to_string(IrqchipMode mode) {
    switch (mode) {
        case IrqchipMode::kUser:
            return "user";
        case IrqchipMode::kSplit:
            return "split";
        case IrqchipMode::kKernel:
            return "kernel";
    }
    return "?";
}

}  // namespace polyvisor
