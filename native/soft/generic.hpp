// Handlers that run any Operation, and the few that go before one.
#pragma once

#include "soft/uop.hpp"

namespace polyvisor::soft {

// disp: OpInsn*. By what the memory operand needs:
const Uop* run_plain(const Uop* u, VcpuFrame* f);    ///< none
const Uop* run_mem64(const Uop* u, VcpuFrame* f);    ///< 64-bit address arithmetic
const Uop* run_mem_any(const Uop* u, VcpuFrame* f);  ///< any address size
/// 64-bit mode and address arithmetic, and #GP unless the operand is aligned to `size` bytes.
const Uop* run_mem64_aligned(const Uop* u, VcpuFrame* f);
/// Rows with kFpExcept while the guest's MXCSR unmasks something: any memory operand, or none.
const Uop* run_simd_checked(const Uop* u, VcpuFrame* f);
// The same for rows with kEndsBlock: RIP is set first, and the block is left.
const Uop* run_ending(const Uop* u, VcpuFrame* f);

/// Raises exception `cc`, with error code `imm` when `size` is not 0.
const Uop* raise_uop(const Uop* u, VcpuFrame* f);
/// #MF when an unmasked x87 exception is pending (disp: OpInsn* of the instruction that follows).
const Uop* check_mf(const Uop* u, VcpuFrame* f);
/// #GP unless the memory operand is aligned to `size` bytes (disp: OpInsn*).
const Uop* check_aligned(const Uop* u, VcpuFrame* f);
/// The block's end without a branch: goes on at disp through edge 0.
const Uop* fall_through(const Uop* u, VcpuFrame* f);

/// Effective address of the instruction's memory operand.
u64 effective_address(const VcpuFrame& f, const Insn& i);

}  // namespace polyvisor::soft
