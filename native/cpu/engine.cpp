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

void Vcpu::set_debug(const GuestDebug&) {
    throw StateMismatch("this engine has no debugging");
}

void Vcpu::raise_int3() {
    throw StateMismatch("this engine has no debugging");
}

DirtyLog& Engine::dirty_log() {
    throw StateMismatch("this engine has no dirty log");
}

}  // namespace polyvisor
