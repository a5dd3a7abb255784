// CpuState to and from KVM's structs, for one vCPU.
#pragma once

#include <linux/kvm.h>

#include "cpu/state.hpp"

namespace polyvisor::kvm {

class KvmVcpu;

/// Reads everything but tsc_offset, which KvmVcpu keeps. `vcpu` must not be in KVM_RUN, nor have an
/// access to complete.
CpuState read_cpu(const KvmVcpu& vcpu);
/// Sets everything but tsc_offset. Throws StateError, having changed nothing, when the state is
/// impossible (validate(), or features that the vCPU's CPUID lacks).
void write_cpu(KvmVcpu& vcpu, const CpuState& state);

/// Registers that kvm_run carries with an exit (KVM_CAP_SYNC_REGS).
void to_kvm(const CpuState& state, kvm_regs& regs);
void from_kvm(const kvm_regs& regs, CpuState& state);

}  // namespace polyvisor::kvm
