// The CPUID policy: models, dependence on the host, topology, the leaves by which Linux skips
// calibration, and the bits that spare it mitigations.
#include <cpuid.h>

#include <cstring>
#include <set>
#include <tuple>

#include "base/error.hpp"
#include "check.hpp"
#include "cpu/cpuid.hpp"
#include "cpu/feature_bits.hpp"

using namespace polyvisor;

namespace {

// Of an engine in software: nothing of what real hardware needs to defend itself.
FeatureSet all() {
    FeatureSet set;
    for (unsigned n = 0; n < static_cast<unsigned>(Feature::kSpecCtrl); ++n) {
        set.set(static_cast<Feature>(n));
    }
    for (Feature f :
         {Feature::kXsaveErrorPointers, Feature::kLfenceSerializing, Feature::kNullClearsBase}) {
        set.set(f);
    }
    return set;
}

FeatureSet all_of_hardware() {
    FeatureSet set;
    for (unsigned n = 0; n < static_cast<unsigned>(Feature::kCount); ++n) {
        set.set(static_cast<Feature>(n));
    }
    return set.set(Feature::kNotVulnerable, false);
}

bool shown(const CpuidPolicy& p, const FeatureBit& row) {
    CpuidLeaf l = p.find(row.leaf, row.subleaf, 0);
    u32 r[] = {l.eax, l.ebx, l.ecx, l.edx};
    return r[row.reg] >> row.bit & 1;
}

// CPUID shows a feature exactly when the policy has it, and never what the host lacks.
void bits_follow_features() {
    FeatureSet host = host_features();
    for (const FeatureSet& engine : {all(), all_of_hardware()}) {
        for (const char* model : {"host", "baseline", "x86-64-v2"}) {
            CpuidPolicy p = make_cpuid_policy(model, engine, 2, 1'000'000);
            for (const FeatureBit& row : feature_bits()) {
                if (row.bit == FeatureBit::kNoBit || row.feature == Feature::k3dnowPrefetch) {
                    continue;
                }
                CHECK_EQ(shown(p, row), p.features.has(row.feature));
                if (row.needs_host && !host.has(row.feature)) CHECK(!p.features.has(row.feature));
            }
        }
    }
    // Nothing implemented: nothing shown but what every x86-64 CPU without features has.
    CpuidPolicy none = make_cpuid_policy("host", FeatureSet{}, 1, 1'000'000);
    for (const FeatureBit& row : feature_bits()) {
        if (row.bit != FeatureBit::kNoBit) CHECK(!shown(none, row));
    }
    CHECK_EQ(none.find(1, 0, 0).edx, 1u);  // FPU
    // Each place is named once, but for the two names of PREFETCHW.
    std::set<std::tuple<u32, u32, int, int>> places;
    for (const FeatureBit& row : feature_bits()) {
        if (row.bit == FeatureBit::kNoBit || row.feature == Feature::k3dnowPrefetch) continue;
        CHECK(places.insert({row.leaf, row.subleaf, row.reg, row.bit}).second);
    }
}

void host_agrees() {
    FeatureSet host = host_features();
    CHECK(host.has(Feature::kSse2) && host.has(Feature::kLongMode) && host.has(Feature::kCmov));
    CHECK_EQ(host.has(Feature::kAvx2), static_cast<bool>(__builtin_cpu_supports("avx2")));
    CHECK_EQ(host.has(Feature::kPopcnt), static_cast<bool>(__builtin_cpu_supports("popcnt")));
    CHECK_EQ(host.has(Feature::kBmi2), static_cast<bool>(__builtin_cpu_supports("bmi2")));
    CHECK(feature_name(Feature::kSse42) == "sse4_2");
}

void models() {
    FeatureSet set = all();
    CpuidPolicy v1 = make_cpuid_policy("baseline", set, 1, 1'000'000);
    CHECK(v1.features.has(Feature::kSse2) && !v1.features.has(Feature::kPopcnt));
    CHECK(v1.features.has(Feature::kX2apic) && v1.features.has(Feature::kSmep));
    CHECK(!v1.features.has(Feature::kXsave) && !v1.features.has(Feature::kAes));
    CHECK_EQ(v1.find(0xd, 0, 0).eax, 0u);
    CpuidPolicy v2 = make_cpuid_policy("x86-64-v2", set, 1, 1'000'000);
    CHECK(v2.features.has(Feature::kPopcnt) && !v2.features.has(Feature::kAvx));
    CHECK_THROWS(make_cpuid_policy("pentium", set, 1, 1'000'000), ConfigError);
    CHECK_THROWS(make_cpuid_policy("host", set, 0, 1'000'000), ConfigError);
    set.set(Feature::kPopcnt, false);
    try {
        make_cpuid_policy("x86-64-v2", set, 1, 1'000'000);
        CHECK(false);
    } catch (const ConfigError& error) {
        CHECK_EQ(error.field, std::string("cpu_model"));
        CHECK(std::string(error.what()).find("popcnt") != std::string::npos);
    }
    // A feature goes with what it depends on.
    FeatureSet no_xsave = all();
    no_xsave.set(Feature::kXsave, false);
    CpuidPolicy p = make_cpuid_policy("host", no_xsave, 1, 1'000'000);
    CHECK(!p.features.has(Feature::kAvx) && !p.features.has(Feature::kAvx2));
}

void topology() {
    for (u32 cpus : {1u, 2u, 3u, 8u, 64u}) {
        CpuidPolicy p = make_cpuid_policy("host", all(), cpus, 2'500'000);
        for (u32 id = 0; id < cpus; ++id) {
            CpuidLeaf one = p.find(1, 0, id);
            CHECK_EQ(one.ebx >> 24, id);
            CHECK_EQ((one.ebx >> 16) & 0xff, cpus);
            CHECK_EQ((one.edx >> 28) & 1, u32{cpus > 1});
            CpuidLeaf smt = p.find(0xb, 0, id), core = p.find(0xb, 1, id), end = p.find(0xb, 2, id);
            CHECK_EQ(smt.edx, id);
            CHECK_EQ(smt.eax, 0u);
            CHECK_EQ(smt.ecx, 0x100u);
            CHECK_EQ(core.edx, id);
            CHECK_EQ(core.ebx, cpus);
            CHECK_EQ(core.ecx, 0x201u);
            CHECK(id >> core.eax == 0);  // one package
            CHECK_EQ(end.ebx, 0u);
        }
    }
}

void clocks_and_hypervisor() {
    CpuidPolicy p = make_cpuid_policy("host", all(), 1, 2'500'000);
    CHECK(p.find(1, 0, 0).ecx >> 31);
    CpuidLeaf ratio = p.find(0x15, 0, 0);
    CHECK_EQ(u64{ratio.ecx} * ratio.ebx / ratio.eax, u64{2'500'000'000});
    CHECK_EQ(p.find(0x40000010, 0, 0).eax, 2'500'000u);
    CHECK(p.find(0x80000007, 0, 0).edx & 0x100);
    CpuidLeaf base = p.find(0x40000000, 0, 0);
    char name[13]{};
    std::memcpy(name, &base.ebx, 12);
    CHECK_EQ(std::string(name), std::string("KVMKVMKVM"));
    CHECK_EQ(p.find(0x40000001, 0, 0).eax, 0x0100000bu);
    // Without the clock's MSRs there must be no KVM signature: Linux would use them.
    FeatureSet plain = all();
    plain.set(Feature::kKvmClock, false);
    base = make_cpuid_policy("host", plain, 1, 1'000'000).find(0x40000000, 0, 0);
    CHECK(base.ebx != 0x4b4d564b);
}

void not_vulnerable() {
    CpuidPolicy p = make_cpuid_policy("host", all(), 1, 1'000'000);
    FeatureSet without = all();
    without.set(Feature::kNotVulnerable, false);
    CpuidPolicy q = make_cpuid_policy("host", without, 1, 1'000'000);
    if (p.intel) {
        CHECK(p.find(7, 0, 0).edx & (1u << 29));
        CHECK(!(q.find(7, 0, 0).edx & (1u << 29)));
    } else if (p.find(0x80000000, 0, 0).eax >= 0x80000021) {
        CHECK_EQ(p.find(0x80000021, 0, 0).eax & 0x20000100, 0x20000100u);  // AutoIBRS, SRSO_NO
        CHECK_EQ(p.find(0x80000008, 0, 0).ebx & 0x24000000, 0x24000000u);  // SSB_NO, BTC_NO
        CHECK_EQ(p.find(0x80000021, 0, 0).ecx & 6, 6u);                    // TSA_*_NO
        CHECK_EQ(q.find(0x80000021, 0, 0).eax & 0x20000100, 0u);
    }
}

// On hardware a guest is told what the hardware is immune to, and given what it defends itself
// with; of the other vendor's bits it gets none.
void controls_of_hardware() {
    CpuidOptions options;
    options.arch_capabilities = 0x1234;
    CpuidPolicy p = make_cpuid_policy("host", all_of_hardware(), 1, 1'000'000, options);
    CHECK(p.features.has(Feature::kArchCapabilities));
    CHECK_EQ(p.arch_capabilities, 0x1234u);
    CHECK_EQ(p.features.has(Feature::kSpecCtrl), p.intel);
    CHECK_EQ(p.features.has(Feature::kAmdIbrs), !p.intel);
    CHECK_EQ(p.find(7, 0, 0).eax, p.intel ? 2u : 0u);  // the last subleaf
    CHECK_EQ(p.find(7, 2, 0).edx != 0, p.intel);
    for (const char* model : {"host", "baseline"}) {
        p = make_cpuid_policy(model, FeatureSet(all()).set(Feature::kNotVulnerable, false), 1,
                              1'000'000, options);
        CHECK_EQ(p.arch_capabilities, 0u);
        CHECK(!p.features.has(Feature::kArchCapabilities));
        CHECK_EQ(p.find(0x80000008, 0, 0).ebx & ~4u, 0u);  // the x87 error pointers alone
    }
    // The software's own immunities are its own, whatever the hardware has.
    p = make_cpuid_policy("host", all(), 1, 1'000'000, options);
    CHECK_EQ(p.arch_capabilities, p.intel ? kArchCapabilities : 0);
}

std::string refusal(const char* model, const FeatureSet& engine,
                    std::vector<std::pair<std::string, bool>> changes) {
    CpuidOptions options;
    options.changes = std::move(changes);
    try {
        make_cpuid_policy(model, engine, 1, 1'000'000, options);
    } catch (const ConfigError& error) {
        CHECK_EQ(error.field, std::string("cpu_features"));
        return error.what();
    }
    return "";
}

void changes() {
    CpuidOptions options;
    options.changes = {{"sse4_2", false}, {"3dnowprefetch", false}};
    CpuidPolicy p = make_cpuid_policy("host", all(), 1, 1'000'000, options);
    CHECK(!p.features.has(Feature::kSse42) && p.features.has(Feature::kSse41));
    CHECK(!p.features.has(Feature::kPrefetchw) && !p.features.has(Feature::k3dnowPrefetch));
    CHECK_EQ(p.find(1, 0, 0).ecx >> 20 & 1, 0u);
    // What depends on it goes with it.
    options.changes = {{"xsave", false}};
    p = make_cpuid_policy("host", all(), 1, 1'000'000, options);
    CHECK(!p.features.has(Feature::kAvx) && !p.features.has(Feature::kXsaveopt));
    CHECK_EQ(p.find(0xd, 0, 0).eax, 0u);
    // One may be added to a model that has less than the host.
    options.changes = {{"popcnt", true}};
    p = make_cpuid_policy("baseline", all(), 1, 1'000'000, options);
    CHECK(p.features.has(Feature::kPopcnt) && !p.features.has(Feature::kSse42));

    CHECK(refusal("host", all(), {{"warp", true}}).find("\"warp\"") != std::string::npos);
    CHECK(refusal("host", all(), {{"", false}}) != "");
    FeatureSet engine = all();
    engine.set(Feature::kSse42, false);
    CHECK(refusal("baseline", engine, {{"sse4_2", true}}).find("sse4_2") != std::string::npos);
    CHECK(refusal("baseline", all(), {{"avx", true}}) != "");  // without XSAVE
}

void physical_bits() {
    CpuidOptions options;
    options.physical_bits = 39;
    CpuidPolicy p = make_cpuid_policy("host", all(), 1, 1'000'000, options);
    CHECK_EQ(p.physical_bits, 39);
    CHECK_EQ(p.find(0x80000008, 0, 0).eax & 0xff, 39u);
    options.physical_bits = 52;  // more than a machine's devices are placed for
    p = make_cpuid_policy("host", all(), 1, 1'000'000, options);
    CHECK_EQ(p.physical_bits, 40);
}

void unknown_leaves() {
    CpuidPolicy p = make_cpuid_policy("host", all(), 1, 1'000'000);
    CpuidLeaf l = p.find(0x12345678, 0, 7);
    CHECK(l.eax == 0 && l.ebx == 0 && l.ecx == 0 && l.edx == 0);
    l = p.find(7, 5, 0);
    CHECK(l.eax == 0 && l.ebx == 0);
    CHECK_EQ(p.find(0x80000008, 0, 0).eax & 0xff, u32{p.physical_bits});
}

}  // namespace

int main() {
    bits_follow_features();
    host_agrees();
    models();
    topology();
    clocks_and_hypervisor();
    not_vulnerable();
    controls_of_hardware();
    changes();
    physical_bits();
    unknown_leaves();
    return pvtest::finish("test_cpuid");
}
