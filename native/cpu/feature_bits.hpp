// Where CPUID shows each feature.
#pragma once

#include <span>
#include <string_view>

#include "cpu/features.hpp"

namespace polyvisor {

struct FeatureBit {
    enum Register : u8 { kEax, kEbx, kEcx, kEdx };
    static constexpr u8 kNoBit = 255;

    Feature feature;
    u32 leaf;
    u32 subleaf;
    Register reg;
    u8 bit;
    bool needs_host;  ///< its instructions run as the host's own
    std::string_view name;
};

/// One row for every feature but kBase.
std::span<const FeatureBit> feature_bits();

}  // namespace polyvisor
