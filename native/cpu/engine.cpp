#include "cpu/engine.hpp"

#include "base/error.hpp"

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

DirtyLog& Engine::dirty_log() {
    throw StateMismatch("this engine has no dirty log");
}

}  // namespace polyvisor
