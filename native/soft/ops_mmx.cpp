// MMX: the low 64 bits of the x87 registers.
//
// The host's MMX registers are not touched. An operation on 64 bits is the SSE instruction of the
// same name on XMM registers whose upper halves are clear; the few that mix elements of both
// operands (packs, high unpacks, horizontal sums) put the two operands into one XMM register first.
#include "soft/environment.hpp"
#include "soft/simd_masked.hpp"

namespace polyvisor::soft {

namespace {

// Every MMX instruction: TOP = 0 and, but for EMMS, all registers valid (SDM 3A, table 13-1).
inline void enter_mmx(VcpuFrame& f) {
    f.x87.status &= static_cast<u16>(~0x3800);
    f.x87.tags = 0xff;
}

inline u8* mm(VcpuFrame& f, u8 n) {
    return f.x87.reg[n & 7];
}
inline u64 mm_value(VcpuFrame& f, u8 n) {
    u64 value;
    std::memcpy(&value, mm(f, n), sizeof value);
    return value;
}

// A write sets sign and exponent to ones, so that x87 code sees a NaN.
inline void mark_written(VcpuFrame& f, u8 n) {
    std::memset(mm(f, n) + 8, 0xff, 2);
}
inline void set_mm(VcpuFrame& f, u8 n, u64 value) {
    enter_mmx(f);
    std::memcpy(mm(f, n), &value, sizeof value);
    mark_written(f, n);
}

template <class T>
inline bool mm_source(VcpuFrame& f, const Insn& i, u64 ea, T& value) {
    if (i.has_mem) return load(f, i, ea, value);
    std::memcpy(&value, mm(f, i.rm), sizeof value);
    return true;
}

}  // namespace

// `text` computes the low half of XMM0 from the destination in XMM0 and the source [s].
#define PV_MMX_ROW(id, T, text)                                  \
    PV_ROW(id) {                                                 \
        T value;                                                 \
        if (!mm_source(f, i, ea, value)) return false;           \
        enter_mmx(f);                                            \
        asm("movq %[d], %%xmm0\n\t" text "\n\tmovq %%xmm0, %[d]" \
            : [d] "+m"(as<8>(mm(f, i.reg)))                      \
            : [s] "m"(value)                                     \
            : PV_CLOBBER);                                       \
        mark_written(f, i.reg);                                  \
        return true;                                             \
    }
#define PV_MMX(NAME, op) PV_MMX_ROW(NAME##_Pq_Qq, u64, "movq %[s], %%xmm1\n\t" op " %%xmm1, %%xmm0")
// Both operands in XMM0: the destination low, the source high.
#define PV_MMX_JOINED(NAME, op) \
    PV_MMX_ROW(NAME##_Pq_Qq, u64, "movhps %[s], %%xmm0\n\t" op " %%xmm0, %%xmm0")
#define PV_MMX_UNPACK_LOW(NAME, op) \
    PV_MMX_ROW(NAME##_Pq_Qd, u32, "movd %[s], %%xmm1\n\t" op " %%xmm1, %%xmm0")
#define PV_MMX_UNPACK_HIGH(NAME, op)      \
    PV_MMX_ROW(NAME##_Pq_Qq, u64,         \
               "movq %[s], %%xmm1\n\t" op \
               " %%xmm1, %%xmm0\n\t"      \
               "psrldq $8, %%xmm0")

PV_MMX(PCMPGTB, "pcmpgtb")
PV_MMX(PCMPGTW, "pcmpgtw")
PV_MMX(PCMPGTD, "pcmpgtd")
PV_MMX(PCMPEQB, "pcmpeqb")
PV_MMX(PCMPEQW, "pcmpeqw")
PV_MMX(PCMPEQD, "pcmpeqd")
PV_MMX(PADDB, "paddb")
PV_MMX(PADDW, "paddw")
PV_MMX(PADDD, "paddd")
PV_MMX(PADDQ, "paddq")
PV_MMX(PADDSB, "paddsb")
PV_MMX(PADDSW, "paddsw")
PV_MMX(PADDUSB, "paddusb")
PV_MMX(PADDUSW, "paddusw")
PV_MMX(PSUBB, "psubb")
PV_MMX(PSUBW, "psubw")
PV_MMX(PSUBD, "psubd")
PV_MMX(PSUBQ, "psubq")
PV_MMX(PSUBSB, "psubsb")
PV_MMX(PSUBSW, "psubsw")
PV_MMX(PSUBUSB, "psubusb")
PV_MMX(PSUBUSW, "psubusw")
PV_MMX(PMINUB, "pminub")
PV_MMX(PMINSW, "pminsw")
PV_MMX(PMAXUB, "pmaxub")
PV_MMX(PMAXSW, "pmaxsw")
PV_MMX(PAND, "pand")
PV_MMX(PANDN, "pandn")
PV_MMX(POR, "por")
PV_MMX(PXOR, "pxor")
PV_MMX(PAVGB, "pavgb")
PV_MMX(PAVGW, "pavgw")
PV_MMX(PMULLW, "pmullw")
PV_MMX(PMULHW, "pmulhw")
PV_MMX(PMULHUW, "pmulhuw")
PV_MMX(PMULHRSW, "pmulhrsw")
PV_MMX(PMULUDQ, "pmuludq")
PV_MMX(PMADDWD, "pmaddwd")
PV_MMX(PMADDUBSW, "pmaddubsw")
PV_MMX(PSADBW, "psadbw")
PV_MMX(PSIGNB, "psignb")
PV_MMX(PSIGNW, "psignw")
PV_MMX(PSIGND, "psignd")
PV_MMX(PABSB, "pabsb")
PV_MMX(PABSW, "pabsw")
PV_MMX(PABSD, "pabsd")
PV_MMX_JOINED(PHADDW, "phaddw")
PV_MMX_JOINED(PHADDD, "phaddd")
PV_MMX_JOINED(PHADDSW, "phaddsw")
PV_MMX_JOINED(PHSUBW, "phsubw")
PV_MMX_JOINED(PHSUBD, "phsubd")
PV_MMX_JOINED(PHSUBSW, "phsubsw")
PV_MMX_JOINED(PACKSSWB, "packsswb")
PV_MMX_JOINED(PACKUSWB, "packuswb")
PV_MMX_JOINED(PACKSSDW, "packssdw")
PV_MMX_UNPACK_LOW(PUNPCKLBW, "punpcklbw")
PV_MMX_UNPACK_LOW(PUNPCKLWD, "punpcklwd")
PV_MMX_UNPACK_LOW(PUNPCKLDQ, "punpckldq")
PV_MMX_UNPACK_HIGH(PUNPCKHBW, "punpcklbw")
PV_MMX_UNPACK_HIGH(PUNPCKHWD, "punpcklwd")
PV_MMX_UNPACK_HIGH(PUNPCKHDQ, "punpckldq")

// Only three bits of an index choose a byte here.
PV_ROW(PSHUFB_Pq_Qq) {
    u64 indices;
    if (!mm_source(f, i, ea, indices)) return false;
    indices &= 0x8787878787878787;
    enter_mmx(f);
    asm("movq %[d], %%xmm0\n\tmovq %[s], %%xmm1\n\tpshufb %%xmm1, %%xmm0\n\tmovq %%xmm0, %[d]"
        : [d] "+m"(as<8>(mm(f, i.reg)))
        : [s] "m"(indices)
        : PV_CLOBBER);
    mark_written(f, i.reg);
    return true;
}

PV_IMM_ROW(PSHUFW_Pq_Qq_Ib) {
    u64 value;
    if (!mm_source(f, i, ea, value)) return false;
    PV_IMM_VALUE(256);
    u64 result;
    asm("movq %[s], %%xmm1\n\t" PV_COPIES(256,
                                          "pshuflw $pv_imm, %%xmm1, %%xmm0") "movq %%xmm0, %[r]"
        : [imm] "+a"(imm), [r] "=m"(result)
        : [s] "m"(value)
        : PV_CLOBBER, "r10", "cc");
    set_mm(f, i.reg, result);
    return true;
}

PV_ROW(PALIGNR_Pq_Qq_Ib) {
    u64 low;
    if (!mm_source(f, i, ea, low)) return false;
    unsigned shift = static_cast<unsigned>(i.imm & 0xff) * 8;
    u128 both = u128{mm_value(f, i.reg)} << 64 | low;
    set_mm(f, i.reg, shift < 128 ? static_cast<u64>(both >> shift) : 0);
    return true;
}

// --- Shifts -------------------------------------------------------------------------------------

#define PV_MMX_SHIFT(NAME, op)                                                                     \
    PV_MMX(NAME, op)                                                                               \
    PV_ROW(NAME##_Nq_Ib) {                                                                         \
        u64 count = i.imm & 0xff;                                                                  \
        enter_mmx(f);                                                                              \
        asm("movq %[d], %%xmm0\n\tmovq %[n], %%xmm1\n\t" op " %%xmm1, %%xmm0\n\tmovq %%xmm0, %[d]" \
            : [d] "+m"(as<8>(mm(f, i.rm)))                                                         \
            : [n] "m"(count)                                                                       \
            : PV_CLOBBER);                                                                         \
        mark_written(f, i.rm);                                                                     \
        return true;                                                                               \
    }
PV_MMX_SHIFT(PSRLW, "psrlw")
PV_MMX_SHIFT(PSRLD, "psrld")
PV_MMX_SHIFT(PSRLQ, "psrlq")
PV_MMX_SHIFT(PSRAW, "psraw")
PV_MMX_SHIFT(PSRAD, "psrad")
PV_MMX_SHIFT(PSLLW, "psllw")
PV_MMX_SHIFT(PSLLD, "pslld")
PV_MMX_SHIFT(PSLLQ, "psllq")

// --- Moves --------------------------------------------------------------------------------------

namespace {

template <class T>
inline bool general_to_mm(VcpuFrame& f, const Insn& i, u64 ea) {
    T value = static_cast<T>(f.gpr[i.rm]);
    if (i.has_mem && !load(f, i, ea, value)) return false;
    set_mm(f, i.reg, value);
    return true;
}

template <class T>
inline bool mm_to_general(VcpuFrame& f, const Insn& i, u64 ea) {
    auto value = static_cast<T>(mm_value(f, i.reg));
    if (i.has_mem) {
        if (!store(f, i, ea, value)) return false;
    } else {
        f.gpr[i.rm] = value;
    }
    enter_mmx(f);
    return true;
}

}  // namespace

PV_ROW(MOVD_Pq_Ed) {
    return general_to_mm<u32>(f, i, ea);
}
PV_ROW(MOVQ_Pq_Eq) {
    return general_to_mm<u64>(f, i, ea);
}
PV_ROW(MOVD_Ed_Pq) {
    return mm_to_general<u32>(f, i, ea);
}
PV_ROW(MOVQ_Eq_Pq) {
    return mm_to_general<u64>(f, i, ea);
}
PV_ROW(MOVNTQ_Mq_Pq) {
    return mm_to_general<u64>(f, i, ea);
}

PV_ROW(MOVQ_Pq_Qq) {
    u64 value;
    if (!mm_source(f, i, ea, value)) return false;
    set_mm(f, i.reg, value);
    return true;
}
PV_ROW(MOVQ_Qq_Pq) {
    if (i.has_mem) return mm_to_general<u64>(f, i, ea);
    set_mm(f, i.rm, mm_value(f, i.reg));
    return true;
}
PV_ROW(MOVQ2DQ_Vdq_Nq) {
    u64 value[2] = {mm_value(f, i.rm), 0};
    enter_mmx(f);
    std::memcpy(f.ymm[i.reg], value, sizeof value);
    return true;
}
PV_ROW(MOVDQ2Q_Pq_Udq) {
    u64 value;
    std::memcpy(&value, f.ymm[i.rm], sizeof value);
    set_mm(f, i.reg, value);
    return true;
}
PV_ROW(MASKMOVQ_Pq_Nq) {
    if (!store_masked_bytes(f, i, mm(f, i.reg), mm(f, i.rm), 8)) return false;
    enter_mmx(f);
    return true;
}

namespace {

inline bool insert_word(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 word = static_cast<u16>(f.gpr[i.rm]);
    if (i.has_mem && !load(f, i, ea, word)) return false;
    u64 value = mm_value(f, i.reg);
    std::memcpy(reinterpret_cast<u8*>(&value) + (i.imm & 3) * 2, &word, sizeof word);
    set_mm(f, i.reg, value);
    return true;
}

}  // namespace

PV_ROW(PINSRW_Pq_Rd_Ib) {
    return insert_word(f, i, ea);
}
PV_ROW(PINSRW_Pq_Mw_Ib) {
    return insert_word(f, i, ea);
}
PV_ROW(PEXTRW_Gd_Nq_Ib) {
    f.gpr[i.reg] = static_cast<u16>(mm_value(f, i.rm) >> (i.imm & 3) * 16);
    enter_mmx(f);
    return true;
}
PV_ROW(PMOVMSKB_Gd_Nq) {
    u64 value = mm_value(f, i.rm);
    u32 mask;
    asm("movq %[s], %%xmm0\n\tpmovmskb %%xmm0, %[m]" : [m] "=r"(mask) : [s] "m"(value) : "xmm0");
    f.gpr[i.reg] = mask;
    enter_mmx(f);
    return true;
}

// --- Conversions --------------------------------------------------------------------------------

// From memory no MMX register takes part. For CVTPI2PD that leaves the x87 state alone everywhere,
// for CVTPI2PS on AMD's CPUs only (SDM 2, CVTPI2PS; APM 5).
PV_ROW(CVTPI2PS_Vps_Qq) {
    u64 value;
    if (!mm_source(f, i, ea, value)) return false;
    if (!i.has_mem || environment(f).cpuid.intel) enter_mmx(f);
    asm("movq %[s], %%xmm1\n\tcvtdq2ps %%xmm1, %%xmm0\n\tmovlps %%xmm0, %[d]"
        : [d] "=m"(as<8>(f.ymm[i.reg]))
        : [s] "m"(value)
        : PV_CLOBBER);
    return true;
}

namespace {

inline void integers_to_doubles(VcpuFrame& f, const Insn& i, u64 value) {
    asm("cvtdq2pd %[s], %%xmm0\n\tmovaps %%xmm0, %[d]"
        : [d] "=m"(as<16>(f.ymm[i.reg]))
        : [s] "m"(value)
        : PV_CLOBBER);
}

}  // namespace

PV_ROW(CVTPI2PD_Vpd_Nq) {
    integers_to_doubles(f, i, mm_value(f, i.rm));
    enter_mmx(f);
    return true;
}
PV_ROW(CVTPI2PD_Vpd_Mq) {
    u64 value;
    if (!load(f, i, ea, value)) return false;
    integers_to_doubles(f, i, value);
    return true;
}

// From a vector of n bytes to two integers.
#define PV_TO_INTEGERS(id, n, move, op)                                        \
    PV_ROW(id) {                                                               \
        PV_SOURCE(n);                                                          \
        u64 result;                                                            \
        asm(move " %[s], %%xmm1\n\t" op " %%xmm1, %%xmm0\n\tmovq %%xmm0, %[r]" \
            : [r] "=m"(result)                                                 \
            : PV_S(n)                                                          \
            : PV_CLOBBER);                                                     \
        set_mm(f, i.reg, result);                                              \
        return true;                                                           \
    }
PV_TO_INTEGERS(CVTPS2PI_Pq_Wq, 8, "movq", "cvtps2dq")
PV_TO_INTEGERS(CVTTPS2PI_Pq_Wq, 8, "movq", "cvttps2dq")
PV_TO_INTEGERS(CVTPD2PI_Pq_Wdq, 16, "movups", "cvtpd2dq")
PV_TO_INTEGERS(CVTTPD2PI_Pq_Wdq, 16, "movups", "cvttpd2dq")

PV_ROW(EMMS) {
    enter_mmx(f);
    f.x87.tags = 0;
    return true;
}

}  // namespace polyvisor::soft
