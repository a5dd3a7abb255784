// CpuState to and from the structs that KVM keeps a vCPU's state in: plain conversions, without a
// vCPU. cpu_state.cpp moves the structs.
#pragma once

#include <span>

#include "cpu/state.hpp"
#include "kvm/abi.hpp"

namespace polyvisor::kvm {

void to_kvm(const CpuState& state, kvm_regs& regs);
void from_kvm(const kvm_regs& regs, CpuState& state);
void to_kvm(const GeneralRegisters& registers, kvm_regs& regs);
void from_kvm(const kvm_regs& regs, GeneralRegisters& registers);

/// Leaves apic_base and cr8 alone: they are the local APIC's.
void to_kvm(const CpuState& state, kvm_sregs& sregs);
void from_kvm(const kvm_sregs& sregs, CpuState& state);

/// Makes nr_xcrs 0 where neither the host has XCR0 nor the state needs it.
void to_kvm(const CpuState& state, kvm_xcrs& xcrs);
void from_kvm(const kvm_xcrs& xcrs, CpuState& state);

void to_kvm(const CpuState& state, kvm_debugregs& debug);
void from_kvm(const kvm_debugregs& debug, CpuState& state);

/// NMIs, the interrupt shadow and the event in flight; leaves SMM and SIPI alone.
void to_kvm(const CpuState& state, kvm_vcpu_events& events);
void from_kvm(const kvm_vcpu_events& events, CpuState& state);

/// KVM has no state for kShutdown, which becomes RUNNABLE: the owner of the vCPU keeps it.
void to_kvm(const CpuState& state, kvm_mp_state& activity);
void from_kvm(const kvm_mp_state& activity, CpuState& state);

/// The XSAVE area in its standard format (SDM 1, 13.4), at least 4096 bytes. `avx`: the guest's CPU
/// has AVX.
void to_kvm(const FpuState& fpu, bool avx, std::span<u8> xsave);
void from_kvm(std::span<const u8> xsave, FpuState& fpu);

}  // namespace polyvisor::kvm
