// CPUID as a policy: a list of leaves that a vCPU answers, made once per machine from a named
// model, what the engine implements and what the host has. Features are also a mask that the soft
// engine's decoder uses, so that CPUID and behaviour cannot disagree.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/types.hpp"
#include "cpu/features.hpp"

namespace polyvisor {

struct CpuidLeaf {
    u32 leaf = 0;
    u32 subleaf = 0;
    bool has_subleaf = false;
    u32 eax = 0, ebx = 0, ecx = 0, edx = 0;
};

struct CpuidPolicy {
    std::vector<CpuidLeaf> leaves;
    FeatureSet features;
    u64 tsc_khz = 1'000'000;
    u32 cpus = 1;
    u8 physical_bits = 40;
    bool intel = false;  ///< the vendor is Intel: what differs between vendors follows it
    /// IA32_ARCH_CAPABILITIES of a vCPU with Feature::kArchCapabilities.
    u64 arch_capabilities = 0;

    /// What CPUID gives for leaf/subleaf on vCPU `apic_id`; topology and XSAVE sizes that depend on
    /// the running CPU (XCR0, OSXSAVE) are the engine's to patch. Unknown leaves give zeros.
    CpuidLeaf find(u32 leaf, u32 subleaf, u32 apic_id) const;
};

/// What the host's CPU and kernel let user-mode code use.
FeatureSet host_features();

/// The name of a feature as Linux spells it in /proc/cpuinfo ("sse4_2"), or in its source when it
/// is not shown there ("amd_ibpb"); "" for those that no single bit shows.
std::string_view feature_name(Feature feature);

/// IA32_ARCH_CAPABILITIES of a vCPU with kNotVulnerable (Intel vendor): RDCL_NO, IBRS_ALL, SSB_NO,
/// MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO,
/// RFDS_NO, ITS_NO.
inline constexpr u64 kArchCapabilities = bit(0) | bit(1) | bit(4) | bit(5) | bit(6) | bit(8) |
                                         bit(13) | bit(14) | bit(15) | bit(20) | bit(24) | bit(26) |
                                         bit(27) | bit(62);

/// What else the policy depends on.
struct CpuidOptions {
    u8 physical_bits = 40;      ///< at most: guest-physical addresses
    u64 arch_capabilities = 0;  ///< of the CPU that the guest runs on
    /// Features by feature_name(), taken from the model or added to it.
    std::vector<std::pair<std::string, bool>> changes;
};

/// model: "host" (all the engine has), "baseline", "x86-64-v2", "x86-64-v3". `implemented` is what
/// the engine offers; the result is never more than that and the host (except bits that need no
/// host). The named models have the same instructions everywhere; features without instructions
/// follow the engine with every model. Throws ConfigError ("cpu_model", "cpu_features", "cpus") for
/// an unknown model or feature, and for one that engine or host cannot give.
CpuidPolicy make_cpuid_policy(std::string_view model, const FeatureSet& implemented, u32 cpus,
                              u64 tsc_khz, const CpuidOptions& options = {});

}  // namespace polyvisor
