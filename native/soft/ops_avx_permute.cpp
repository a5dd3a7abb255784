// AVX and AVX2 data movement without an SSE ancestor: broadcast, permute, insert and extract lanes.
#include "soft/simd.hpp"

namespace polyvisor::soft {

// --- Broadcast ----------------------------------------------------------------------------------

#define PV_BROADCAST(NAME, w, n, op)       \
    PV_VEX128_UNARY(NAME##_Vdq_##w, n, op) \
    PV_VEX256_UNARY(NAME##_Vqq_##w, n, op)
PV_BROADCAST(VPBROADCASTB, Wb, 1, "vpbroadcastb")
PV_BROADCAST(VPBROADCASTW, Ww, 2, "vpbroadcastw")
PV_BROADCAST(VPBROADCASTD, Wd, 4, "vpbroadcastd")
PV_BROADCAST(VPBROADCASTQ, Wq, 8, "vpbroadcastq")
// From a register these are AVX2, from memory AVX: two rows each.
PV_BROADCAST(VBROADCASTSS, Md, 4, "vbroadcastss")
PV_BROADCAST(VBROADCASTSS, Udq, 4, "vbroadcastss")
PV_VEX256_UNARY(VBROADCASTSD_Vqq_Mq, 8, "vbroadcastsd")
PV_VEX256_UNARY(VBROADCASTSD_Vqq_Udq, 8, "vbroadcastsd")
PV_VEX256_UNARY(VBROADCASTF128_Vqq_Mdq, 16, "vbroadcastf128")
PV_VEX256_UNARY(VBROADCASTI128_Vqq_Mdq, 16, "vbroadcasti128")

// --- Permute ------------------------------------------------------------------------------------

PV_VEX256(VPERMD_Vqq_Hqq_Wqq, 32, "vpermd")
PV_VEX256(VPERMPS_Vqq_Hqq_Wqq, 32, "vpermps")
PV_VEX256_UNARY_IMM(VPERMQ_Vqq_Wqq_Ib, 256, "vpermq")
PV_VEX256_UNARY_IMM(VPERMPD_Vqq_Wqq_Ib, 256, "vpermpd")
PV_VEX128(VPERMILPS_Vdq_Hdq_Wdq, 16, "vpermilps")
PV_VEX256(VPERMILPS_Vqq_Hqq_Wqq, 32, "vpermilps")
PV_VEX128(VPERMILPD_Vdq_Hdq_Wdq, 16, "vpermilpd")
PV_VEX256(VPERMILPD_Vqq_Hqq_Wqq, 32, "vpermilpd")
PV_VEX128_UNARY_IMM(VPERMILPS_Vdq_Wdq_Ib, 256, "vpermilps")
PV_VEX256_UNARY_IMM(VPERMILPS_Vqq_Wqq_Ib, 256, "vpermilps")
PV_VEX128_UNARY_IMM(VPERMILPD_Vdq_Wdq_Ib, 4, "vpermilpd")
PV_VEX256_UNARY_IMM(VPERMILPD_Vqq_Wqq_Ib, 16, "vpermilpd")
PV_VEX256_IMM(VPERM2F128_Vqq_Hqq_Wqq_Ib, 256, "vperm2f128")
PV_VEX256_IMM(VPERM2I128_Vqq_Hqq_Wqq_Ib, 256, "vperm2i128")
PV_VEX128_IMM(VPBLENDD_Vdq_Hdq_Wdq_Ib, 16, "vmovdqu", 16, "vpblendd")
PV_VEX256_IMM(VPBLENDD_Vqq_Hqq_Wqq_Ib, 256, "vpblendd")

// --- Lanes --------------------------------------------------------------------------------------

namespace {

inline bool insert_lane(VcpuFrame& f, const Insn& i, u64 ea) {
    PV_SOURCE(16);
    Bytes<16> lane = as<16>(src);  // may be the destination, or the other source
    as<32>(f.ymm[i.reg]) = as<32>(f.ymm[i.vvvv]);
    as<16>(f.ymm[i.reg] + (i.imm & 1) * 16) = lane;
    return true;
}

inline bool extract_lane(VcpuFrame& f, const Insn& i, u64 ea) {
    const Bytes<16>& lane = as<16>(f.ymm[i.reg] + (i.imm & 1) * 16);
    if (i.has_mem) return store(f, i, ea, lane);
    Bytes<16> value = lane;
    as<16>(f.ymm[i.rm]) = value;
    clear_upper(f, i.rm);
    return true;
}

}  // namespace

PV_ROW(VINSERTF128_Vqq_Hqq_Wdq_Ib) {
    return insert_lane(f, i, ea);
}
PV_ROW(VINSERTI128_Vqq_Hqq_Wdq_Ib) {
    return insert_lane(f, i, ea);
}
PV_ROW(VEXTRACTF128_Wdq_Vqq_Ib) {
    return extract_lane(f, i, ea);
}
PV_ROW(VEXTRACTI128_Wdq_Vqq_Ib) {
    return extract_lane(f, i, ea);
}

// --- Clearing -----------------------------------------------------------------------------------

// Outside 64-bit mode only the registers that exist there (SDM 2, VZEROALL).
PV_ROW(VZEROUPPER) {
    for (u8 n = 0; n < (f.long64() ? 16 : 8); ++n) clear_upper(f, n);
    return true;
}
PV_ROW(VZEROALL) {
    std::memset(f.ymm, 0, (f.long64() ? 16 : 8) * sizeof f.ymm[0]);
    return true;
}

}  // namespace polyvisor::soft
