// Which MSR accesses of a guest come to us.
#pragma once

namespace polyvisor::kvm {

class Vm;

/// Makes KVM exit with what it does not know itself, instead of answering #GP unseen; in mode kUser
/// also with the MSRs of our own local APIC. Before any vCPU is made. Throws EngineUnavailable with
/// reason "version" when mode kUser needs what this kernel lacks.
void install_msr_filter(Vm& vm);

}  // namespace polyvisor::kvm
