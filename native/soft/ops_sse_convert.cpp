// Conversions between integers and the floating-point formats: SSE, SSE2, AVX and F16C.
#include "soft/operands.hpp"
#include "soft/simd.hpp"

namespace polyvisor::soft {

// --- Packed -------------------------------------------------------------------------------------

// XMM to XMM and YMM to YMM: both sides have elements of the same size.
PV_PACKED_UNARY(CVTDQ2PS, "cvtdq2ps")
PV_PACKED_UNARY(CVTPS2DQ, "cvtps2dq")
PV_PACKED_UNARY(CVTTPS2DQ, "cvttps2dq")

// The destination's elements are twice as long.
#define PV_WIDEN(NAME, op)                       \
    PV_SSE_UNARY_N(NAME##_Vx_Wq, 8, op)          \
    PV_VEX128_UNARY(V##NAME##_Vdq_Wq, 8, "v" op) \
    PV_VEX256_UNARY(V##NAME##_Vqq_Wdq, 16, "v" op)
PV_WIDEN(CVTPS2PD, "cvtps2pd")
PV_WIDEN(CVTDQ2PD, "cvtdq2pd")
PV_VEX128_UNARY(VCVTPH2PS_Vdq_Wq, 8, "vcvtph2ps")
PV_VEX256_UNARY(VCVTPH2PS_Vqq_Wdq, 16, "vcvtph2ps")

// The destination's elements are half as long: an XMM register whatever the vector length. The
// assembler tells the lengths of a memory source by suffix.
#define PV_NARROW(NAME, op)                                          \
    PV_SSE_UNARY(NAME##_Vx_Wx, op)                                   \
    PV_VEX128_UNARY(V##NAME##_Vdq_Wdq, 16, "v" op "x")               \
    PV_ROW(V##NAME##_Vdq_Wqq) {                                      \
        PV_RUN(32, PV_OUT(32), "v" op "y %[s], %%xmm0" PV_TO_YMM256) \
    }
PV_NARROW(CVTPD2PS, "cvtpd2ps")
PV_NARROW(CVTPD2DQ, "cvtpd2dq")
PV_NARROW(CVTTPD2DQ, "cvttpd2dq")

// --- Scalar -------------------------------------------------------------------------------------

#define PV_SCALAR(NAME, n, s, d, op)    \
    PV_SSE_N(NAME##_V##d##_W##s, n, op) \
    PV_VEX128(V##NAME##_V##d##_H##d##_W##s, n, "v" op)
PV_SCALAR(CVTSS2SD, 4, ss, sd, "cvtss2sd")
PV_SCALAR(CVTSD2SS, 8, sd, ss, "cvtsd2ss")

namespace {

// The general register or memory operand of CVTSI2xx, 4 or 8 bytes.
inline bool integer_source(VcpuFrame& f, const Insn& i, u64 ea, u64& value) {
    if (!i.has_mem) {
        value = f.gpr[i.rm];
        return true;
    }
    if (wide(f, i)) return load(f, i, ea, value);
    u32 narrow;
    if (!load(f, i, ea, narrow)) return false;
    value = narrow;
    return true;
}

}  // namespace

// `s` is the integer in a register, 64 or 32 bits of it.
#define PV_FROM_INTEGER_ROW(id, out, before, op, after, ...)                                    \
    PV_ROW(id) {                                                                                \
        u64 value;                                                                              \
        if (!integer_source(f, i, ea, value)) return false;                                     \
        if (wide(f, i)) {                                                                       \
            PV_ASM(out, before op "q %q[s], " after, [s] "r"(value)__VA_OPT__(, ) __VA_ARGS__); \
        } else {                                                                                \
            PV_ASM(out, before op "l %k[s], " after, [s] "r"(value)__VA_OPT__(, ) __VA_ARGS__); \
        }                                                                                       \
        return true;                                                                            \
    }
#define PV_FROM_INTEGER(NAME, k, op)                                                        \
    PV_FROM_INTEGER_ROW(NAME##_V##k##_Ey, PV_D(16), "movaps %[d], %%xmm0\n\t", op,          \
                        "%%xmm0" PV_TO_XMM)                                                 \
    PV_FROM_INTEGER_ROW(V##NAME##_V##k##_H##k##_Ey, PV_OUT(32), "vmovdqa %[h], %%xmm1\n\t", \
                        "v" op, "%%xmm1, %%xmm0" PV_TO_YMM128, PV_H(16))
PV_FROM_INTEGER(CVTSI2SS, ss, "cvtsi2ss")
PV_FROM_INTEGER(CVTSI2SD, sd, "cvtsi2sd")

#define PV_TO_INTEGER_ROW(id, n, op)                            \
    PV_ROW(id) {                                                \
        PV_SOURCE(n);                                           \
        u64 value;                                              \
        if (wide(f, i)) {                                       \
            asm(op " %[s], %q[v]" : [v] "=r"(value) : PV_S(n)); \
        } else {                                                \
            asm(op " %[s], %k[v]" : [v] "=r"(value) : PV_S(n)); \
        }                                                       \
        f.gpr[i.reg] = value;                                   \
        return true;                                            \
    }
#define PV_TO_INTEGER(NAME, n, s, op)        \
    PV_TO_INTEGER_ROW(NAME##_Gy_W##s, n, op) \
    PV_TO_INTEGER_ROW(V##NAME##_Gy_W##s, n, op)
PV_TO_INTEGER(CVTSS2SI, 4, ss, "cvtss2si")
PV_TO_INTEGER(CVTSD2SI, 8, sd, "cvtsd2si")
PV_TO_INTEGER(CVTTSS2SI, 4, ss, "cvttss2si")
PV_TO_INTEGER(CVTTSD2SI, 8, sd, "cvttsd2si")

// --- VCVTPS2PH ----------------------------------------------------------------------------------

namespace {

// Stores the result. This is the one operation that can raise a SIMD floating-point exception and
// whose destination is not ModRM.reg's: run_checked_simd() cannot take it back, so it is not
// written at all when an unmasked exception was raised. The target was opened before MXCSR's flags
// were touched: a page fault comes first.
template <unsigned n>
bool store_halves(VcpuFrame& f, const Insn& i, const Target& target, const u8* result) {
    if (f.mode & kModeFpException) {
        u32 raised = host_mxcsr() & kMxcsrFlags & ~(f.mxcsr >> 7);
        if (raised != 0) return true;
    }
    if (!i.has_mem) {
        as<16>(f.ymm[i.rm]) = as<16>(result);
        clear_upper(f, i.rm);
        return true;
    }
    return target.write(f, as<n>(result));
}

}  // namespace

#define PV_TO_HALVES(id, n, r, bytes, end)                                                      \
    PV_IMM_ROW(id) {                                                                            \
        PV_IMM_VALUE(256);                                                                      \
        Target target;                                                                          \
        if (i.has_mem && !open_target<Bytes<bytes>>(f, i, ea, target)) return false;            \
        alignas(16) u8 result[16];                                                              \
        PV_ASM_IMM([to] "=m"(result),                                                           \
                   "vmovdqa %[v], %%" r "1" PV_COPIES(                                          \
                       256, "vcvtps2ph $pv_imm, %%" r "1, %%xmm0") "vmovdqa %%xmm0, %[to]" end, \
                   [v] "m"(as<n>(f.ymm[i.reg])));                                               \
        return store_halves<bytes>(f, i, target, result);                                       \
    }
PV_TO_HALVES(VCVTPS2PH_Wq_Vdq_Ib, 16, "xmm", 8, "")
PV_TO_HALVES(VCVTPS2PH_Wdq_Vqq_Ib, 32, "ymm", 16, "\n\tvzeroupper")

}  // namespace polyvisor::soft
