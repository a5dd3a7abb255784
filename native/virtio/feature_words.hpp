// 64-bit registers that a driver sees 32 bits at a time, in both transports.
#pragma once

#include "base/types.hpp"

namespace polyvisor::virtio {

/// 32 bits of `value`: word 0 or 1; there are no others.
constexpr u32 word(u64 value, u32 select) {
    return select < 2 ? static_cast<u32>(value >> (32 * select)) : 0;
}

constexpr u64 with_word(u64 value, u32 select, u32 bits) {
    const u64 mask = u64{0xffffffff} << (32 * select);
    return (value & ~mask) | static_cast<u64>(bits) << (32 * select);
}

}  // namespace polyvisor::virtio
