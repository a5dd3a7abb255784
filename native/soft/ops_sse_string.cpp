// PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM of SSE4.2, and their VEX forms.
#include <algorithm>

#include "soft/simd.hpp"

namespace polyvisor::soft {

namespace {

// A length of PCMPESTRx. Its absolute value is cut off at 16, so a 64-bit one (REX.W) can be cut
// earlier and the 32-bit instruction be used for both.
inline u32 string_length(const VcpuFrame& f, const Insn& i, u8 reg) {
    if (!wide(f, i)) return static_cast<u32>(f.gpr[reg]);
    return static_cast<u32>(std::clamp<s64>(static_cast<s64>(f.gpr[reg]), -64, 64));
}

}  // namespace

// Index results go to ECX, mask results to XMM0, the status flags are set by both.
#define PV_EXPLICIT(op, fetch)                                                                  \
    PV_SOURCE(16);                                                                              \
    PV_IMM_VALUE(256);                                                                          \
    u32 first = string_length(f, i, kRax), second = string_length(f, i, kRdx), index;           \
    Bytes<16> mask;                                                                             \
    asm(fetch " %[s], %%xmm1\n\t" fetch " %[d], %%xmm2\n\tmovl %[first], %%r11d\n\t" PV_COPIES( \
            256, "movl %%r11d, %%eax\n\t" op                                                    \
                 " $pv_imm, %%xmm1, %%xmm2") "lahf\n\tseto %%al\n\t" fetch " %%xmm0, %[mask]"   \
        : [imm] "+a"(imm), "=&c"(index), [mask] "=m"(mask)                                      \
        : [first] "r"(first), "d"(second), [d] "m"(as<16>(f.ymm[i.reg])), PV_S(16)              \
        : PV_CLOBBER, "r10", "r11", "cc");                                                      \
    f.oszapc = static_cast<u16>(imm)
#define PV_IMPLICIT(op, fetch)                                                                   \
    PV_SOURCE(16);                                                                               \
    PV_IMM_VALUE(256);                                                                           \
    u32 index;                                                                                   \
    Bytes<16> mask;                                                                              \
    asm(fetch " %[s], %%xmm1\n\t" fetch " %[d], %%xmm2\n\t" PV_COPIES(                           \
            256, op " $pv_imm, %%xmm1, %%xmm2") "lahf\n\tseto %%al\n\t" fetch " %%xmm0, %[mask]" \
        : [imm] "+a"(imm), "=&c"(index), [mask] "=m"(mask)                                       \
        : [d] "m"(as<16>(f.ymm[i.reg])), PV_S(16)                                                \
        : PV_CLOBBER, "r10", "cc");                                                              \
    f.oszapc = static_cast<u16>(imm)
#define PV_INDEX_ROW(id, kind, op, fetch) \
    PV_IMM_ROW(id) {                      \
        kind(op, fetch);                  \
        f.gpr[kRcx] = index;              \
        return true;                      \
    }
#define PV_MASK_ROW(id, kind, op, fetch)                \
    PV_IMM_ROW(id) {                                    \
        kind(op, fetch);                                \
        as<16>(f.ymm[0]) = mask;                        \
        if (i.prefixes & kPrefixVex) clear_upper(f, 0); \
        return true;                                    \
    }

PV_INDEX_ROW(PCMPESTRI_Vdq_Wdq_Ib, PV_EXPLICIT, "pcmpestri", "movdqu")
PV_INDEX_ROW(VPCMPESTRI_Vdq_Wdq_Ib, PV_EXPLICIT, "vpcmpestri", "vmovdqu")
PV_INDEX_ROW(PCMPISTRI_Vdq_Wdq_Ib, PV_IMPLICIT, "pcmpistri", "movdqu")
PV_INDEX_ROW(VPCMPISTRI_Vdq_Wdq_Ib, PV_IMPLICIT, "vpcmpistri", "vmovdqu")
PV_MASK_ROW(PCMPESTRM_Vdq_Wdq_Ib, PV_EXPLICIT, "pcmpestrm", "movdqu")
PV_MASK_ROW(VPCMPESTRM_Vdq_Wdq_Ib, PV_EXPLICIT, "vpcmpestrm", "vmovdqu")
PV_MASK_ROW(PCMPISTRM_Vdq_Wdq_Ib, PV_IMPLICIT, "pcmpistrm", "movdqu")
PV_MASK_ROW(VPCMPISTRM_Vdq_Wdq_Ib, PV_IMPLICIT, "vpcmpistrm", "vmovdqu")

}  // namespace polyvisor::soft
