// How a machine ended. The set of reasons is closed; Python shows them by the names of to_string().
#pragma once

#include <string>

#include "base/types.hpp"

namespace polyvisor {

enum class StopReason : u8 {
    kPowerOff,       ///< the guest entered ACPI S5
    kReset,          ///< the guest asked for a reset
    kTripleFault,    ///< a CPU went into shutdown
    kDebugExit,      ///< the guest wrote to the debug-exit port; `status` says what
    kHalted,         ///< every CPU is halted for good
    kStopped,        ///< the host's wish
    kDeviceError,    ///< a device of the host's program threw
    kEngineFailure,  ///< the engine could not go on; `detail` says why
};

/// "power_off", "reset", ...
const char* to_string(StopReason reason);
/// The reverse; throws ConfigError.
StopReason stop_reason(const std::string& name);

struct StopInfo {
    StopReason reason = StopReason::kStopped;
    u32 status = 0;      ///< kDebugExit only
    std::string detail;  ///< for people
    u32 cpu = 0;         ///< which CPU's thread ended the machine, where one did
};

}  // namespace polyvisor
