// CpuState of one vCPU, in and out of KVM.
#pragma once

#include "kvm/abi.hpp"

#include "cpu/state.hpp"

namespace polyvisor::kvm {

class KvmVcpu;

/// Reads everything but tsc_offset, which KvmVcpu keeps. `vcpu` must not be in KVM_RUN, nor have an
/// access to complete. In mode kUser `activity` is kRunning: KVM does not know of halting then, and
/// never of kShutdown. Throws HostError.
CpuState read_cpu(const KvmVcpu& vcpu);
/// Sets everything but tsc_offset, and forgets the guest's translations. Throws StateError, having
/// changed nothing, when the state is impossible (validate(), for the vCPU's CPUID policy) or KVM
/// refuses a part of it; HostError otherwise.
void write_cpu(KvmVcpu& vcpu, const CpuState& state);

/// The FPU's registers alone. What they are set to is not checked. Throw HostError.
FpuState read_fpu(const KvmVcpu& vcpu);
void write_fpu(KvmVcpu& vcpu, const FpuState& fpu);

/// Registers that kvm_run carries with an exit (KVM_CAP_SYNC_REGS).
void to_kvm(const CpuState& state, kvm_regs& regs);
void from_kvm(const kvm_regs& regs, CpuState& state);

}  // namespace polyvisor::kvm
