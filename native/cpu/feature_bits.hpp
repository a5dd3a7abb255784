// Where CPUID shows each feature.
#pragma once

#include <span>
#include <string_view>

#include "cpu/features.hpp"

namespace polyvisor {

struct FeatureBit {
    enum Register : u8 { kEax, kEbx, kEcx, kEdx };
    static constexpr u8 kNoBit = 255;
    /// Whose CPUs show it: KVM offers some of the other vendor's bits too, as a convenience.
    enum Vendor : u8 { kAnyVendor, kIntelOnly, kAmdOnly };

    Feature feature;
    u32 leaf;
    u32 subleaf;
    Register reg;
    u8 bit;
    bool needs_host;  ///< its instructions run as the host's own
    std::string_view name;
    Vendor vendor = kAnyVendor;
};

/// KVM's paravirtual features, below its signature.
inline constexpr u32 kKvmFeatureLeaf = 0x40000001;

/// One row for every feature but kBase.
std::span<const FeatureBit> feature_bits();
/// The row of that name; nullptr when no feature has it.
const FeatureBit* find_feature(std::string_view name);

}  // namespace polyvisor
