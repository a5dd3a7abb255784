// What tests of one vCPU need: a local APIC that never has anything for it, and whether this host's
// KVM is a whole one.
#pragma once

#include <unistd.h>

#include "no_interrupts.hpp"

namespace pvtest {

using namespace polyvisor;

/// False for KVMs that do without the CPU's virtualization (PVM): they have not all modes, and
/// emulate ring 0 as far as Linux needs it.
inline bool hardware() {
    return ::access("/sys/module/kvm_amd", F_OK) == 0 ||
           ::access("/sys/module/kvm_intel", F_OK) == 0;
}

}  // namespace pvtest
