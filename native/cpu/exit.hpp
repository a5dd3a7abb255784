// Why Vcpu::run() returned. The set is closed; handle_exit() in machine/ decides what each means.
#pragma once

#include <array>
#include <string>

#include "base/types.hpp"

namespace polyvisor {

enum class ExitReason : u8 {
    kIo,         ///< a port access that nothing native claimed
    kMmio,       ///< a memory access that neither memory nor anything native claimed
    kHypercall,  ///< VMCALL/VMMCALL when the machine handles them
    kMsr,        ///< an MSR the engine does not know, when the machine asked for such exits
    kHalt,  ///< HLT that no interrupt can end (IF clear, no NMI source): only with halt exits on
    kShutdown,     ///< triple fault
    kInterrupted,  ///< request_stop(), or the instruction budget is used up
    kDebug,        ///< breakpoint or single step requested by the host
    kFail,         ///< the engine cannot go on; `text` says why
};

const char* to_string(ExitReason reason);

struct Exit {
    ExitReason reason = ExitReason::kInterrupted;
    bool write = false;        ///< kIo, kMmio, kMsr
    u8 size = 0;               ///< kIo, kMmio: bytes
    u64 address = 0;           ///< port, GPA, MSR index; kDebug: RIP, linear
    std::array<u8, 8> data{};  ///< written; or to be filled before the next run()
    u32 dr6 = 0;               ///< kDebug: B0-B3 and BS as in DR6; 0 for a breakpoint instruction
    std::string text;          ///< kFail, kShutdown: for people
};

}  // namespace polyvisor
