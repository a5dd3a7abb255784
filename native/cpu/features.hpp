// CPU features as one bit each. A row of the instruction table names the feature it needs; a CPUID
// bit is set exactly when the feature is in the policy's set (cpu/cpuid.cpp has the table of bits).
#pragma once

#include "base/types.hpp"

namespace polyvisor {

enum class Feature : u8 {
    kBase,  ///< always there: 8086 to i686 integer, x87, long mode's own
    kCx8,
    kCmov,
    kMmx,
    kFxsr,
    kSse,
    kSse2,
    kClflush,
    kSep,
    kMsr,
    kTsc,
    kSyscall,
    kLongMode,
    kSse3,
    kSsse3,
    kSse41,
    kSse42,
    kPopcnt,
    kPclmul,
    kAes,
    kMovbe,
    kCx16,
    kMonitor,
    kRdrand,
    kRdseed,
    kXsave,
    kXsaveopt,
    kXsavec,
    kXgetbv1,
    kXsaves,
    kAvx,
    kF16c,
    kFma,
    kAvx2,
    kBmi1,
    kBmi2,
    kLzcnt,
    kAdx,
    kSha,
    kVaes,
    kVpclmul,
    kGfni,
    kSse4a,
    kFsgsbase,
    kRdtscp,
    kRdpid,
    kInvpcid,
    kClflushopt,
    kClwb,
    kPrefetchw,
    kLahf64,
    kSerialize,
    kErms,
    kFsrm,
    k3dnowPrefetch,
    kHypercall,
    // Features without instructions of their own.
    kPae,
    kPse,
    kPse36,
    kPge,
    kPat,
    kMtrr,
    kNx,
    kPage1Gb,
    kSmep,
    kSmap,
    kUmip,
    kPcid,
    kLa57,
    kPku,
    kX2apic,
    kTscDeadline,
    kTscAdjust,
    kArat,
    kDe,
    kVme,
    kApic,
    kMce,
    kMca,
    kNotVulnerable,  ///< guest code never speculates: CPUID and MSRs deny every such vulnerability
    kKvmClock,  ///< the engine serves the KVM clock MSRs itself: the hypervisor leaves offer them
    // What a guest on a CPU that speculates defends itself with, and what it need not defend itself
    // against. Only engines on hardware have them; kNotVulnerable stands for them elsewhere.
    kSpecCtrl,  ///< Intel's IBRS and IBPB: MSRs SPEC_CTRL and PRED_CMD
    kIntelStibp,
    kSsbd,
    kPsfd,
    kIpredCtrl,
    kRrsbaCtrl,
    kBhiCtrl,
    kMcdtNo,
    kMdClear,
    kFlushL1d,
    kArchCapabilities,  ///< MSR IA32_ARCH_CAPABILITIES, CpuidPolicy::arch_capabilities
    kAmdIbpb,
    kAmdIbrs,
    kAmdStibp,
    kAmdStibpAlwaysOn,
    kAmdIbrsSameMode,
    kAmdSsbd,
    kAmdSsbNo,
    kAmdPsfd,
    kBtcNo,
    kIbpbRet,
    kVerwClear,
    kAutoIbrs,
    kSbpb,
    kIbpbBrtype,
    kSrsoNo,
    kSrsoUserKernelNo,
    kTsaSqNo,
    kTsaL1No,
    // AMD CPUs since Zen, and the soft engine.
    kXsaveErrorPointers,  ///< FXSAVE and XSAVE always store the x87 error pointers
    kLfenceSerializing,   ///< LFENCE always waits for what is before it
    kNullClearsBase,      ///< loading a null selector clears the segment's base
    // KVM's paravirtual calls that need its own local APIC, and no state of their own.
    kPvUnhalt,
    kPvIpi,
    kCount
};
static_assert(static_cast<unsigned>(Feature::kCount) <= 128);

class FeatureSet {
  public:
    constexpr bool has(Feature feature) const {
        auto n = static_cast<unsigned>(feature);
        return (words_[n / 64] >> (n % 64)) & 1;
    }
    constexpr FeatureSet& set(Feature feature, bool on = true) {
        auto n = static_cast<unsigned>(feature);
        u64 mask = u64{1} << (n % 64);
        words_[n / 64] = on ? words_[n / 64] | mask : words_[n / 64] & ~mask;
        return *this;
    }
    constexpr FeatureSet operator&(const FeatureSet& other) const {
        FeatureSet result;
        for (int i = 0; i < 2; ++i) result.words_[i] = words_[i] & other.words_[i];
        return result;
    }
    constexpr FeatureSet operator|(const FeatureSet& other) const {
        FeatureSet result;
        for (int i = 0; i < 2; ++i) result.words_[i] = words_[i] | other.words_[i];
        return result;
    }
    constexpr bool operator==(const FeatureSet&) const = default;

  private:
    u64 words_[2] = {1, 0};  // kBase
};

}  // namespace polyvisor
