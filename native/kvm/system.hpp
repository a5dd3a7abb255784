// An open /dev/kvm: what the kernel offers, before there is a VM. All of it is asked once.
#pragma once

#include <linux/kvm.h>

#include <memory>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "cpu/engine.hpp"

namespace polyvisor::kvm {

class System {
  public:
    /// Throws EngineUnavailable with reason "missing" (no device, or no driver behind it),
    /// "permission", "version" (of the API) or "broken"; the message says what to do.
    explicit System(std::string path = "/dev/kvm");

    int fd() const { return fd_.get(); }
    const std::string& path() const { return path_; }
    /// KVM_CHECK_EXTENSION: 0 when the kernel does not know it.
    int check(int capability) const;
    u64 vcpu_mmap_size() const { return vcpu_mmap_size_; }
    /// KVM_GET_SUPPORTED_CPUID.
    const std::vector<kvm_cpuid_entry2>& supported_cpuid() const { return cpuid_; }
    /// KVM_GET_MSR_INDEX_LIST: the MSRs that are part of a vCPU's state here, sorted.
    const std::vector<u32>& msr_indices() const { return msrs_; }
    bool has_msr(u32 index) const;

  private:
    std::string path_;
    OwnedFd fd_;
    u64 vcpu_mmap_size_ = 0;
    std::vector<kvm_cpuid_entry2> cpuid_;
    std::vector<u32> msrs_;
};

/// Features, TSC and interrupt chips for the CPUID policy and the machine.
EngineOffer make_offer(const System& system);

/// The policy as KVM_SET_CPUID2 takes it, for one vCPU. Throws ConfigError naming the leaf for what
/// this host's KVM cannot give.
std::vector<kvm_cpuid_entry2> make_cpuid(const CpuidPolicy& policy, const System& system,
                                         u32 apic_id);

}  // namespace polyvisor::kvm
