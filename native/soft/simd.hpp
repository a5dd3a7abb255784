// How the SIMD operations are written: most are one line that names a row and the instruction.
//
// Guest registers live in the frame, so an operation loads them into the host's registers, executes
// the very same instruction, and stores the result: results, NaNs, denormals and sticky flags equal
// the host's because they are. The macros below write such functions, one for each shape of
// operands:
//
//     PV_SSE(ADDPS_Vx_Wx, "addps")                       xmm = op(xmm, xmm/m128)
//     PV_VEX256(VADDPS_Vqq_Hqq_Wqq, 32, "vaddps")        ymm = op(ymm, ymm/m256)
//
// A legacy instruction stores 16 bytes (bits 255:128 are kept); a VEX instruction on XMM registers
// clears the upper half of the host register by itself, so all 32 bytes are stored. 256-bit
// operations end with VZEROUPPER, because the code around them is compiled for SSE.
//
// The functions are named after their rows (namespace rows, declared from the table), so a name
// that is no row does not compile and a row without a function does not link.
#pragma once

#include "soft/ops.hpp"

namespace polyvisor::soft {

namespace rows {
#define PV_OP(id, ...) bool id(VcpuFrame& f, const Insn& i, u64 ea);
#include "soft/optab_simd.inc"
#undef PV_OP
}  // namespace rows

// --- Operands -----------------------------------------------------------------------------------

template <unsigned n>
struct Bytes {
    u8 b[n];
};
template <unsigned n>
inline Bytes<n>& as(void* p) {
    return *static_cast<Bytes<n>*>(p);
}
template <unsigned n>
inline const Bytes<n>& as(const void* p) {
    return *static_cast<const Bytes<n>*>(p);
}

/// Where `size` bytes of the memory operand can be read: guest memory itself, or `buffer` after
/// a slow access. nullptr: raised.
const u8* memory_source(VcpuFrame& f, const Insn& i, u64 ea, u8* buffer, unsigned size);

/// For checks that come before the access itself finds out.
inline bool canonical(const VcpuFrame& f, u64 linear) {
    unsigned width = f.cr4 & bit(12) ? 57 : 48;
    return !f.long64() || static_cast<u64>(sign_extend(linear, width)) == linear;
}

/// The W operand: XMM/YMM register or memory.
template <unsigned n>
inline const u8* source(VcpuFrame& f, const Insn& i, u64 ea, Bytes<n>& buffer) {
    return i.has_mem ? memory_source(f, i, ea, buffer.b, n) : f.ymm[i.rm];
}

/// The register in imm8[7:4] (VBLENDV); outside 64-bit mode bit 7 is ignored.
inline u8 immediate_register(const VcpuFrame& f, const Insn& i) {
    return (i.imm >> 4) & (f.long64() ? 15 : 7);
}

/// The instruction is a 64-bit one by REX.W or VEX.W, which VEX.W is not outside 64-bit mode.
inline bool wide(const VcpuFrame& f, const Insn& i) {
    return i.rex_w && f.long64();
}

inline void clear_upper(VcpuFrame& f, u8 n) {
    std::memset(f.ymm[n] + 16, 0, 16);
}

// --- MXCSR --------------------------------------------------------------------------------------

inline constexpr u32 kMxcsrFlags = 0x3f;
inline constexpr u32 kMxcsrMasks = 0x1f80;
inline constexpr u32 kMxcsrValid = 0xffff;

inline u32 host_mxcsr() {
    u32 value;
    asm volatile("stmxcsr %0" : "=m"(value));
    return value;
}
inline void set_host_mxcsr(u32 value) {
    asm volatile("ldmxcsr %0" : : "m"(value));
}

/// The guest's MXCSR while the interpreter runs: see VcpuFrame::mxcsr.
inline u32 guest_mxcsr(const VcpuFrame& f) {
    return (host_mxcsr() & ~kMxcsrMasks) | (f.mxcsr & kMxcsrMasks);
}
/// `value` has no reserved bits. May change the mode, so only for rows with kEndsBlock.
void set_guest_mxcsr(VcpuFrame& f, u32 value);

// --- Functions of rows --------------------------------------------------------------------------

#define PV_ROW(id)                                                               \
    bool rows::id([[maybe_unused]] VcpuFrame& f, [[maybe_unused]] const Insn& i, \
                  [[maybe_unused]] u64 ea)

// Operands of the assembly: [d] the register in ModRM.reg, [s] the source, [h] the register in
// VEX.vvvv.
#define PV_D(n) [d] "+m"(as<n>(f.ymm[i.reg]))
#define PV_OUT(n) [d] "=m"(as<n>(f.ymm[i.reg]))
#define PV_S(n) [s] "m"(as<n>(src))
#define PV_H(n) [h] "m"(as<n>(f.ymm[i.vvvv]))
#define PV_CLOBBER "xmm0", "xmm1", "xmm2"

#define PV_ASM(out, text, ...) asm(text : out : __VA_ARGS__ : PV_CLOBBER)

#define PV_SOURCE(n)                          \
    Bytes<n> buffer;                          \
    const u8* src = source(f, i, ea, buffer); \
    if (PV_UNLIKELY(src == nullptr)) return false

// Runs `text` with an n-byte source, the destination `out` and more inputs. It is there twice, for
// a register and for memory, so that the path of registers needs no stack frame.
#define PV_RUN(n, out, text, ...)                                          \
    if (PV_LIKELY(!i.has_mem)) {                                           \
        const u8* src = f.ymm[i.rm];                                       \
        asm(text : out : PV_S(n) __VA_OPT__(, ) __VA_ARGS__ : PV_CLOBBER); \
        return true;                                                       \
    }                                                                      \
    Bytes<n> buffer;                                                       \
    const u8* src = memory_source(f, i, ea, buffer.b, n);                  \
    if (PV_UNLIKELY(src == nullptr)) return false;                         \
    asm(text : out : PV_S(n) __VA_OPT__(, ) __VA_ARGS__ : PV_CLOBBER);     \
    return true;

#define PV_TO_XMM "\n\tmovaps %%xmm0, %[d]"
#define PV_TO_YMM128 "\n\tvmovdqa %%ymm0, %[d]"
#define PV_TO_YMM256 "\n\tvmovdqa %%ymm0, %[d]\n\tvzeroupper"

// Legacy, 16-byte source: dst = op(dst, src), and dst = op(src).
#define PV_SSE(id, op)                                                                          \
    PV_ROW(id) {                                                                                \
        PV_RUN(16, PV_D(16),                                                                    \
               "movups %[s], %%xmm1\n\tmovaps %[d], %%xmm0\n\t" op " %%xmm1, %%xmm0" PV_TO_XMM) \
    }
#define PV_SSE_UNARY(id, op)                                                             \
    PV_ROW(id) {                                                                         \
        PV_RUN(16, PV_OUT(16), "movups %[s], %%xmm1\n\t" op " %%xmm1, %%xmm0" PV_TO_XMM) \
    }
// Legacy with XMM0 as a third, implicit operand; it is XMM0 of the host as well.
#define PV_SSE_XMM0(id, op)                                                               \
    PV_ROW(id) {                                                                          \
        PV_RUN(16, PV_D(16),                                                              \
               "movaps %[m], %%xmm0\n\tmovups %[s], %%xmm1\n\tmovaps %[d], %%xmm2\n\t" op \
               " %%xmm0, %%xmm1, %%xmm2\n\tmovaps %%xmm2, %[d]",                          \
               [m] "m"(as<16>(f.ymm[0])))                                                 \
    }
// Legacy, source narrower than 16 bytes, which needs no alignment.
#define PV_SSE_N(id, n, op)                                                         \
    PV_ROW(id) {                                                                    \
        PV_RUN(n, PV_D(16), "movaps %[d], %%xmm0\n\t" op " %[s], %%xmm0" PV_TO_XMM) \
    }
#define PV_SSE_UNARY_N(id, n, op)                           \
    PV_ROW(id) {                                            \
        PV_RUN(n, PV_OUT(16), op " %[s], %%xmm0" PV_TO_XMM) \
    }
// VEX: dst = op(vvvv, src) and dst = op(src), the source having n bytes.
#define PV_VEX128(id, n, op)                                                                      \
    PV_ROW(id) {                                                                                  \
        PV_RUN(n, PV_OUT(32), "vmovdqa %[h], %%xmm1\n\t" op " %[s], %%xmm1, %%xmm0" PV_TO_YMM128, \
               PV_H(16))                                                                          \
    }
#define PV_VEX256(id, n, op)                                                                      \
    PV_ROW(id) {                                                                                  \
        PV_RUN(n, PV_OUT(32), "vmovdqa %[h], %%ymm1\n\t" op " %[s], %%ymm1, %%ymm0" PV_TO_YMM256, \
               PV_H(32))                                                                          \
    }
#define PV_VEX128_UNARY(id, n, op)                             \
    PV_ROW(id) {                                               \
        PV_RUN(n, PV_OUT(32), op " %[s], %%xmm0" PV_TO_YMM128) \
    }
#define PV_VEX256_UNARY(id, n, op)                             \
    PV_ROW(id) {                                               \
        PV_RUN(n, PV_OUT(32), op " %[s], %%ymm0" PV_TO_YMM256) \
    }
// VEX with a destination that is read too (FMA).
#define PV_FMA128(id, n, op)                                         \
    PV_ROW(id) {                                                     \
        PV_RUN(n, PV_D(32),                                          \
               "vmovdqa %[d], %%xmm0\n\tvmovdqa %[h], %%xmm1\n\t" op \
               " %[s], %%xmm1, %%xmm0" PV_TO_YMM128,                 \
               PV_H(16))                                             \
    }
#define PV_FMA256(id, n, op)                                         \
    PV_ROW(id) {                                                     \
        PV_RUN(n, PV_D(32),                                          \
               "vmovdqa %[d], %%ymm0\n\tvmovdqa %[h], %%ymm1\n\t" op \
               " %[s], %%ymm1, %%ymm0" PV_TO_YMM256,                 \
               PV_H(32))                                             \
    }

// --- Immediates ---------------------------------------------------------------------------------
//
// An immediate is part of the host's instruction, so there is a copy of it for every value: 16
// bytes each, the instruction (which names $pv_imm) and a jump back. The value goes in as `imm` in
// EAX.
#define PV_COPIES(count, instruction)                                                  \
    "\n\tshll $4, %%eax\n\tleaq 9f(%%rip), %%r10\n\taddq %%rax, %%r10\n\tjmp *%%r10\n" \
    "\t.pushsection .text.pv_immediates, \"ax\", @progbits\n\t.p2align 4\n"            \
    "9:\n\t.set pv_imm, 0\n\t.rept " #count "\n\t" instruction                         \
    "\n\tjmp 8f\n\t.p2align 4\n\t.set pv_imm, pv_imm + 1\n\t.endr\n"                   \
    "\t.popsection\n8:\n\t"
#define PV_IMM_ROW(id) [[gnu::noinline]] PV_ROW(id)
// `count` is a power of two: bits of the immediate above are ignored.
#define PV_IMM_VALUE(count) u32 imm = static_cast<u32>(i.imm) & (count - 1)
#define PV_ASM_IMM(out, text, ...) \
    asm(text : out, [imm] "+a"(imm) : __VA_ARGS__ : PV_CLOBBER, "r10", "cc")
#define PV_RUN_IMM(n, count, out, text, ...)                   \
    PV_SOURCE(n);                                              \
    PV_IMM_VALUE(count);                                       \
    PV_ASM_IMM(out, text, PV_S(n) __VA_OPT__(, ) __VA_ARGS__); \
    return true;

// As above, with an immediate of `count` values. `move` loads the source.
#define PV_SSE_IMM_N(id, n, count, move, op)                              \
    PV_IMM_ROW(id) {                                                      \
        PV_RUN_IMM(n, count, PV_D(16),                                    \
                   move " %[s], %%xmm1\n\tmovaps %[d], %%xmm0" PV_COPIES( \
                       count, op " $pv_imm, %%xmm1, %%xmm0") PV_TO_XMM)   \
    }
#define PV_SSE_IMM(id, count, op) PV_SSE_IMM_N(id, 16, count, "movups", op)
#define PV_VEX128_IMM(id, n, move, count, op)                                      \
    PV_IMM_ROW(id) {                                                               \
        PV_RUN_IMM(n, count, PV_OUT(32),                                           \
                   move " %[s], %%xmm1\n\tvmovdqa %[h], %%xmm2" PV_COPIES(         \
                       count, op " $pv_imm, %%xmm1, %%xmm2, %%xmm0") PV_TO_YMM128, \
                   PV_H(16))                                                       \
    }
#define PV_VEX256_IMM(id, count, op)                                               \
    PV_IMM_ROW(id) {                                                               \
        PV_RUN_IMM(32, count, PV_OUT(32),                                          \
                   "vmovdqu %[s], %%ymm1\n\tvmovdqa %[h], %%ymm2" PV_COPIES(       \
                       count, op " $pv_imm, %%ymm1, %%ymm2, %%ymm0") PV_TO_YMM256, \
                   PV_H(32))                                                       \
    }
#define PV_VEX128_UNARY_IMM(id, count, op)                                                \
    PV_IMM_ROW(id) {                                                                      \
        PV_RUN_IMM(16, count, PV_OUT(32),                                                 \
                   "vmovdqu %[s], %%xmm1" PV_COPIES(count, op " $pv_imm, %%xmm1, %%xmm0") \
                       PV_TO_YMM128)                                                      \
    }
#define PV_VEX256_UNARY_IMM(id, count, op)                                                \
    PV_IMM_ROW(id) {                                                                      \
        PV_RUN_IMM(32, count, PV_OUT(32),                                                 \
                   "vmovdqu %[s], %%ymm1" PV_COPIES(count, op " $pv_imm, %%ymm1, %%ymm0") \
                       PV_TO_YMM256)                                                      \
    }

// --- Families -----------------------------------------------------------------------------------
//
// What SSE has, AVX has too: NAME in capitals for the rows, the same in lower case as the host's
// assembler spells it. 16-byte sources (32 for 256 bits).
#define PV_PACKED(NAME, op)                      \
    PV_SSE(NAME##_Vx_Wx, op)                     \
    PV_VEX128(V##NAME##_Vdq_Hdq_Wdq, 16, "v" op) \
    PV_VEX256(V##NAME##_Vqq_Hqq_Wqq, 32, "v" op)
#define PV_PACKED_UNARY(NAME, op)                  \
    PV_SSE_UNARY(NAME##_Vx_Wx, op)                 \
    PV_VEX128_UNARY(V##NAME##_Vdq_Wdq, 16, "v" op) \
    PV_VEX256_UNARY(V##NAME##_Vqq_Wqq, 32, "v" op)
#define PV_PACKED_IMM(NAME, count, count256, op)                          \
    PV_SSE_IMM(NAME##_Vx_Wx_Ib, count, op)                                \
    PV_VEX128_IMM(V##NAME##_Vdq_Hdq_Wdq_Ib, 16, "vmovdqu", count, "v" op) \
    PV_VEX256_IMM(V##NAME##_Vqq_Hqq_Wqq_Ib, count256, "v" op)

}  // namespace polyvisor::soft
