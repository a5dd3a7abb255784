// Guest debugging as both engines understand it: which GuestDebug is possible, and how its
// breakpoints look in the debug registers (SDM 3B, 17.2).
#pragma once

#include "cpu/engine.hpp"

namespace polyvisor {

enum Dr6 : u32 {
    kDr6Hits = 15,       ///< B0-B3
    kDr6Step = 1 << 14,  ///< BS
};
enum Dr7 : u32 { kDr7Enables = 0xff, kDr7AlwaysOne = 0x400 };

/// Debug registers 0-3 there are.
constexpr unsigned kDebugRegisters = 4;

/// Throws ConfigError naming what is wrong: too many breakpoints, a size that is none of 1, 2, 4
/// and 8 (1 for kExecute), an address that is not aligned to it.
void validate(const GuestDebug& debug);

/// The bits of DR7 that enable `breakpoint` in register `n`, globally.
u32 dr7_bits(unsigned n, const GuestDebug::Breakpoint& breakpoint);

}  // namespace polyvisor
