// An open /dev/kvm: what the kernel offers, before there is a VM. All of it is asked once.
#pragma once

#include "kvm/abi.hpp"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "cpu/engine.hpp"

namespace polyvisor::kvm {

class System {
  public:
    /// Throws EngineUnavailable; the message says what to do. Its `reason` is
    ///     "missing"     there is no such device, or no driver behind it;
    ///     "permission"  this user may not open it;
    ///     "version"     its API is not version 12;
    ///     "broken"      it is something else, or does not answer as KVM does.
    explicit System(std::string path = "/dev/kvm");

    int fd() const { return fd_.get(); }
    const std::string& path() const { return path_; }
    /// KVM_CHECK_EXTENSION: 0 when the kernel does not know it.
    int check(int capability) const;
    u64 vcpu_mmap_size() const { return vcpu_mmap_size_; }
    /// KVM_GET_SUPPORTED_CPUID.
    const std::vector<kvm_cpuid_entry2>& supported_cpuid() const { return cpuid_; }
    /// The register (0 to 3: EAX to EDX) of a leaf of supported_cpuid(); 0 when it is not there.
    u32 supported(u32 leaf, u32 subleaf, unsigned reg) const;
    /// KVM_GET_MSR_INDEX_LIST: the MSRs that are part of a vCPU's state here, sorted.
    const std::vector<u32>& msr_indices() const { return msrs_; }
    bool has_msr(u32 index) const;
    /// What KVM can give a guest in an MSR that describes the CPU, such as IA32_ARCH_CAPABILITIES;
    /// 0 when it knows none of that number (KVM_GET_MSRS on the device).
    u64 feature_msr(u32 index) const;

    /// A VM without anything in it. Throws EngineUnavailable with reason "busy" when another
    /// hypervisor has the CPU, "broken" when KVM cannot make one. The first one of a process has
    /// often been made already by tsc_khz(), for nothing else; then this costs nothing.
    OwnedFd create_vm() const;
    /// The host's TSC frequency as KVM counts; needs a VM, so that it is asked when first wanted.
    u64 tsc_khz() const;
    /// To be called for each vCPU without a local APIC of KVM's. KVM patches its own code, on all
    /// of the host's CPUs, when the first one in the host comes and when the last one goes, which
    /// takes longer than all the rest of making and closing a vCPU. So from the second one on, one
    /// is kept that does nothing.
    void note_vcpu_without_lapic() const;
    /// Whether KVM_VCPU_TSC_OFFSET does what it says: there are KVMs that take the offset and then
    /// read as 0. `vcpu_fd`: one that has not run yet; asked once.
    bool tsc_offset_works(int vcpu_fd) const;
    /// Whether the CPU walks the guest's page tables itself (EPT, NPT); otherwise KVM keeps shadows
    /// of them, and believes these until the guest writes to its tables.
    bool nested_paging() const { return nested_paging_; }
    /// Whether a guest that writes XCR0 really gets what it wrote. Every CPU intercepts the write
    /// for KVM; QEMU's TCG, when it plays an AMD CPU, does not, and the guest loses its extended
    /// state at its next exit. So below another hypervisor it is tried in a guest, once.
    bool xsetbv_works() const;

  private:
    OwnedFd new_vm() const;
    OwnedFd take_vm() const;

    std::string path_;
    OwnedFd fd_;
    u64 vcpu_mmap_size_ = 0;
    bool nested_paging_ = false;
    std::vector<kvm_cpuid_entry2> cpuid_;
    std::vector<u32> msrs_;
    mutable std::mutex mutex_;  // a leaf, over what is asked late
    mutable OwnedFd spare_;     // a VM that nothing was done with
    mutable int spare_pid_ = 0;
    mutable u64 tsc_khz_ = 0;
    mutable int xsetbv_ = -1;  // not known yet
    mutable int tsc_offset_works_ = -1;
    mutable bool had_vcpu_ = false;  // without a local APIC
    mutable OwnedFd kept_vm_, kept_vcpu_;
};

/// Features, TSC and interrupt chips for the CPUID policy and the machine. Makes a VM, once.
EngineOffer make_offer(const System& system);

/// The policy as KVM_SET_CPUID2 takes it, for one vCPU. Throws ConfigError naming the feature and
/// leaf for what this host's KVM cannot give.
std::vector<kvm_cpuid_entry2> make_cpuid(const CpuidPolicy& policy, const System& system,
                                         u32 apic_id);

}  // namespace polyvisor::kvm
