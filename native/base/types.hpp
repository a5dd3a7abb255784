// The short names every folder uses, and the few bit helpers that <bit> lacks.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace polyvisor {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
__extension__ using u128 = unsigned __int128;
__extension__ using s128 = __int128;

inline constexpr u64 kPageSize = 4096;
inline constexpr u64 kPageMask = kPageSize - 1;
inline constexpr unsigned kPageShift = 12;

/// Bit number n as a mask.
constexpr u64 bit(unsigned n) {
    return u64{1} << n;
}

/// Bits lo..hi (both inclusive) of value, shifted down.
constexpr u64 bits(u64 value, unsigned hi, unsigned lo) {
    return (value >> lo) & (~u64{0} >> (63 - (hi - lo)));
}

constexpr u64 align_down(u64 value, u64 alignment) {
    return value & ~(alignment - 1);
}
constexpr u64 align_up(u64 value, u64 alignment) {
    return (value + alignment - 1) & ~(alignment - 1);
}

/// Sign-extends the low `width` bits of value.
constexpr s64 sign_extend(u64 value, unsigned width) {
    return static_cast<s64>(value << (64 - width)) >> (64 - width);
}

#define PV_LIKELY(x) __builtin_expect(!!(x), 1)
#define PV_UNLIKELY(x) __builtin_expect(!!(x), 0)

}  // namespace polyvisor
