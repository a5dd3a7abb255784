// What KVM offers against what its CPUID says, and every policy against the kernel itself.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>

#include "base/error.hpp"
#include "check.hpp"
#include "cpu/feature_bits.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/system.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;

namespace {

constexpr const char* kModels[] = {"host", "baseline", "x86-64-v2", "x86-64-v3"};

CpuidPolicy policy_of(const char* model, const EngineOffer& offer, u32 cpus = 2) {
    CpuidOptions options;
    options.physical_bits = offer.physical_bits;
    options.arch_capabilities = offer.arch_capabilities;
    return make_cpuid_policy(model, offer.features | offer.irqchip_features, cpus,
                             offer.native_tsc_khz, options);
}

// Each feature is offered exactly when KVM's CPUID has it, but for those that have a reason.
void offer_is_kvms(const System& system, const EngineOffer& offer) {
    for (const FeatureBit& row : feature_bits()) {
        if (row.bit == FeatureBit::kNoBit) continue;
        bool supported = system.supported(row.leaf, row.subleaf, row.reg) >> row.bit & 1;
        bool offered = offer.features.has(row.feature) || offer.irqchip_features.has(row.feature);
        switch (row.feature) {
            case Feature::kTscDeadline:
                CHECK_EQ(offered, system.check(KVM_CAP_TSC_DEADLINE_TIMER) != 0);
                break;
            case Feature::kArat:
                CHECK(offered);
                break;
            case Feature::kPku:
            case Feature::kMonitor:
                CHECK(!offered);
                break;
            case Feature::kXsave:
            case Feature::kAvx:
                if (offered) CHECK(supported);
                break;
            default:
                if (offered != supported) std::fprintf(stderr, "%s\n", row.name.data());
                CHECK_EQ(offered, supported);
        }
    }
    CHECK(offer.features.has(Feature::kLongMode) && offer.features.has(Feature::kSse2));
    CHECK(!offer.features.has(Feature::kNotVulnerable));
    CHECK(offer.native_tsc_khz > 100'000);
    CHECK(offer.physical_bits >= 36 && offer.physical_bits <= 52);
    CHECK(offer.irqchip);
    CHECK(!offer.features.has(Feature::kPvIpi));  // it needs KVM's own local APIC
}

/// Bits that KVM sets itself as the guest runs: APIC enabled, OSXSAVE, OSPKE, XSAVE's sizes.
void hide_runtime_bits(kvm_cpuid_entry2& entry) {
    if (entry.function == 1) entry.ecx &= ~(1u << 27), entry.edx &= ~(1u << 9);
    if (entry.function == 7 && entry.index == 0) entry.ecx &= ~(1u << 4);
    if (entry.function == 0xd && entry.index <= 1) entry.ebx = 0;
}

/// What the kernel has after KVM_SET_CPUID2; empty, with an errno printed, when it refuses.
std::vector<kvm_cpuid_entry2> set_and_get(int vcpu, const std::vector<kvm_cpuid_entry2>& entries) {
    WithEntries<kvm_cpuid2> list(entries.size());
    list->nent = static_cast<u32>(entries.size());
    std::copy(entries.begin(), entries.end(), list->entries);
    int result = try_ioctl(vcpu, KVM_SET_CPUID2, list.head());
    if (result != 0) {
        std::fprintf(stderr, "KVM_SET_CPUID2: %s\n", std::strerror(-result));
        return {};
    }
    WithEntries<kvm_cpuid2> back(256);
    back->nent = 256;
    CHECK_EQ(try_ioctl(vcpu, KVM_GET_CPUID2, back.head()), 0);
    // Some kernels (6.1) do not say how many they gave.
    if (back->nent == 256) back->nent = static_cast<u32>(entries.size());
    return {back->entries, back->entries + back->nent};
}

// There are KVMs whose guests run user code on the bare CPU, where CPUID cannot be intercepted.
// They show a guest the host's features whatever it is given.
bool honest(const System& system) {
    OwnedFd vm = system.create_vm();
    OwnedFd vcpu(call_ioctl(vm.get(), KVM_CREATE_VCPU, 0L));
    auto back = set_and_get(vcpu.get(), {{0, 0, 0, 1, 0, 0, 0}, {1, 0, 0, 0x600, 0, 0, 0x78bf9ff}});
    return back.size() == 2 && back[1].ecx == 0;
}

void kernel_takes(const System& system, const CpuidPolicy& policy, u32 id, bool compare) {
    OwnedFd vm = system.create_vm();
    OwnedFd vcpu(call_ioctl(vm.get(), KVM_CREATE_VCPU, static_cast<unsigned long>(id)));
    std::vector<kvm_cpuid_entry2> entries = make_cpuid(policy, system, id);
    for (const kvm_cpuid_entry2& entry : entries) {
        CpuidLeaf leaf = policy.find(entry.function, entry.index, id);
        CHECK_EQ(entry.eax, leaf.eax);
        CHECK_EQ(entry.ebx, leaf.ebx);
        CHECK_EQ(entry.ecx, leaf.ecx);
        CHECK_EQ(entry.edx, leaf.edx);
    }
    std::vector<kvm_cpuid_entry2> back = set_and_get(vcpu.get(), entries);
    CHECK(!back.empty());
    if (!compare) return;
    CHECK_EQ(back.size(), entries.size());
    for (std::size_t n = 0; n < std::min(back.size(), entries.size()); ++n) {
        hide_runtime_bits(entries[n]);
        hide_runtime_bits(back[n]);
        CHECK(std::memcmp(&entries[n], &back[n], sizeof back[n]) == 0);
    }
    if (!policy.features.has(Feature::kArchCapabilities)) return;
    WithEntries<kvm_msrs> msrs(1);
    msrs->nmsrs = 1;
    msrs->entries[0].index = 0x10a;
    msrs->entries[0].data = policy.arch_capabilities;
    CHECK_EQ(try_ioctl(vcpu.get(), KVM_SET_MSRS, msrs.head()), 1);
}

// Every model that this host can give, for each of several CPUs.
void models(const System& system, const EngineOffer& offer) {
    bool compare = honest(system);
    if (!compare) std::puts("this host's KVM does not show guests the CPUID that they are given");
    unsigned given = 0;
    for (const char* model : kModels) {
        CpuidPolicy policy;
        try {
            policy = policy_of(model, offer, 3);
        } catch (const ConfigError& error) {
            CHECK_EQ(error.field, std::string("cpu_model"));
            CHECK(std::string(model).starts_with("x86-64-v"));
            std::printf("%s\n", error.what());
            continue;
        }
        ++given;
        for (u32 id : {0u, 2u}) kernel_takes(system, policy, id, compare);
    }
    CHECK(given >= 2);
}

/// The first feature with a bit that this KVM does not have.
const FeatureBit* lacking(const System& system) {
    for (const FeatureBit& row : feature_bits()) {
        if (row.bit == FeatureBit::kNoBit || row.vendor != FeatureBit::kAnyVendor) continue;
        if (row.feature == Feature::kTscDeadline || row.feature == Feature::kArat) continue;
        if (!(system.supported(row.leaf, row.subleaf, row.reg) >> row.bit & 1)) return &row;
    }
    return nullptr;
}

void what_the_host_lacks(const System& system, const EngineOffer& offer) {
    if (const FeatureBit* row = lacking(system)) {
        CpuidPolicy policy = policy_of("host", offer);
        policy.features.set(row->feature);
        try {
            make_cpuid(policy, system, 0);
            CHECK(false);
        } catch (const ConfigError& error) {
            CHECK_EQ(error.field, std::string("cpu_model"));
            CHECK(std::string(error.what()).find(row->name) != std::string::npos);
            CHECK(std::string(error.what()).find("leaf 0x") != std::string::npos);
        }
    }
    // No guest on real hardware may believe that it is immune.
    CpuidPolicy immune = policy_of("host", offer);
    immune.features.set(Feature::kNotVulnerable);
    CHECK_THROWS(make_cpuid(immune, system, 0), ConfigError);
}

}  // namespace

int main() {
    if (::access("/dev/kvm", R_OK | W_OK) != 0) {
        std::puts("no /dev/kvm that this user can open");
        return 77;
    }
    System system;
    EngineOffer offer = make_offer(system);
    offer_is_kvms(system, offer);
    models(system, offer);
    what_the_host_lacks(system, offer);
    return pvtest::finish("test_kvm_cpuid");
}
