// KVM's exit reasons by name, for counters and messages.
#pragma once

#include "base/types.hpp"

namespace polyvisor::kvm {

/// "io", "mmio", "hlt", ...: KVM_EXIT_* in lower case. Reasons that this version has no name for
/// are all "other".
const char* exit_name(u32 kvm_exit_reason);

}  // namespace polyvisor::kvm
