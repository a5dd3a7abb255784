// What KVM offers a guest's CPU, as the CPUID policy takes it, and the policy as KVM takes it.
//
// KVM_GET_SUPPORTED_CPUID is what the host's CPU and KVM can do together, and most of it is taken
// as it is, by the same table of bits that the policy is made with. What it does not tell, or not
// as is needed here, is asked and decided in make_offer().
#include <algorithm>
#include <cstdio>

#include "base/error.hpp"
#include "cpu/feature_bits.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/system.hpp"

namespace polyvisor::kvm {

namespace {

using F = Feature;

// MSRs of the KVM clock: the newer pair, which the hypervisor leaves offer.
constexpr u32 kClockSource2 = 1u << 3;
constexpr u32 kPhysicalBitsLeaf = 0x80000008;
constexpr u32 kArchCapabilitiesMsr = 0x10a;

bool offered(const System& system, const FeatureBit& row) {
    return row.bit != FeatureBit::kNoBit &&
           (system.supported(row.leaf, row.subleaf, row.reg) >> row.bit & 1);
}

}  // namespace

EngineOffer make_offer(const System& system) {
    EngineOffer offer;
    for (const FeatureBit& row : feature_bits()) {
        if (offered(system, row)) offer.features.set(row.feature);
    }
    // The list has neither, as they depend on who plays the local APIC, but says what is needed to
    // know: KVM's own plays the deadline timer, and its timer never stops.
    offer.features.set(F::kTscDeadline, system.check(KVM_CAP_TSC_DEADLINE_TIMER) > 0);
    offer.features.set(F::kArat);
    offer.features.set(F::kHypercall);
    offer.features.set(F::kKvmClock, system.supported(0x40000001, 0, 0) & kClockSource2);
    for (F f : {F::kPvUnhalt, F::kPvIpi}) {
        offer.irqchip_features.set(f, offer.features.has(f));
        offer.features.set(f, false);
    }
    u32 physical_bits = system.supported(kPhysicalBitsLeaf, 0, 0) & 0xff;
    if (physical_bits != 0) offer.physical_bits = static_cast<u8>(std::min(physical_bits, 52u));
    if (offer.features.has(F::kArchCapabilities)) {
        offer.arch_capabilities = system.feature_msr(kArchCapabilitiesMsr);
    }
    offer.native_tsc_khz = system.tsc_khz();
    offer.tsc_scaling = system.check(KVM_CAP_TSC_CONTROL) > 0;
    offer.nested_paging = true;
    offer.irqchip = system.check(KVM_CAP_IRQCHIP) > 0 && system.check(KVM_CAP_PIT2) > 0 &&
                    system.check(KVM_CAP_SPLIT_IRQCHIP) > 0;

    // Not part of the State that both engines share, or not as KVM has it.
    offer.features.set(F::kPku, false);
    offer.features.set(F::kMonitor, false);
    u32 xcr0 = system.supported(0xd, 0, 0);
    if (offer.features.has(F::kXsave) && ((xcr0 & 3) != 3 || !system.xsetbv_works())) {
        offer.features.set(F::kXsave, false);
    }
    if ((xcr0 & 6) != 6) offer.features.set(F::kAvx, false);
    return offer;
}

std::vector<kvm_cpuid_entry2> make_cpuid(const CpuidPolicy& policy, const System& system,
                                         u32 apic_id) {
    std::vector<kvm_cpuid_entry2> entries;
    for (const CpuidLeaf& place : policy.leaves) {
        CpuidLeaf leaf = policy.find(place.leaf, place.subleaf, apic_id);
        kvm_cpuid_entry2 entry{};
        entry.function = leaf.leaf;
        entry.index = place.has_subleaf ? place.subleaf : 0;
        entry.flags = place.has_subleaf ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
        entry.eax = leaf.eax;
        entry.ebx = leaf.ebx;
        entry.ecx = leaf.ecx;
        entry.edx = leaf.edx;
        entries.push_back(entry);
    }
    if (policy.features.has(F::kNotVulnerable)) {
        throw ConfigError("cpu_model",
                          "the machine's CPU claims to be immune to speculation attacks, as only "
                          "engine soft can make it; make the machine with portable=True to move it "
                          "between engines");
    }
    for (const FeatureBit& row : feature_bits()) {
        if (row.bit == FeatureBit::kNoBit || !policy.features.has(row.feature)) continue;
        if (offered(system, row) || row.feature == F::kTscDeadline || row.feature == F::kArat) {
            continue;
        }
        char place[32];
        std::snprintf(place, sizeof place, "leaf 0x%x", row.leaf);
        throw ConfigError("cpu_model", "this host's KVM does not offer " + std::string(row.name) +
                                           " (CPUID " + place +
                                           "), which the machine's CPU has; take a lower "
                                           "cpu_model, or engine soft");
    }
    return entries;
}

}  // namespace polyvisor::kvm
