// AES, SHA, carry-less and Galois-field multiplication with their VEX forms, and SSE4a's bit
// fields.
#include "soft/simd.hpp"

namespace polyvisor::soft {

PV_PACKED(AESENC, "aesenc")
PV_PACKED(AESENCLAST, "aesenclast")
PV_PACKED(AESDEC, "aesdec")
PV_PACKED(AESDECLAST, "aesdeclast")
PV_SSE_UNARY(AESIMC_Vx_Wx, "aesimc")
PV_VEX128_UNARY(VAESIMC_Vdq_Wdq, 16, "vaesimc")
PV_SSE_IMM(AESKEYGENASSIST_Vx_Wx_Ib, 256, "aeskeygenassist")
PV_VEX128_UNARY_IMM(VAESKEYGENASSIST_Vdq_Wdq_Ib, 256, "vaeskeygenassist")
PV_PACKED_IMM(PCLMULQDQ, 256, 256, "pclmulqdq")

PV_SSE(SHA1NEXTE_Vx_Wx, "sha1nexte")
PV_SSE(SHA1MSG1_Vx_Wx, "sha1msg1")
PV_SSE(SHA1MSG2_Vx_Wx, "sha1msg2")
PV_SSE_IMM(SHA1RNDS4_Vx_Wx_Ib, 4, "sha1rnds4")
PV_SSE(SHA256MSG1_Vx_Wx, "sha256msg1")
PV_SSE(SHA256MSG2_Vx_Wx, "sha256msg2")
PV_SSE_XMM0(SHA256RNDS2_Vx_Wx_XMM0, "sha256rnds2")

PV_PACKED(GF2P8MULB, "gf2p8mulb")
PV_PACKED_IMM(GF2P8AFFINEQB, 256, 256, "gf2p8affineqb")
PV_PACKED_IMM(GF2P8AFFINEINVQB, 256, 256, "gf2p8affineinvqb")

// --- EXTRQ, INSERTQ (APM 4) ---------------------------------------------------------------------
//
// The forms with immediates are the forms with registers that hold the same length and index.

namespace {

struct alignas(16) BitField {
    u64 low, high;
};

inline u64 field_control(const Insn& i) {
    return (i.imm & 0xff) | (i.imm2 & 0xff) << 8;
}

inline void extract_field(u8* to, const BitField& control) {
    asm("movaps %[d], %%xmm0\n\tmovaps %[c], %%xmm1\n\textrq %%xmm1, %%xmm0\n\tmovaps %%xmm0, %[d]"
        : [d] "+m"(as<16>(to))
        : [c] "m"(control)
        : PV_CLOBBER);
}
inline void insert_field(u8* to, const BitField& value_and_control) {
    asm("movaps %[d], %%xmm0\n\tmovaps %[c], %%xmm1\n\tinsertq %%xmm1, %%xmm0\n\tmovaps %%xmm0, "
        "%[d]"
        : [d] "+m"(as<16>(to))
        : [c] "m"(value_and_control)
        : PV_CLOBBER);
}
inline BitField field(const u8* from) {
    BitField value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

}  // namespace

PV_ROW(EXTRQ_Udq_Ib_Ib) {
    extract_field(f.ymm[i.rm], {field_control(i), 0});
    return true;
}
PV_ROW(EXTRQ_Vdq_Udq) {
    extract_field(f.ymm[i.reg], field(f.ymm[i.rm]));
    return true;
}
PV_ROW(INSERTQ_Vdq_Udq_Ib_Ib) {
    insert_field(f.ymm[i.reg], {field(f.ymm[i.rm]).low, field_control(i)});
    return true;
}
PV_ROW(INSERTQ_Vdq_Udq) {
    insert_field(f.ymm[i.reg], field(f.ymm[i.rm]));
    return true;
}

}  // namespace polyvisor::soft
