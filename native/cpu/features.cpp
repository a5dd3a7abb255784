// The one table of feature bits: where CPUID shows each Feature, and whether running its
// instructions needs the host to have it. host_features() reads it one way, make_cpuid_policy() the
// other.
#include "cpu/feature_bits.hpp"

#include <cpuid.h>

#include "cpu/cpuid.hpp"

namespace polyvisor {
namespace {

using F = Feature;
using R = FeatureBit::Register;
constexpr bool kHost = true;   // guest instructions run as the host's own
constexpr bool kOurs = false;  // wholly emulated
constexpr auto kIntel = FeatureBit::kIntelOnly;
constexpr auto kAmd = FeatureBit::kAmdOnly;

constexpr FeatureBit kBits[] = {
    {F::kVme, 1, 0, R::kEdx, 1, kOurs, "vme"},
    {F::kDe, 1, 0, R::kEdx, 2, kOurs, "de"},
    {F::kPse, 1, 0, R::kEdx, 3, kOurs, "pse"},
    {F::kTsc, 1, 0, R::kEdx, 4, kOurs, "tsc"},
    {F::kMsr, 1, 0, R::kEdx, 5, kOurs, "msr"},
    {F::kPae, 1, 0, R::kEdx, 6, kOurs, "pae"},
    {F::kMce, 1, 0, R::kEdx, 7, kOurs, "mce"},
    {F::kCx8, 1, 0, R::kEdx, 8, kOurs, "cx8"},
    {F::kApic, 1, 0, R::kEdx, 9, kOurs, "apic"},
    {F::kSep, 1, 0, R::kEdx, 11, kOurs, "sep"},
    {F::kMtrr, 1, 0, R::kEdx, 12, kOurs, "mtrr"},
    {F::kPge, 1, 0, R::kEdx, 13, kOurs, "pge"},
    {F::kMca, 1, 0, R::kEdx, 14, kOurs, "mca"},
    {F::kCmov, 1, 0, R::kEdx, 15, kOurs, "cmov"},
    {F::kPat, 1, 0, R::kEdx, 16, kOurs, "pat"},
    {F::kPse36, 1, 0, R::kEdx, 17, kOurs, "pse36"},
    {F::kClflush, 1, 0, R::kEdx, 19, kOurs, "clflush"},
    {F::kMmx, 1, 0, R::kEdx, 23, kHost, "mmx"},
    {F::kFxsr, 1, 0, R::kEdx, 24, kOurs, "fxsr"},
    {F::kSse, 1, 0, R::kEdx, 25, kHost, "sse"},
    {F::kSse2, 1, 0, R::kEdx, 26, kHost, "sse2"},
    {F::kSse3, 1, 0, R::kEcx, 0, kHost, "pni"},
    {F::kPclmul, 1, 0, R::kEcx, 1, kHost, "pclmulqdq"},
    {F::kMonitor, 1, 0, R::kEcx, 3, kOurs, "monitor"},
    {F::kSsse3, 1, 0, R::kEcx, 9, kHost, "ssse3"},
    {F::kFma, 1, 0, R::kEcx, 12, kHost, "fma"},
    {F::kCx16, 1, 0, R::kEcx, 13, kHost, "cx16"},
    {F::kPcid, 1, 0, R::kEcx, 17, kOurs, "pcid"},
    {F::kSse41, 1, 0, R::kEcx, 19, kHost, "sse4_1"},
    {F::kSse42, 1, 0, R::kEcx, 20, kHost, "sse4_2"},
    {F::kX2apic, 1, 0, R::kEcx, 21, kOurs, "x2apic"},
    {F::kMovbe, 1, 0, R::kEcx, 22, kHost, "movbe"},
    {F::kPopcnt, 1, 0, R::kEcx, 23, kHost, "popcnt"},
    {F::kTscDeadline, 1, 0, R::kEcx, 24, kOurs, "tsc_deadline_timer"},
    {F::kAes, 1, 0, R::kEcx, 25, kHost, "aes"},
    {F::kXsave, 1, 0, R::kEcx, 26, kOurs, "xsave"},
    {F::kAvx, 1, 0, R::kEcx, 28, kHost, "avx"},
    {F::kF16c, 1, 0, R::kEcx, 29, kHost, "f16c"},
    {F::kRdrand, 1, 0, R::kEcx, 30, kHost, "rdrand"},
    {F::kArat, 6, 0, R::kEax, 2, kOurs, "arat"},
    {F::kFsgsbase, 7, 0, R::kEbx, 0, kOurs, "fsgsbase"},
    {F::kTscAdjust, 7, 0, R::kEbx, 1, kOurs, "tsc_adjust"},
    {F::kBmi1, 7, 0, R::kEbx, 3, kHost, "bmi1"},
    {F::kAvx2, 7, 0, R::kEbx, 5, kHost, "avx2"},
    {F::kSmep, 7, 0, R::kEbx, 7, kOurs, "smep"},
    {F::kBmi2, 7, 0, R::kEbx, 8, kHost, "bmi2"},
    {F::kErms, 7, 0, R::kEbx, 9, kOurs, "erms"},
    {F::kInvpcid, 7, 0, R::kEbx, 10, kOurs, "invpcid"},
    {F::kRdseed, 7, 0, R::kEbx, 18, kHost, "rdseed"},
    {F::kAdx, 7, 0, R::kEbx, 19, kHost, "adx"},
    {F::kSmap, 7, 0, R::kEbx, 20, kOurs, "smap"},
    {F::kClflushopt, 7, 0, R::kEbx, 23, kOurs, "clflushopt"},
    {F::kClwb, 7, 0, R::kEbx, 24, kOurs, "clwb"},
    {F::kSha, 7, 0, R::kEbx, 29, kHost, "sha_ni"},
    {F::kUmip, 7, 0, R::kEcx, 2, kOurs, "umip"},
    {F::kPku, 7, 0, R::kEcx, 3, kOurs, "pku"},
    {F::kGfni, 7, 0, R::kEcx, 8, kHost, "gfni"},
    {F::kVaes, 7, 0, R::kEcx, 9, kHost, "vaes"},
    {F::kVpclmul, 7, 0, R::kEcx, 10, kHost, "vpclmulqdq"},
    {F::kLa57, 7, 0, R::kEcx, 16, kOurs, "la57"},
    {F::kRdpid, 7, 0, R::kEcx, 22, kOurs, "rdpid"},
    {F::kFsrm, 7, 0, R::kEdx, 4, kOurs, "fsrm"},
    {F::kSerialize, 7, 0, R::kEdx, 14, kOurs, "serialize"},
    {F::kXsaveopt, 13, 1, R::kEax, 0, kOurs, "xsaveopt"},
    {F::kXsavec, 13, 1, R::kEax, 1, kOurs, "xsavec"},
    {F::kXgetbv1, 13, 1, R::kEax, 2, kOurs, "xgetbv1"},
    {F::kXsaves, 13, 1, R::kEax, 3, kOurs, "xsaves"},
    {F::kLahf64, 0x80000001, 0, R::kEcx, 0, kOurs, "lahf_lm"},
    {F::kLzcnt, 0x80000001, 0, R::kEcx, 5, kHost, "abm"},
    {F::kSse4a, 0x80000001, 0, R::kEcx, 6, kHost, "sse4a"},
    // One CPUID bit for PREFETCHW and the AMD name of the same.
    {F::kPrefetchw, 0x80000001, 0, R::kEcx, 8, kOurs, "3dnowprefetch"},
    {F::k3dnowPrefetch, 0x80000001, 0, R::kEcx, 8, kOurs, ""},
    {F::kSyscall, 0x80000001, 0, R::kEdx, 11, kOurs, "syscall"},
    {F::kNx, 0x80000001, 0, R::kEdx, 20, kOurs, "nx"},
    {F::kPage1Gb, 0x80000001, 0, R::kEdx, 26, kOurs, "pdpe1gb"},
    {F::kRdtscp, 0x80000001, 0, R::kEdx, 27, kOurs, "rdtscp"},
    {F::kLongMode, 0x80000001, 0, R::kEdx, 29, kOurs, "lm"},
    // The kernel shows few of these in /proc/cpuinfo; the other names are its constants'.
    {F::kMdClear, 7, 0, R::kEdx, 10, kOurs, "md_clear", kIntel},
    {F::kSpecCtrl, 7, 0, R::kEdx, 26, kOurs, "spec_ctrl", kIntel},
    {F::kIntelStibp, 7, 0, R::kEdx, 27, kOurs, "intel_stibp", kIntel},
    {F::kFlushL1d, 7, 0, R::kEdx, 28, kOurs, "flush_l1d", kIntel},
    {F::kArchCapabilities, 7, 0, R::kEdx, 29, kOurs, "arch_capabilities"},
    {F::kSsbd, 7, 0, R::kEdx, 31, kOurs, "spec_ctrl_ssbd", kIntel},
    {F::kPsfd, 7, 2, R::kEdx, 0, kOurs, "intel_psfd", kIntel},
    {F::kIpredCtrl, 7, 2, R::kEdx, 1, kOurs, "ipred_ctrl", kIntel},
    {F::kRrsbaCtrl, 7, 2, R::kEdx, 2, kOurs, "rrsba_ctrl", kIntel},
    {F::kBhiCtrl, 7, 2, R::kEdx, 4, kOurs, "bhi_ctrl", kIntel},
    {F::kMcdtNo, 7, 2, R::kEdx, 5, kOurs, "mcdt_no", kIntel},
    {F::kXsaveErrorPointers, 0x80000008, 0, R::kEbx, 2, kOurs, "xsaveerptr", kAmd},
    {F::kAmdIbpb, 0x80000008, 0, R::kEbx, 12, kOurs, "amd_ibpb", kAmd},
    {F::kAmdIbrs, 0x80000008, 0, R::kEbx, 14, kOurs, "amd_ibrs", kAmd},
    {F::kAmdStibp, 0x80000008, 0, R::kEbx, 15, kOurs, "amd_stibp", kAmd},
    {F::kAmdStibpAlwaysOn, 0x80000008, 0, R::kEbx, 17, kOurs, "amd_stibp_always_on", kAmd},
    {F::kAmdIbrsSameMode, 0x80000008, 0, R::kEbx, 19, kOurs, "amd_ibrs_same_mode", kAmd},
    {F::kAmdSsbd, 0x80000008, 0, R::kEbx, 24, kOurs, "amd_ssbd", kAmd},
    {F::kAmdSsbNo, 0x80000008, 0, R::kEbx, 26, kOurs, "amd_ssb_no", kAmd},
    {F::kAmdPsfd, 0x80000008, 0, R::kEbx, 28, kOurs, "amd_psfd", kAmd},
    {F::kBtcNo, 0x80000008, 0, R::kEbx, 29, kOurs, "btc_no", kAmd},
    {F::kIbpbRet, 0x80000008, 0, R::kEbx, 30, kOurs, "ibpb_ret", kAmd},
    {F::kLfenceSerializing, 0x80000021, 0, R::kEax, 2, kOurs, "lfence_rdtsc", kAmd},
    {F::kVerwClear, 0x80000021, 0, R::kEax, 5, kOurs, "verw_clear", kAmd},
    {F::kNullClearsBase, 0x80000021, 0, R::kEax, 6, kOurs, "null_sel_clr_base", kAmd},
    {F::kAutoIbrs, 0x80000021, 0, R::kEax, 8, kOurs, "autoibrs", kAmd},
    {F::kSbpb, 0x80000021, 0, R::kEax, 27, kOurs, "sbpb", kAmd},
    {F::kIbpbBrtype, 0x80000021, 0, R::kEax, 28, kOurs, "ibpb_brtype", kAmd},
    {F::kSrsoNo, 0x80000021, 0, R::kEax, 29, kOurs, "srso_no", kAmd},
    {F::kSrsoUserKernelNo, 0x80000021, 0, R::kEax, 30, kOurs, "srso_user_kernel_no", kAmd},
    {F::kTsaSqNo, 0x80000021, 0, R::kEcx, 1, kOurs, "tsa_sq_no", kAmd},
    {F::kTsaL1No, 0x80000021, 0, R::kEcx, 2, kOurs, "tsa_l1_no", kAmd},
    // KVM's own leaf; the names are QEMU's.
    {F::kPvUnhalt, kKvmFeatureLeaf, 0, R::kEax, 7, kOurs, "kvm_pv_unhalt"},
    {F::kPvIpi, kKvmFeatureLeaf, 0, R::kEax, 11, kOurs, "kvm_pv_ipi"},
    // No bit of their own.
    {F::kHypercall, 0, 0, R::kEax, FeatureBit::kNoBit, kOurs, ""},
    {F::kNotVulnerable, 0, 0, R::kEax, FeatureBit::kNoBit, kOurs, ""},
    {F::kKvmClock, 0, 0, R::kEax, FeatureBit::kNoBit, kOurs, ""},
};
static_assert(sizeof(kBits) / sizeof(kBits[0]) + 1 == static_cast<unsigned>(F::kCount),
              "every feature but kBase has one row");

// The kernel's name of a bit and ours differ only in who reads them; XCR0 decides whether the
// host's user mode may touch YMM state at all.
u64 host_xcr0() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 3;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return u64{high} << 32 | low;
}

}  // namespace

std::span<const FeatureBit> feature_bits() {
    return kBits;
}

namespace {

FeatureSet ask_host() {
    FeatureSet set;
    for (const FeatureBit& row : kBits) {
        if (row.bit == FeatureBit::kNoBit || row.leaf == kKvmFeatureLeaf) continue;
        unsigned r[4]{};
        if (__get_cpuid_count(row.leaf, row.subleaf, &r[0], &r[1], &r[2], &r[3])) {
            set.set(row.feature, r[row.reg] >> row.bit & 1);
        }
    }
    if ((host_xcr0() & 6) != 6) {
        for (F f : {F::kAvx, F::kAvx2, F::kFma, F::kF16c, F::kVaes, F::kVpclmul}) set.set(f, false);
    }
    return set;
}

}  // namespace

// Asked once: below a hypervisor every CPUID is an exit, and they are hundreds.
FeatureSet host_features() {
    static const FeatureSet features = ask_host();
    return features;
}

const FeatureBit* find_feature(std::string_view name) {
    for (const FeatureBit& row : kBits) {
        if (!name.empty() && row.name == name) return &row;
    }
    return nullptr;
}

std::string_view feature_name(Feature feature) {
    for (const FeatureBit& row : kBits) {
        if (row.feature == feature) return row.name;
    }
    return "";
}

}  // namespace polyvisor
