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
    constexpr bool operator==(const FeatureSet&) const = default;

  private:
    u64 words_[2] = {1, 0};  // kBase
};

}  // namespace polyvisor
