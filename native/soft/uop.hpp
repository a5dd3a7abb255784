// Blocks of pre-decoded instructions, and how the interpreter runs them.
//
// A Block is straight-line guest code: up to kMaxBlock instructions that start in one page, made
// for one mode at one IP. Each instruction is a Uop (two fused ones may share one), a handler plus
// its operands. A handler does its work and tail-calls the next uop's handler, so dispatch is one
// indirect jump per instruction with its own place in the branch predictor. The last uop of a block
// leaves it through leave_to() (soft/leave.hpp), which goes straight on in a linked block when it
// can.
//
// Built without optimisation, or with a sanitizer, compilers do not promise tail calls; then
// handlers return the next uop and a loop calls it. PV_NEXT hides the difference.
#pragma once

#include <vector>

#include "soft/ops.hpp"

namespace polyvisor::soft {

#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    !defined(PV_NO_TAIL_CALLS)
#define PV_TAIL_CALLS 1
#else
#define PV_TAIL_CALLS 0
#endif

struct Uop;
/// Returns the next uop to run; nullptr when the block was left and the dispatcher is to look
/// (always so with tail calls).
using Handler = const Uop* (*)(const Uop* u, VcpuFrame* f);

/// A generic operation's instruction; lives in its block.
struct OpInsn {
    Insn insn;
    Operation operation;
};

struct Uop {
    Handler run;
    /// Displacement (RIP already added), 64-bit immediate, branch target IP, or OpInsn*.
    u64 disp;
    u8 dst;   ///< byte offset into gpr[] of the first operand
    u8 src;   ///< of the second
    u8 base;  ///< of the base register (128: none)
    u8 index;
    u8 scale;
    u8 seg;
    u8 length;   ///< bytes of the instruction (of both, when fused)
    u8 number;   ///< instructions of the block before this one
    u32 imm;     ///< 32-bit immediate, sign extended by whoever uses it
    u16 offset;  ///< of the instruction from the block's start
    u8 size;     ///< operand size in bytes, for shared handlers
    u8 cc;       ///< condition code, or a second small operand
};
static_assert(sizeof(Uop) == 32);

#if PV_TAIL_CALLS
#define PV_GO(next_uop)              \
    do {                             \
        const Uop* go_ = (next_uop); \
        return go_->run(go_, f);     \
    } while (0)
#else
#define PV_GO(next_uop) return (next_uop)
#endif
#define PV_NEXT PV_GO(u + 1)

inline constexpr unsigned kMaxBlock = 64;
inline constexpr u64 kDeadEpoch = ~u64{0};

struct Block {
    u64 epoch = 0;  ///< == frame.epoch: may be entered without looking at the page tables
    u32 instructions = 0;
    u32 mode = 0;
    const Uop* uops = nullptr;
    u64 ip = 0;                           ///< of the first instruction
    Block* next[2] = {nullptr, nullptr};  ///< linked successors: [0] fall-through/jump, [1] taken
    u64 linear = 0;
    u64 gpa = 0;         ///< of the first byte
    u64 gpa2 = ~u64{0};  ///< of the first byte in the second page, when the last insn crosses
    u32 bytes = 0;
    u32 cs_limit = 0;
    Block* hash_next = nullptr;
    Block* page_next = nullptr;   ///< other blocks of the same page (first page)
    Block* page2_next = nullptr;  ///< ... of the page gpa2 is in
};

/// Direct-mapped IP -> Block, for branches without a link.
struct JumpCache {
    static constexpr unsigned kEntries = 16384;
    struct Entry {
        u64 ip = ~u64{0};
        Block* block = nullptr;
    };
    Entry entries[kEntries];

    JumpCache() { clear(); }
    /// No entry matches any IP afterwards: ~0 belongs to slot 0 alone, which holds an IP of slot 1.
    void clear() {
        for (Entry& entry : entries) entry = {};
        entries[slot(~u64{0})].ip = 1;
    }
    static unsigned slot(u64 ip) {
        return static_cast<unsigned>((ip ^ (ip >> 12)) & (kEntries - 1));
    }
};

template <class T>
inline T& gpr_at(VcpuFrame* f, u8 offset) {
    return *reinterpret_cast<T*>(reinterpret_cast<u8*>(f->gpr) + offset);
}

}  // namespace polyvisor::soft
