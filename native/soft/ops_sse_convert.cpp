// Conversions between integers and the floating-point formats: SSE, SSE2, AVX and F16C.
#include "soft/simd.hpp"

namespace polyvisor::soft {

// --- Packed -------------------------------------------------------------------------------------

// XMM to XMM and YMM to YMM: both sides have elements of the same size.
PV_PACKED_UNARY(CVTDQ2PS, "cvtdq2ps")
PV_PACKED_UNARY(CVTPS2DQ, "cvtps2dq")
PV_PACKED_UNARY(CVTTPS2DQ, "cvttps2dq")

// The destination's elements are twice as long.
#define PV_WIDEN(NAME, op)                                \
    PV_SSE_UNARY_N(NAME##_Vx_Wq, 8, op)                   \
    PV_VEX128_UNARY(V##NAME##_Vdq_Wq, 8, "v" op)          \
    PV_VEX256_UNARY(V##NAME##_Vqq_Wdq, 16, "v" op)
PV_WIDEN(CVTPS2PD, "cvtps2pd")
PV_WIDEN(CVTDQ2PD, "cvtdq2pd")
PV_VEX128_UNARY(VCVTPH2PS_Vdq_Wq, 8, "vcvtph2ps")
PV_VEX256_UNARY(VCVTPH2PS_Vqq_Wdq, 16, "vcvtph2ps")

// The destination's elements are half as long: an XMM register whatever the vector length. The
// assembler tells the lengths of a memory source by suffix.
#define PV_NARROW(NAME, op)                               \
    PV_SSE_UNARY(NAME##_Vx_Wx, op)                        \
    PV_VEX128_UNARY(V##NAME##_Vdq_Wdq, 16, "v" op "x")    \
    PV_ROW(V##NAME##_Vdq_Wqq) {                           \
        PV_WITH_SOURCE(32, asm("v" op "y %[s], %%xmm0\n\tvmovdqa %%ymm0, %[d]\n\tvzeroupper" \
            : PV_OUT32 : PV_S(32) : PV_CLOBBER));         \
    }
PV_NARROW(CVTPD2PS, "cvtpd2ps")
PV_NARROW(CVTPD2DQ, "cvtpd2dq")
PV_NARROW(CVTTPD2DQ, "cvttpd2dq")

// --- Scalar -------------------------------------------------------------------------------------

#define PV_SCALAR(NAME, n, s, d, op)                      \
    PV_SSE_N(NAME##_V##d##_W##s, n, op)                   \
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

#define PV_FROM_INTEGER(NAME, k, op)                                                    \
    PV_ROW(NAME##_V##k##_Ey) {                                                          \
        u64 value;                                                                      \
        if (!integer_source(f, i, ea, value)) return false;                             \
        if (wide(f, i)) {                                                               \
            asm("movaps %[d], %%xmm0\n\t" op "q %[s], %%xmm0\n\tmovaps %%xmm0, %[d]"    \
                : PV_D16 : [s] "r"(value) : PV_CLOBBER);                                \
        } else {                                                                        \
            asm("movaps %[d], %%xmm0\n\t" op "l %k[s], %%xmm0\n\tmovaps %%xmm0, %[d]"   \
                : PV_D16 : [s] "r"(value) : PV_CLOBBER);                                \
        }                                                                               \
        return true;                                                                    \
    }                                                                                   \
    PV_ROW(V##NAME##_V##k##_H##k##_Ey) {                                                \
        u64 value;                                                                      \
        if (!integer_source(f, i, ea, value)) return false;                             \
        if (wide(f, i)) {                                                               \
            asm("vmovdqa %[h], %%xmm1\n\tv" op                                          \
                "q %[s], %%xmm1, %%xmm0\n\tvmovdqa %%ymm0, %[d]"                        \
                : PV_OUT32 : [s] "r"(value), PV_H(16) : PV_CLOBBER);                    \
        } else {                                                                        \
            asm("vmovdqa %[h], %%xmm1\n\tv" op                                          \
                "l %k[s], %%xmm1, %%xmm0\n\tvmovdqa %%ymm0, %[d]"                       \
                : PV_OUT32 : [s] "r"(value), PV_H(16) : PV_CLOBBER);                    \
        }                                                                               \
        return true;                                                                    \
    }
PV_FROM_INTEGER(CVTSI2SS, ss, "cvtsi2ss")
PV_FROM_INTEGER(CVTSI2SD, sd, "cvtsi2sd")

#define PV_TO_INTEGER_ROW(id, n, op)                                      \
    PV_ROW(id) {                                                          \
        PV_SOURCE(n);                                                     \
        u64 value;                                                        \
        if (wide(f, i)) {                                                 \
            asm(op " %[s], %q[v]" : [v] "=r"(value) : PV_S(n));           \
        } else {                                                          \
            asm(op " %[s], %k[v]" : [v] "=r"(value) : PV_S(n));           \
        }                                                                 \
        f.gpr[i.reg] = value;                                             \
        return true;                                                      \
    }
#define PV_TO_INTEGER(NAME, n, s, op)               \
    PV_TO_INTEGER_ROW(NAME##_Gy_W##s, n, op)        \
    PV_TO_INTEGER_ROW(V##NAME##_Gy_W##s, n, op)
PV_TO_INTEGER(CVTSS2SI, 4, ss, "cvtss2si")
PV_TO_INTEGER(CVTSD2SI, 8, sd, "cvtsd2si")
PV_TO_INTEGER(CVTTSS2SI, 4, ss, "cvttss2si")
PV_TO_INTEGER(CVTTSD2SI, 8, sd, "cvttsd2si")

// --- VCVTPS2PH ----------------------------------------------------------------------------------

namespace {

// Stores the result. This is the one operation that can raise a SIMD floating-point exception and whose
// destination is not ModRM.reg's: run_checked_simd() cannot take it back, so it is not written at all
// when an unmasked exception was raised.
template <unsigned n>
bool store_halves(VcpuFrame& f, const Insn& i, u64 ea, const u8* result) {
    if (f.mode & kModeFpException) {
        u32 raised = host_mxcsr() & kMxcsrFlags & ~(f.mxcsr >> 7);
        if (raised != 0) return true;
    }
    if (!i.has_mem) {
        as<16>(f.ymm[i.rm]) = as<16>(result);
        clear_upper(f, i.rm);
        return true;
    }
    return store(f, i, ea, as<n>(result));
}

}  // namespace

PV_IMM_ROW(VCVTPS2PH_Wq_Vdq_Ib) {
    PV_IMM_VALUE(256);
    alignas(16) u8 result[16];
    asm volatile("vmovdqa %[v], %%xmm1\n\t" PV_COPIES(256, "vcvtps2ph $pv_imm, %%xmm1, %%xmm0")
                 "vmovdqa %%xmm0, %[r]"
                 : [r] "=m"(result), PV_IMM
                 : [v] "m"(as<16>(f.ymm[i.reg])) : PV_IMM_CLOBBER);
    return store_halves<8>(f, i, ea, result);
}
PV_IMM_ROW(VCVTPS2PH_Wdq_Vqq_Ib) {
    PV_IMM_VALUE(256);
    alignas(16) u8 result[16];
    asm volatile("vmovdqa %[v], %%ymm1\n\t" PV_COPIES(256, "vcvtps2ph $pv_imm, %%ymm1, %%xmm0")
                 "vmovdqa %%xmm0, %[r]\n\tvzeroupper"
                 : [r] "=m"(result), PV_IMM
                 : [v] "m"(as<32>(f.ymm[i.reg])) : PV_IMM_CLOBBER);
    return store_halves<16>(f, i, ea, result);
}

}  // namespace polyvisor::soft
