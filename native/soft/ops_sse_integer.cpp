// Packed integer arithmetic, comparison, logic and shifts: SSE2 to SSE4.2, AVX and AVX2.
#include "soft/simd.hpp"

namespace polyvisor::soft {

PV_PACKED(PCMPGTB, "pcmpgtb")
PV_PACKED(PCMPGTW, "pcmpgtw")
PV_PACKED(PCMPGTD, "pcmpgtd")
PV_PACKED(PCMPGTQ, "pcmpgtq")
PV_PACKED(PCMPEQB, "pcmpeqb")
PV_PACKED(PCMPEQW, "pcmpeqw")
PV_PACKED(PCMPEQD, "pcmpeqd")
PV_PACKED(PCMPEQQ, "pcmpeqq")
PV_PACKED(PADDB, "paddb")
PV_PACKED(PADDW, "paddw")
PV_PACKED(PADDD, "paddd")
PV_PACKED(PADDQ, "paddq")
PV_PACKED(PADDSB, "paddsb")
PV_PACKED(PADDSW, "paddsw")
PV_PACKED(PADDUSB, "paddusb")
PV_PACKED(PADDUSW, "paddusw")
PV_PACKED(PSUBB, "psubb")
PV_PACKED(PSUBW, "psubw")
PV_PACKED(PSUBD, "psubd")
PV_PACKED(PSUBQ, "psubq")
PV_PACKED(PSUBSB, "psubsb")
PV_PACKED(PSUBSW, "psubsw")
PV_PACKED(PSUBUSB, "psubusb")
PV_PACKED(PSUBUSW, "psubusw")
PV_PACKED(PMINUB, "pminub")
PV_PACKED(PMINUW, "pminuw")
PV_PACKED(PMINUD, "pminud")
PV_PACKED(PMINSB, "pminsb")
PV_PACKED(PMINSW, "pminsw")
PV_PACKED(PMINSD, "pminsd")
PV_PACKED(PMAXUB, "pmaxub")
PV_PACKED(PMAXUW, "pmaxuw")
PV_PACKED(PMAXUD, "pmaxud")
PV_PACKED(PMAXSB, "pmaxsb")
PV_PACKED(PMAXSW, "pmaxsw")
PV_PACKED(PMAXSD, "pmaxsd")
PV_PACKED(PAND, "pand")
PV_PACKED(PANDN, "pandn")
PV_PACKED(POR, "por")
PV_PACKED(PXOR, "pxor")
PV_PACKED(PAVGB, "pavgb")
PV_PACKED(PAVGW, "pavgw")
PV_PACKED(PMULLW, "pmullw")
PV_PACKED(PMULHW, "pmulhw")
PV_PACKED(PMULHUW, "pmulhuw")
PV_PACKED(PMULHRSW, "pmulhrsw")
PV_PACKED(PMULLD, "pmulld")
PV_PACKED(PMULDQ, "pmuldq")
PV_PACKED(PMULUDQ, "pmuludq")
PV_PACKED(PMADDWD, "pmaddwd")
PV_PACKED(PMADDUBSW, "pmaddubsw")
PV_PACKED(PSADBW, "psadbw")
PV_PACKED(PHADDW, "phaddw")
PV_PACKED(PHADDD, "phaddd")
PV_PACKED(PHADDSW, "phaddsw")
PV_PACKED(PHSUBW, "phsubw")
PV_PACKED(PHSUBD, "phsubd")
PV_PACKED(PHSUBSW, "phsubsw")
PV_PACKED(PSIGNB, "psignb")
PV_PACKED(PSIGNW, "psignw")
PV_PACKED(PSIGND, "psignd")
PV_PACKED_UNARY(PABSB, "pabsb")
PV_PACKED_UNARY(PABSW, "pabsw")
PV_PACKED_UNARY(PABSD, "pabsd")
PV_SSE_UNARY(PHMINPOSUW_Vx_Wx, "phminposuw")
PV_VEX128_UNARY(VPHMINPOSUW_Vdq_Wdq, 16, "vphminposuw")
PV_PACKED_IMM(MPSADBW, 8, 64, "mpsadbw")

// --- Shifts -------------------------------------------------------------------------------------

namespace {

// A shift by immediate is the shift by register with that count: both clear (or fill with signs)
// when the count is too large.
struct alignas(16) Count {
    u64 low, high = 0;
};

}  // namespace

// The immediate forms have the destination in ModRM.rm (legacy) or VEX.vvvv.
#define PV_RM(n) "m"(as<n>(f.ymm[i.rm]))
#define PV_SHIFT_IMM(id, out, text, ...)                             \
    PV_ROW(id) {                                                     \
        Count count{i.imm & 0xff};                                   \
        PV_ASM(out, text, [n] "m"(count)__VA_OPT__(, ) __VA_ARGS__); \
        return true;                                                 \
    }
#define PV_SHIFT(NAME, op)                                                                  \
    PV_SSE(NAME##_Vx_Wx, op)                                                                \
    PV_VEX128(V##NAME##_Vdq_Hdq_Wdq, 16, "v" op)                                            \
    PV_VEX256(V##NAME##_Vqq_Hqq_Wdq, 16, "v" op)                                            \
    PV_SHIFT_IMM(NAME##_Ux_Ib, [d] "+m"(as<16>(f.ymm[i.rm])),                               \
                 "movaps %[d], %%xmm0\n\t" op " %[n], %%xmm0" PV_TO_XMM)                    \
    PV_SHIFT_IMM(                                                                           \
        V##NAME##_Hdq_Udq_Ib, [d] "=m"(as<32>(f.ymm[i.vvvv])),                              \
        "vmovdqa %[s], %%xmm1\n\tv" op " %[n], %%xmm1, %%xmm0" PV_TO_YMM128, [s] PV_RM(16)) \
    PV_SHIFT_IMM(                                                                           \
        V##NAME##_Hqq_Uqq_Ib, [d] "=m"(as<32>(f.ymm[i.vvvv])),                              \
        "vmovdqa %[s], %%ymm1\n\tv" op " %[n], %%ymm1, %%ymm0" PV_TO_YMM256, [s] PV_RM(32))
PV_SHIFT(PSRLW, "psrlw")
PV_SHIFT(PSRLD, "psrld")
PV_SHIFT(PSRLQ, "psrlq")
PV_SHIFT(PSRAW, "psraw")
PV_SHIFT(PSRAD, "psrad")
PV_SHIFT(PSLLW, "psllw")
PV_SHIFT(PSLLD, "pslld")
PV_SHIFT(PSLLQ, "psllq")

// Byte shifts have no form with a register; 16 and more all clear.
#define PV_BYTE_SHIFT_ROW(id, out, text, ...)     \
    PV_IMM_ROW(id) {                              \
        u32 imm = i.imm & 0xf0 ? 16 : i.imm & 15; \
        PV_ASM_IMM(out, text, __VA_ARGS__);       \
        return true;                              \
    }
#define PV_BYTE_SHIFT(NAME, op)                                                               \
    PV_BYTE_SHIFT_ROW(NAME##_Ux_Ib, [d] "+m"(as<16>(f.ymm[i.rm])),                            \
                      "movaps %[d], %%xmm0" PV_COPIES(17, op " $pv_imm, %%xmm0") PV_TO_XMM)   \
    PV_BYTE_SHIFT_ROW(V##NAME##_Hdq_Udq_Ib, [d] "=m"(as<32>(f.ymm[i.vvvv])),                  \
                      "vmovdqa %[s], %%xmm1" PV_COPIES(17, "v" op " $pv_imm, %%xmm1, %%xmm0") \
                          PV_TO_YMM128,                                                       \
                      [s] PV_RM(16))                                                          \
    PV_BYTE_SHIFT_ROW(V##NAME##_Hqq_Uqq_Ib, [d] "=m"(as<32>(f.ymm[i.vvvv])),                  \
                      "vmovdqa %[s], %%ymm1" PV_COPIES(17, "v" op " $pv_imm, %%ymm1, %%ymm0") \
                          PV_TO_YMM256,                                                       \
                      [s] PV_RM(32))
PV_BYTE_SHIFT(PSRLDQ, "psrldq")
PV_BYTE_SHIFT(PSLLDQ, "pslldq")

#define PV_VARIABLE_SHIFT(NAME, op)       \
    PV_VEX128(NAME##_Vdq_Hdq_Wdq, 16, op) \
    PV_VEX256(NAME##_Vqq_Hqq_Wqq, 32, op)
PV_VARIABLE_SHIFT(VPSRLVD, "vpsrlvd")
PV_VARIABLE_SHIFT(VPSRLVQ, "vpsrlvq")
PV_VARIABLE_SHIFT(VPSRAVD, "vpsravd")
PV_VARIABLE_SHIFT(VPSLLVD, "vpsllvd")
PV_VARIABLE_SHIFT(VPSLLVQ, "vpsllvq")

}  // namespace polyvisor::soft
