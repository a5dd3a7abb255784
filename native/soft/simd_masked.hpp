// Stores under a mask, as SSE's and MMX's MASKMOV share them with AVX.
#pragma once

#include <algorithm>

#include "soft/simd.hpp"

namespace polyvisor::soft {

/// An effective address `offset` bytes further, wrapped to the address size.
inline u64 masked_address(const Insn& i, u64 ea, u64 offset) {
    u64 address = ea + offset;
    return i.addrsize == 8   ? address
           : i.addrsize == 4 ? static_cast<u32>(address)
                             : static_cast<u16>(address);
}

/// MASKMOVQ, MASKMOVDQU: stores the bytes of `data` whose byte in `mask` has its sign bit set, at
/// rDI.
bool store_masked_bytes(VcpuFrame& f, const Insn& i, const u8* data, const u8* mask,
                        unsigned bytes);

}  // namespace polyvisor::soft
