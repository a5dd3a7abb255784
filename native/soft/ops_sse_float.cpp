// Floating-point arithmetic, comparison, rounding and logic: SSE to SSE4.1 and AVX. The host's
// MXCSR is the guest's with everything masked, so rounding and sticky flags take care of
// themselves.
#include "soft/simd.hpp"

namespace polyvisor::soft {

#define PV_SCALAR(NAME, n, s, op)       \
    PV_SSE_N(NAME##_V##s##_W##s, n, op) \
    PV_VEX128(V##NAME##_V##s##_H##s##_W##s, n, "v" op)
#define PV_ARITHMETIC(NAME, op)         \
    PV_PACKED(NAME##PS, op "ps")        \
    PV_PACKED(NAME##PD, op "pd")        \
    PV_SCALAR(NAME##SS, 4, ss, op "ss") \
    PV_SCALAR(NAME##SD, 8, sd, op "sd")
PV_ARITHMETIC(ADD, "add")
PV_ARITHMETIC(SUB, "sub")
PV_ARITHMETIC(MUL, "mul")
PV_ARITHMETIC(DIV, "div")
PV_ARITHMETIC(MIN, "min")
PV_ARITHMETIC(MAX, "max")
PV_PACKED_UNARY(SQRTPS, "sqrtps")
PV_PACKED_UNARY(SQRTPD, "sqrtpd")
PV_SCALAR(SQRTSS, 4, ss, "sqrtss")
PV_SCALAR(SQRTSD, 8, sd, "sqrtsd")
PV_PACKED_UNARY(RSQRTPS, "rsqrtps")
PV_SCALAR(RSQRTSS, 4, ss, "rsqrtss")
PV_PACKED_UNARY(RCPPS, "rcpps")
PV_SCALAR(RCPSS, 4, ss, "rcpss")
PV_PACKED(ANDPS, "andps")
PV_PACKED(ANDPD, "andpd")
PV_PACKED(ANDNPS, "andnps")
PV_PACKED(ANDNPD, "andnpd")
PV_PACKED(ORPS, "orps")
PV_PACKED(ORPD, "orpd")
PV_PACKED(XORPS, "xorps")
PV_PACKED(XORPD, "xorpd")
PV_PACKED(HADDPS, "haddps")
PV_PACKED(HADDPD, "haddpd")
PV_PACKED(HSUBPS, "hsubps")
PV_PACKED(HSUBPD, "hsubpd")
PV_PACKED(ADDSUBPS, "addsubps")
PV_PACKED(ADDSUBPD, "addsubpd")

// Legacy comparisons have 8 predicates, VEX ones 32.
#define PV_COMPARE(NAME, n, s, move, op)                  \
    PV_SSE_IMM_N(NAME##_V##s##_W##s##_Ib, n, 8, move, op) \
    PV_VEX128_IMM(V##NAME##_V##s##_H##s##_W##s##_Ib, n, "v" move, 32, "v" op)
PV_SSE_IMM(CMPPS_Vx_Wx_Ib, 8, "cmpps")
PV_VEX128_IMM(VCMPPS_Vdq_Hdq_Wdq_Ib, 16, "vmovdqu", 32, "vcmpps")
PV_VEX256_IMM(VCMPPS_Vqq_Hqq_Wqq_Ib, 32, "vcmpps")
PV_SSE_IMM(CMPPD_Vx_Wx_Ib, 8, "cmppd")
PV_VEX128_IMM(VCMPPD_Vdq_Hdq_Wdq_Ib, 16, "vmovdqu", 32, "vcmppd")
PV_VEX256_IMM(VCMPPD_Vqq_Hqq_Wqq_Ib, 32, "vcmppd")
PV_COMPARE(CMPSS, 4, ss, "movd", "cmpss")
PV_COMPARE(CMPSD, 8, sd, "movq", "cmpsd")

#define PV_ROUND(NAME, op)                                \
    PV_SSE_IMM(NAME##_Vx_Wx_Ib, 16, op)                   \
    PV_VEX128_UNARY_IMM(V##NAME##_Vdq_Wdq_Ib, 16, "v" op) \
    PV_VEX256_UNARY_IMM(V##NAME##_Vqq_Wqq_Ib, 16, "v" op)
PV_ROUND(ROUNDPS, "roundps")
PV_ROUND(ROUNDPD, "roundpd")
#define PV_ROUND_SCALAR(NAME, n, s, move, op)              \
    PV_SSE_IMM_N(NAME##_V##s##_W##s##_Ib, n, 16, move, op) \
    PV_VEX128_IMM(V##NAME##_V##s##_H##s##_W##s##_Ib, n, "v" move, 16, "v" op)
PV_ROUND_SCALAR(ROUNDSS, 4, ss, "movd", "roundss")
PV_ROUND_SCALAR(ROUNDSD, 8, sd, "movq", "roundsd")

PV_PACKED_IMM(DPPS, 256, 256, "dpps")
PV_SSE_IMM(DPPD_Vx_Wx_Ib, 256, "dppd")
PV_VEX128_IMM(VDPPD_Vdq_Hdq_Wdq_Ib, 16, "vmovdqu", 256, "vdppd")

// --- Comparisons that set the status flags ------------------------------------------------------

#define PV_STATUS(id, n, text)                      \
    PV_ROW(id) {                                    \
        PV_SOURCE(n);                               \
        u32 flags;                                  \
        asm(text "\n\tlahf\n\tseto %%al"            \
            : "=a"(flags)                           \
            : [d] "m"(as<n>(f.ymm[i.reg])), PV_S(n) \
            : PV_CLOBBER, "cc");                    \
        f.oszapc = static_cast<u16>(flags);         \
        return true;                                \
    }
#define PV_COMPARE_STATUS(NAME, n, s, move, op)                                   \
    PV_STATUS(NAME##_V##s##_W##s, n, move " %[d], %%xmm0\n\t" op " %[s], %%xmm0") \
    PV_STATUS(V##NAME##_V##s##_W##s, n, move " %[d], %%xmm0\n\t" op " %[s], %%xmm0")
PV_COMPARE_STATUS(COMISS, 4, ss, "movd", "comiss")
PV_COMPARE_STATUS(COMISD, 8, sd, "movq", "comisd")
PV_COMPARE_STATUS(UCOMISS, 4, ss, "movd", "ucomiss")
PV_COMPARE_STATUS(UCOMISD, 8, sd, "movq", "ucomisd")

PV_STATUS(PTEST_Vx_Wx, 16, "movaps %[d], %%xmm0\n\tmovups %[s], %%xmm1\n\tptest %%xmm1, %%xmm0")
#define PV_TEST(NAME, op)                                                        \
    PV_STATUS(NAME##_Vdq_Wdq, 16, "vmovdqa %[d], %%xmm0\n\t" op " %[s], %%xmm0") \
    PV_STATUS(NAME##_Vqq_Wqq, 32, "vmovdqa %[d], %%ymm0\n\t" op " %[s], %%ymm0\n\tvzeroupper")
PV_TEST(VPTEST, "vptest")
PV_TEST(VTESTPS, "vtestps")
PV_TEST(VTESTPD, "vtestpd")

}  // namespace polyvisor::soft
