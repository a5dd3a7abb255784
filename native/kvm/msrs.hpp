// The MSRs of CpuState: which index is which member, and how they get to and from a vCPU.
#pragma once

#include <span>
#include <vector>

#include "cpu/cpuid.hpp"
#include "cpu/state.hpp"
#include "kvm/abi.hpp"
#include "kvm/system.hpp"

namespace polyvisor::kvm {

/// The wall clock's address, one of the KVM clock's two MSRs (virt/kvm/x86/msr).
constexpr u32 kKvmWallClockMsr = 0x4b564d00;

/// One word of MsrState and its MSR. EFER is one of kvm_sregs, tsc_offset the vCPU's own.
struct MsrPlace {
    u32 index;
    u32 word;           ///< MsrState as an array of u64
    const char* field;  ///< as StateError names it
    u64 get(const MsrState& msr) const;
    void set(MsrState& msr, u64 value) const;
};

/// Those that vCPUs of this policy have on this host.
std::vector<MsrPlace> msr_places(const System& system, const CpuidPolicy& policy);

/// KVM_GET_MSRS. Where the kernel refuses one, it is left out of the answer.
std::vector<kvm_msr_entry> read_msrs(int vcpu_fd, std::span<const MsrPlace> places);
/// KVM_SET_MSRS: how many were set before the first that KVM refused.
std::size_t write_msrs(int vcpu_fd, std::span<const kvm_msr_entry> entries);

}  // namespace polyvisor::kvm
