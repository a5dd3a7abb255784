// Packing, unpacking, shuffling, blending and widening: SSE to SSE4.1 and their VEX forms.
#include "soft/simd.hpp"

namespace polyvisor::soft {

PV_PACKED(PUNPCKLBW, "punpcklbw")
PV_PACKED(PUNPCKLWD, "punpcklwd")
PV_PACKED(PUNPCKLDQ, "punpckldq")
PV_PACKED(PUNPCKLQDQ, "punpcklqdq")
PV_PACKED(PUNPCKHBW, "punpckhbw")
PV_PACKED(PUNPCKHWD, "punpckhwd")
PV_PACKED(PUNPCKHDQ, "punpckhdq")
PV_PACKED(PUNPCKHQDQ, "punpckhqdq")
PV_PACKED(PACKSSWB, "packsswb")
PV_PACKED(PACKUSWB, "packuswb")
PV_PACKED(PACKSSDW, "packssdw")
PV_PACKED(PACKUSDW, "packusdw")
PV_PACKED(UNPCKLPS, "unpcklps")
PV_PACKED(UNPCKLPD, "unpcklpd")
PV_PACKED(UNPCKHPS, "unpckhps")
PV_PACKED(UNPCKHPD, "unpckhpd")
PV_PACKED(PSHUFB, "pshufb")

PV_PACKED_IMM(SHUFPS, 256, 256, "shufps")
PV_PACKED_IMM(SHUFPD, 4, 16, "shufpd")
PV_PACKED_IMM(PBLENDW, 256, 256, "pblendw")
PV_PACKED_IMM(BLENDPS, 16, 256, "blendps")
PV_PACKED_IMM(BLENDPD, 4, 16, "blendpd")

#define PV_SHUFFLE_IMM(NAME, op)                           \
    PV_SSE_IMM(NAME##_Vx_Wx_Ib, 256, op)                   \
    PV_VEX128_UNARY_IMM(V##NAME##_Vdq_Wdq_Ib, 256, "v" op) \
    PV_VEX256_UNARY_IMM(V##NAME##_Vqq_Wqq_Ib, 256, "v" op)
PV_SHUFFLE_IMM(PSHUFD, "pshufd")
PV_SHUFFLE_IMM(PSHUFHW, "pshufhw")
PV_SHUFFLE_IMM(PSHUFLW, "pshuflw")

PV_PACKED_UNARY(MOVSLDUP, "movsldup")
PV_PACKED_UNARY(MOVSHDUP, "movshdup")
PV_SSE_UNARY_N(MOVDDUP_Vx_Wq, 8, "movddup")
PV_VEX128_UNARY(VMOVDDUP_Vdq_Wq, 8, "vmovddup")
PV_VEX256_UNARY(VMOVDDUP_Vqq_Wqq, 32, "vmovddup")

// The shift may be by 0 to 32 bytes; from 32 on nothing is left.
#define PV_ALIGN(id, n, out, text, ...)                            \
    PV_IMM_ROW(id) {                                               \
        PV_SOURCE(n);                                              \
        u32 imm = i.imm & 0xe0 ? 32 : i.imm & 31;                  \
        PV_ASM_IMM(out, text, PV_S(n) __VA_OPT__(, ) __VA_ARGS__); \
        return true;                                               \
    }
PV_ALIGN(PALIGNR_Vx_Wx_Ib, 16, PV_D(16),
         "movups %[s], %%xmm1\n\tmovaps %[d], %%xmm0" PV_COPIES(33,
                                                                "palignr $pv_imm, %%xmm1, %%xmm0")
             PV_TO_XMM)
PV_ALIGN(VPALIGNR_Vdq_Hdq_Wdq_Ib, 16, PV_OUT(32),
         "vmovdqu %[s], %%xmm1\n\tvmovdqa %[h], %%xmm2" PV_COPIES(
             33, "vpalignr $pv_imm, %%xmm1, %%xmm2, %%xmm0") PV_TO_YMM128,
         PV_H(16))
PV_ALIGN(VPALIGNR_Vqq_Hqq_Wqq_Ib, 32, PV_OUT(32),
         "vmovdqu %[s], %%ymm1\n\tvmovdqa %[h], %%ymm2" PV_COPIES(
             33, "vpalignr $pv_imm, %%ymm1, %%ymm2, %%ymm0") PV_TO_YMM256,
         PV_H(32))

// --- Blending by a mask in a register -----------------------------------------------------------

// The legacy forms take the mask from XMM0.
#define PV_BLEND_VEX(id, n, r, op, end)                                                          \
    PV_ROW(id) {                                                                                 \
        const u8* mask = f.ymm[immediate_register(f, i)];                                        \
        PV_RUN(n, PV_OUT(32),                                                                    \
               "vmovdqa %[m], %%" r "2\n\tvmovdqa %[h], %%" r "1\n\t" op " %%" r "2, %[s], %%" r \
               "1, %%" r "0" end,                                                                \
               PV_H(n), [m] "m"(as<n>(mask)))                                                    \
    }
#define PV_BLEND(NAME, op)                                                   \
    PV_SSE_XMM0(NAME##_Vx_Wx_XMM0, op)                                       \
    PV_BLEND_VEX(V##NAME##_Vdq_Hdq_Wdq_Ldq, 16, "xmm", "v" op, PV_TO_YMM128) \
    PV_BLEND_VEX(V##NAME##_Vqq_Hqq_Wqq_Lqq, 32, "ymm", "v" op, PV_TO_YMM256)
PV_BLEND(PBLENDVB, "pblendvb")
PV_BLEND(BLENDVPS, "blendvps")
PV_BLEND(BLENDVPD, "blendvpd")

// --- Widening -----------------------------------------------------------------------------------

#define PV_WIDEN(NAME, n, w, n256, w256, op)      \
    PV_SSE_UNARY_N(NAME##_Vx_##w, n, op)          \
    PV_VEX128_UNARY(V##NAME##_Vdq_##w, n, "v" op) \
    PV_VEX256_UNARY(V##NAME##_Vqq_##w256, n256, "v" op)
PV_WIDEN(PMOVSXBW, 8, Wq, 16, Wdq, "pmovsxbw")
PV_WIDEN(PMOVSXBD, 4, Wd, 8, Wq, "pmovsxbd")
PV_WIDEN(PMOVSXBQ, 2, Ww, 4, Wd, "pmovsxbq")
PV_WIDEN(PMOVSXWD, 8, Wq, 16, Wdq, "pmovsxwd")
PV_WIDEN(PMOVSXWQ, 4, Wd, 8, Wq, "pmovsxwq")
PV_WIDEN(PMOVSXDQ, 8, Wq, 16, Wdq, "pmovsxdq")
PV_WIDEN(PMOVZXBW, 8, Wq, 16, Wdq, "pmovzxbw")
PV_WIDEN(PMOVZXBD, 4, Wd, 8, Wq, "pmovzxbd")
PV_WIDEN(PMOVZXBQ, 2, Ww, 4, Wd, "pmovzxbq")
PV_WIDEN(PMOVZXWD, 8, Wq, 16, Wdq, "pmovzxwd")
PV_WIDEN(PMOVZXWQ, 4, Wd, 8, Wq, "pmovzxwq")
PV_WIDEN(PMOVZXDQ, 8, Wq, 16, Wdq, "pmovzxdq")

// --- INSERTPS -----------------------------------------------------------------------------------

// imm8[7:6] choose the element of a register source; memory is one element.
namespace {

inline void insert_element(u8* to, const u8* from, u32 element, u32 imm) {
    u32 elements[4];
    std::memcpy(elements, from, sizeof elements);
    elements[(imm >> 4) & 3] = element;
    for (unsigned n = 0; n < 4; ++n) {
        if (imm & bit(n)) elements[n] = 0;
    }
    std::memcpy(to, elements, sizeof elements);
}

inline bool chosen_element(VcpuFrame& f, const Insn& i, u64 ea, u32& element) {
    if (i.has_mem) return load(f, i, ea, element);
    std::memcpy(&element, f.ymm[i.rm] + ((i.imm >> 6) & 3) * 4, 4);
    return true;
}

}  // namespace

PV_ROW(INSERTPS_Vdq_Wd_Ib) {
    u32 element;
    if (!chosen_element(f, i, ea, element)) return false;
    insert_element(f.ymm[i.reg], f.ymm[i.reg], element, static_cast<u32>(i.imm));
    return true;
}
PV_ROW(VINSERTPS_Vdq_Hdq_Wd_Ib) {
    u32 element;
    if (!chosen_element(f, i, ea, element)) return false;
    insert_element(f.ymm[i.reg], f.ymm[i.vvvv], element, static_cast<u32>(i.imm));
    clear_upper(f, i.reg);
    return true;
}

}  // namespace polyvisor::soft
