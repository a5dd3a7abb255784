// What CPUID says, and why Linux boots fast on it.
//
// Clocks. Linux takes the TSC's frequency from leaf 0x15 only from Intel; from AMD it would
// calibrate against the PIT for some 50 ms. Under the KVM signature with the kvmclock bits it asks
// the time page instead (whatever the vendor), also presets loops-per-jiffy, and reads the wall
// clock there rather than waiting for the RTC. The TSC stays the clock source because it is
// invariant (0x80000007) and, with TSC_ADJUST, needs no watchdog. TSC-deadline with ARAT spares the
// APIC timer's calibration and the PIT altogether. The KVM signature also lets Linux use x2APIC
// without interrupt remapping, and "no I/O delay" stops its writes to port 0x80. Leaf 0x40000010
// (TSC and bus kHz) serves the others.
//
// Mitigations. Interpreted code does not speculate, so every "not vulnerable" bit there is is set:
// Intel's in IA32_ARCH_CAPABILITIES, AMD's in 0x80000008 and 0x80000021. Spectre v2 has no such
// bit; with IBRS_ALL (Intel) or automatic IBRS (AMD) Linux sets one register bit once and uses
// neither retpolines nor return thunks, which an interpreter would pay for on every indirect
// branch. A guest on real hardware gets none of that but what the hardware has: the immunities and
// the controls that KVM passes on, so that it defends itself as it would without us.
#include "cpu/cpuid.hpp"

#include <cpuid.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "base/error.hpp"
#include "cpu/feature_bits.hpp"

namespace polyvisor {
namespace {

constexpr u32 kHypervisorBase = 0x40000000;
constexpr u32 kXsaveLegacyArea = 512 + 64;
constexpr u32 kXsaveAvxSize = 256;

using F = Feature;

constexpr F kModelV1[] = {F::kCx8, F::kCmov, F::kMmx,     F::kFxsr,
                          F::kSse, F::kSse2, F::kSyscall, F::kLongMode};
constexpr F kModelV2[] = {F::kCx16,  F::kLahf64, F::kPopcnt, F::kSse3,
                          F::kSsse3, F::kSse41,  F::kSse42};
constexpr F kModelV3[] = {F::kAvx, F::kAvx2,  F::kBmi1,  F::kBmi2, F::kF16c,
                          F::kFma, F::kLzcnt, F::kMovbe, F::kXsave};
// User-visible features outside the model levels: only "host" has them. The rest of the set (system
// features, those without instructions) belongs to every model.
constexpr F kHostOnly[] = {F::kPclmul,   F::kAes,    F::kRdrand,  F::kRdseed, F::kAdx,
                           F::kSha,      F::kVaes,   F::kVpclmul, F::kGfni,   F::kSse4a,
                           F::kXsaveopt, F::kXsavec, F::kXgetbv1, F::kXsaves, F::kMonitor};

struct Leaf {
    u32 r[4]{};
};

Leaf host_leaf(u32 leaf, u32 subleaf = 0) {
    Leaf l;
    __cpuid_count(leaf, subleaf, l.r[0], l.r[1], l.r[2], l.r[3]);
    return l;
}

/// Collects leaves; bits are or'ed in.
class Builder {
  public:
    explicit Builder(CpuidPolicy& policy) : policy_(policy) {}

    CpuidLeaf& at(u32 leaf, u32 subleaf = 0, bool has_subleaf = false) {
        for (CpuidLeaf& l : policy_.leaves) {
            if (l.leaf == leaf && l.subleaf == subleaf) return l;
        }
        policy_.leaves.push_back({leaf, subleaf, has_subleaf});
        return policy_.leaves.back();
    }
    void set(u32 leaf, u32 a, u32 b, u32 c, u32 d) { fill(at(leaf), a, b, c, d); }
    void set(u32 leaf, u32 subleaf, u32 a, u32 b, u32 c, u32 d) {
        fill(at(leaf, subleaf, true), a, b, c, d);
    }
    void text(u32 leaf, const char (&bytes)[17]) {
        u32 r[4];
        std::memcpy(r, bytes, sizeof r);
        set(leaf, r[0], r[1], r[2], r[3]);
    }

  private:
    static void fill(CpuidLeaf& l, u32 a, u32 b, u32 c, u32 d) {
        l.eax = a, l.ebx = b, l.ecx = c, l.edx = d;
    }
    CpuidPolicy& policy_;
};

/// The smallest n with 2^n >= count.
u32 ceil_log2(u32 count) {
    return count <= 1 ? 0 : std::bit_width(count - 1);
}

[[noreturn]] void bad_model(std::string_view model, const std::string& why) {
    throw ConfigError("cpu_model", "CPU model \"" + std::string(model) + "\" " + why);
}

/// Removes what cannot be without something else that is missing.
void apply_dependencies(FeatureSet& set) {
    auto needs = [&](F on, std::initializer_list<F> list) {
        if (set.has(on)) return;
        for (F f : list) set.set(f, false);
    };
    needs(F::kFxsr, {F::kSse, F::kSse2});
    needs(F::kSse, {F::kSse2});
    needs(F::kSse2, {F::kSse3, F::kSsse3, F::kSse41, F::kSse42, F::kAes, F::kPclmul, F::kSha,
                     F::kSse4a, F::kGfni, F::kXsave});
    needs(F::kXsave, {F::kXsaveopt, F::kXsavec, F::kXgetbv1, F::kXsaves, F::kAvx, F::kPku});
    needs(F::kAvx, {F::kAvx2, F::kFma, F::kF16c, F::kVaes, F::kVpclmul});
    needs(F::kApic, {F::kX2apic, F::kTscDeadline, F::kArat});
    needs(F::kLongMode, {F::kLa57, F::kPage1Gb, F::kPcid, F::kLahf64});
    needs(F::kPcid, {F::kInvpcid});
    needs(F::kKvmClock, {F::kPvUnhalt, F::kPvIpi});  // without it there is no KVM signature
}

struct Signature {
    char vendor[13]{};
    bool intel = false;
    bool amd = false;
    u32 eax = 0;
};

/// Family, model and stepping: the host's own for "host", else one known CPU of the vendor, so that
/// a named model is the same everywhere.
Signature choose_signature(std::string_view model) {
    Leaf zero = host_leaf(0);
    Signature s;
    std::memcpy(s.vendor, &zero.r[1], 4);
    std::memcpy(s.vendor + 4, &zero.r[3], 4);
    std::memcpy(s.vendor + 8, &zero.r[2], 4);
    s.intel = std::strcmp(s.vendor, "GenuineIntel") == 0;
    s.amd = std::strcmp(s.vendor, "AuthenticAMD") == 0;
    s.eax = host_leaf(1).r[0] & 0x0fff3fff;
    if (model != "host" && s.intel) s.eax = 0x000806f8;  // family 6, model 8f, stepping 8
    if (model != "host" && s.amd) s.eax = 0x00a10f11;    // family 19, model 11, stepping 1
    return s;
}

// Bits that say of a CPU what kNotVulnerable means (see the top), by vendor.
constexpr F kImmuneIntel[] = {F::kSpecCtrl, F::kArchCapabilities};
constexpr F kImmuneAmd[] = {F::kAmdSsbNo, F::kBtcNo,   F::kAutoIbrs,
                            F::kSrsoNo,   F::kTsaSqNo, F::kTsaL1No};

/// What engine, host and vendor allow.
FeatureSet available_features(const FeatureSet& implemented, const Signature& signature) {
    FeatureSet available = implemented;
    if (implemented.has(F::kNotVulnerable)) {
        for (F f : signature.intel ? std::span<const F>(kImmuneIntel) : kImmuneAmd)
            available.set(f);
    }
    FeatureSet host = host_features();
    for (const FeatureBit& row : feature_bits()) {
        bool foreign = (row.vendor == FeatureBit::kIntelOnly && !signature.intel) ||
                       (row.vendor == FeatureBit::kAmdOnly && !signature.amd);
        if (foreign || (row.needs_host && !host.has(row.feature)))
            available.set(row.feature, false);
    }
    apply_dependencies(available);
    return available;
}

FeatureSet model_features(std::string_view model, const FeatureSet& available) {
    if (model == "host") return available;
    int level = model == "baseline" ? 1 : model == "x86-64-v2" ? 2 : model == "x86-64-v3" ? 3 : 0;
    if (level == 0) {
        bad_model(model, "is not known; use host, baseline, x86-64-v2 or x86-64-v3.");
    }
    FeatureSet set = available;
    auto drop = [&](std::span<const F> list) {
        for (F f : list) set.set(f, false);
    };
    auto require = [&](std::span<const F> list) {
        for (F f : list) {
            if (available.has(f)) continue;
            bad_model(model, "needs " + std::string(feature_name(f)) +
                                 ", which this host or engine does not have; use a lower model.");
        }
    };
    drop(kHostOnly);
    require(kModelV1);
    level >= 2 ? require(kModelV2) : drop(kModelV2);
    level >= 3 ? require(kModelV3) : drop(kModelV3);
    apply_dependencies(set);
    return set;
}

[[noreturn]] void bad_change(const std::string& name, const std::string& why) {
    throw ConfigError("cpu_features", "CPU feature \"" + name + "\" " + why);
}

/// The user's word on single features.
void apply_changes(FeatureSet& set, const FeatureSet& available, const CpuidOptions& options) {
    for (const auto& [name, on] : options.changes) {
        const FeatureBit* row = find_feature(name);
        if (row == nullptr) {
            bad_change(name, "is not known; names are those of /proc/cpuinfo, such as \"avx2\".");
        }
        if (on && !available.has(row->feature)) {
            bad_change(name, "is not to be had: this host or engine does not have it.");
        }
        // Two features may share a bit, and the name stands with one of them.
        for (const FeatureBit& other : feature_bits()) {
            if (other.leaf == row->leaf && other.subleaf == row->subleaf && other.reg == row->reg &&
                other.bit == row->bit) {
                set.set(other.feature, on && available.has(other.feature));
            }
        }
    }
    apply_dependencies(set);
    for (const auto& [name, on] : options.changes) {
        if (on && !set.has(find_feature(name)->feature)) {
            bad_change(name, "needs another one that this machine's CPU does not have.");
        }
    }
}

/// Cache description as leaf 4 and 0x8000001d give it. Sharing: `cpus` logical CPUs.
void cache(Builder& b, u32 leaf, u32 subleaf, u32 type, u32 level, u32 ways, u32 sets, u32 cpus,
           u32 package_cpus) {
    u32 eax = type | level << 5 | 1u << 8 | (bit(ceil_log2(cpus)) - 1) << 14;
    if (leaf == 4) eax |= (bit(ceil_log2(package_cpus)) - 1) << 26;
    b.set(leaf, subleaf, eax, 63 | (ways - 1) << 22, sets - 1, 0);
}

void build_basic(Builder& b, const CpuidPolicy& p, const Signature& s) {
    u32 vendor[3];
    std::memcpy(vendor, s.vendor, 12);
    b.set(0, s.intel ? 0x1f : 0x16, vendor[0], vendor[2], vendor[1]);
    // EBX: CLFLUSH line of 8 quadwords, logical CPUs in the package; find() adds the APIC id.
    b.set(1, s.eax, 8 << 8 | std::min(p.cpus, 255u) << 16, static_cast<u32>(bit(31)),
          1 | (p.cpus > 1 ? static_cast<u32>(bit(28)) : 0));  // hypervisor; FPU, HTT
    if (s.intel) {
        b.set(2, 0x00feff01, 0, 0, 0);  // caches: see leaf 4
        cache(b, 4, 0, 1, 1, 12, 64, 1, p.cpus);
        cache(b, 4, 1, 2, 1, 8, 64, 1, p.cpus);
        cache(b, 4, 2, 3, 2, 16, 2048, 1, p.cpus);
        cache(b, 4, 3, 3, 3, 16, 32768, p.cpus, p.cpus);
        b.set(4, 4, 0, 0, 0, 0);
    }
    if (p.features.has(F::kMonitor)) b.set(5, 64, 64, 3, 0);
    b.set(6, 0, 0, 0, 0);
    b.set(7, 0, 0, 0, 0, 0);
    for (u32 leaf : {0xbu, 0x1fu}) {
        if (leaf == 0x1f && !s.intel) continue;
        b.set(leaf, 0, 0, 1, 1 << 8, 0);                           // one thread per core
        b.set(leaf, 1, ceil_log2(p.cpus), p.cpus, 2 << 8 | 1, 0);  // all cores in one package
        b.set(leaf, 2, 0, 0, 2, 0);
    }
    if (p.features.has(F::kXsave)) {
        bool avx = p.features.has(F::kAvx);
        u32 size = kXsaveLegacyArea + (avx ? kXsaveAvxSize : 0);
        b.set(0xd, 0, avx ? 7 : 3, size, size, 0);
        b.set(0xd, 1, 0, size, 0, 0);
        if (avx) b.set(0xd, 2, kXsaveAvxSize, kXsaveLegacyArea, 0, 0);
    }
    // TSC = crystal * ebx / eax; the crystal is the local APICs' clock of 1 GHz, as Linux expects.
    b.set(0x15, 1'000'000, static_cast<u32>(p.tsc_khz), 1'000'000'000, 0);
    u32 mhz = static_cast<u32>(std::max<u64>(p.tsc_khz / 1000, 1));
    b.set(0x16, mhz, mhz, 1000, 0);
}

void build_hypervisor(Builder& b, const CpuidPolicy& p) {
    if (p.features.has(F::kKvmClock)) {
        b.set(kHypervisorBase, kHypervisorBase + 0x10, 0x4b4d564b, 0x564b4d56, 0x0000004d);
        // CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE
        b.set(kHypervisorBase + 1, static_cast<u32>(bit(0) | bit(1) | bit(3) | bit(24)), 0, 0, 0);
    } else {
        u32 name[3];
        std::memcpy(name, "polyvisor\0\0\0", 12);
        b.set(kHypervisorBase, kHypervisorBase + 0x10, name[0], name[1], name[2]);
    }
    b.set(kHypervisorBase + 0x10, static_cast<u32>(p.tsc_khz), 1'000'000, 0, 0);
}

void build_extended(Builder& b, const CpuidPolicy& p, const Signature& s) {
    u32 vendor[3];
    std::memcpy(vendor, s.vendor, 12);
    b.set(0x80000000, s.amd ? 0x80000021 : 0x80000008, s.amd ? vendor[0] : 0, s.amd ? vendor[2] : 0,
          s.amd ? vendor[1] : 0);
    b.set(0x80000001, s.amd ? s.eax : 0, 0, 0, 0);
    b.text(0x80000002, "polyvisor virtua");
    b.text(0x80000003, "l x86-64 CPU\0\0\0\0");
    b.set(0x80000004, 0, 0, 0, 0);
    if (s.amd) {
        CpuidLeaf& one = b.at(0x80000001);
        one.ecx |= p.cpus > 1 ? 1u << 1 : 0;  // CMP_LEGACY: the HTT count is cores
        one.ecx |= 1u << 22;                  // topology extensions: 0x8000001d and e
        b.set(0x80000005, 0xff40ff40, 0xff40ff40, 32u << 24 | 8 << 16 | 1 << 8 | 64,
              32u << 24 | 8 << 16 | 1 << 8 | 64);
        b.set(0x80000006, 0, 0x64006400, 1024u << 16 | 6 << 12 | 1 << 8 | 64,
              64u << 18 | 8 << 12 | 1 << 8 | 64);
        cache(b, 0x8000001d, 0, 1, 1, 8, 64, 1, p.cpus);
        cache(b, 0x8000001d, 1, 2, 1, 8, 64, 1, p.cpus);
        cache(b, 0x8000001d, 2, 3, 2, 8, 2048, 1, p.cpus);
        cache(b, 0x8000001d, 3, 3, 3, 16, 32768, p.cpus, p.cpus);
        b.set(0x8000001d, 4, 0, 0, 0, 0);
        b.set(0x8000001e, 0, 0, 0, 0);
    } else {
        b.set(0x80000006, 0, 0, 2048u << 16 | 8 << 12 | 64, 0);
    }
    b.set(0x80000007, 0, 0, 0, static_cast<u32>(bit(8)));  // invariant TSC
    u32 linear = p.features.has(F::kLa57) ? 57 : 48;
    u32 cores = s.amd ? (p.cpus - 1) | ceil_log2(p.cpus) << 12 : 0;
    b.set(0x80000008, p.physical_bits | linear << 8, 0, cores, 0);
    if (s.amd) b.set(0x80000021, 0, 0, 0, 0);
}

/// The bits of the features, once all other leaves are there.
void build_features(Builder& b, const CpuidPolicy& p) {
    for (const FeatureBit& row : feature_bits()) {
        if (row.bit == FeatureBit::kNoBit || !p.features.has(row.feature)) continue;
        CpuidLeaf& leaf = b.at(row.leaf, row.subleaf, row.leaf == 7 || row.leaf == 13);
        u32* registers[] = {&leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx};
        *registers[row.reg] |= static_cast<u32>(bit(row.bit));
        if (row.leaf != 7) continue;
        CpuidLeaf& first = b.at(7, 0, true);  // EAX: the last subleaf
        first.eax = std::max(first.eax, row.subleaf);
    }
}

/// AMD has the old bits of leaf 1's EDX twice.
void repeat_features(Builder& b) {
    u32 old = b.at(1).edx & 0x0183f3ff;
    b.at(0x80000001).edx |= old;
}

}  // namespace

CpuidPolicy make_cpuid_policy(std::string_view model, const FeatureSet& implemented, u32 cpus,
                              u64 tsc_khz, const CpuidOptions& options) {
    if (cpus == 0) throw ConfigError("cpus", "a machine needs at least one CPU.");
    Signature signature = choose_signature(model);
    FeatureSet available = available_features(implemented, signature);
    CpuidPolicy p;
    p.features = model_features(model, available);
    apply_changes(p.features, available, options);
    p.tsc_khz = tsc_khz;
    p.cpus = cpus;
    p.physical_bits = std::min(p.physical_bits, options.physical_bits);
    p.intel = signature.intel;
    if (p.features.has(F::kArchCapabilities)) {
        p.arch_capabilities =
            implemented.has(F::kNotVulnerable) ? kArchCapabilities : options.arch_capabilities;
    }

    Builder b(p);
    build_basic(b, p, signature);
    build_hypervisor(b, p);
    build_extended(b, p, signature);
    build_features(b, p);
    if (signature.amd) repeat_features(b);
    std::sort(p.leaves.begin(), p.leaves.end(), [](const CpuidLeaf& a, const CpuidLeaf& c) {
        return a.leaf != c.leaf ? a.leaf < c.leaf : a.subleaf < c.subleaf;
    });
    return p;
}

CpuidLeaf CpuidPolicy::find(u32 leaf, u32 subleaf, u32 apic_id) const {
    CpuidLeaf result{leaf, subleaf, false};
    auto first = std::lower_bound(leaves.begin(), leaves.end(), leaf,
                                  [](const CpuidLeaf& l, u32 value) { return l.leaf < value; });
    for (; first != leaves.end() && first->leaf == leaf; ++first) {
        if (first->has_subleaf && first->subleaf != subleaf) continue;
        result = *first;
        break;
    }
    switch (leaf) {
        case 1:
            result.ebx |= (apic_id & 0xff) << 24;
            break;
        case 0xb:
        case 0x1f:
            if (first == leaves.end() || first->leaf != leaf) {
                result.ecx = subleaf & 0xff;
                if (leaves.empty() || leaves.front().eax < leaf) break;
            }
            result.edx = apic_id;
            break;
        case 0x8000001e:
            if (first != leaves.end() && first->leaf == leaf) {
                result.eax = apic_id;
                result.ebx = apic_id & 0xff;
            }
            break;
        default:
            break;
    }
    return result;
}

}  // namespace polyvisor
