// Memory accesses under a mask: MASKMOVDQU, VMASKMOV, VPMASKMOV and the gathers.
//
// Elements that the mask leaves out are not accessed at all, so they cannot fault. A store checks
// all its elements before the first is written; a gather completes element by element and can be
// interrupted by a fault in between, with what it has done so far in its registers.
#include "soft/simd_masked.hpp"

namespace polyvisor::soft {

namespace {

template <class T>
bool sign(const u8* mask, unsigned n) {
    return mask[n * sizeof(T) + sizeof(T) - 1] & 0x80;
}

template <class T>
bool load_masked(VcpuFrame& f, const Insn& i, u64 ea, unsigned bytes) {
    T value[32 / sizeof(T)]{};
    const u8* mask = f.ymm[i.vvvv];
    for (unsigned n = 0; n < bytes / sizeof(T); ++n) {
        if (sign<T>(mask, n) && !load(f, i, masked_address(i, ea, n * sizeof(T)), value[n])) {
            return false;
        }
    }
    std::memcpy(f.ymm[i.reg], value, sizeof value);
    return true;
}

// Element n's index is an Index at position n of the index register; elements are Ts.
template <class T, class Index>
bool gather(VcpuFrame& f, const Insn& i, unsigned vector_bytes) {
    if (i.reg == i.index || i.reg == i.vvvv || i.index == i.vvvv) return raise_ud(f);
    unsigned count = vector_bytes / std::max(sizeof(T), sizeof(Index));
    u8* result = f.ymm[i.reg];
    u8* mask = f.ymm[i.vvvv];
    const u8* indices = f.ymm[i.index];
    // SDM 2, VGATHERDPS: the mask becomes all ones or zeros first, whatever happens then.
    for (unsigned n = 0; n < count; ++n) {
        std::memset(mask + n * sizeof(T), sign<T>(mask, n) ? 0xff : 0, sizeof(T));
    }
    std::memset(mask + count * sizeof(T), 0, 32 - count * sizeof(T));
    u64 base = f.gpr[i.base] + static_cast<u64>(i.disp);
    for (unsigned n = 0; n < count; ++n) {
        if (!sign<T>(mask, n)) continue;
        Index index;
        std::memcpy(&index, indices + n * sizeof(Index), sizeof index);
        u64 offset = static_cast<u64>(static_cast<s64>(index)) << i.scale;
        T value;
        if (!load(f, i, masked_address(i, base, offset), value)) return false;
        std::memcpy(result + n * sizeof(T), &value, sizeof value);
        std::memset(mask + n * sizeof(T), 0, sizeof(T));
    }
    std::memset(result + count * sizeof(T), 0, 32 - count * sizeof(T));
    return true;
}

}  // namespace

template <class T>
bool store_masked(VcpuFrame& f, const Insn& i, u64 ea, const u8* data, const u8* mask,
                  unsigned bytes) {
    unsigned count = bytes / sizeof(T);
    bool one_page = f.long64() && i.segment < kFs && (ea & kPageMask) + bytes <= kPageSize;
    for (unsigned n = 0; n < count && !one_page; ++n) {
        u64 linear;
        if (!sign<T>(mask, n)) continue;
        if (!linear_address(f, i.segment, masked_address(i, ea, n * sizeof(T)), sizeof(T), true,
                            linear) ||
            !probe_write_linear(f, linear, sizeof(T), Privilege::kCurrent, i.segment)) {
            return false;
        }
    }
    for (unsigned n = 0; n < count; ++n) {
        if (sign<T>(mask, n) && !store(f, i, masked_address(i, ea, n * sizeof(T)),
                                       as<sizeof(T)>(data + n * sizeof(T)))) {
            return false;
        }
    }
    return true;
}

bool store_masked_bytes(VcpuFrame& f, const Insn& i, const u8* data, const u8* mask,
                        unsigned bytes) {
    // A mask of zeros does not make an address good that is none (SDM 2 leaves that to the CPU).
    u64 ea = masked_address(i, f.gpr[kRdi], 0), linear;
    if (!linear_address(f, i.segment, ea, bytes, true, linear)) return false;
    if (!canonical(f, linear)) return raise(f, i.segment == kSs ? kSsFault : kGp, 0);
    return store_masked<u8>(f, i, ea, data, mask, bytes);
}

PV_ROW(MASKMOVDQU_Vdq_Udq) {
    return store_masked_bytes(f, i, f.ymm[i.reg], f.ymm[i.rm], 16);
}
PV_ROW(VMASKMOVDQU_Vdq_Udq) {
    return store_masked_bytes(f, i, f.ymm[i.reg], f.ymm[i.rm], 16);
}

#define PV_MASKED(NAME, T, x, bytes)                                          \
    PV_ROW(NAME##_V##x##_H##x##_M##x) {                                       \
        return load_masked<T>(f, i, ea, bytes);                               \
    }                                                                         \
    PV_ROW(NAME##_M##x##_H##x##_V##x) {                                       \
        return store_masked<T>(f, i, ea, f.ymm[i.reg], f.ymm[i.vvvv], bytes); \
    }
PV_MASKED(VMASKMOVPS, u32, dq, 16)
PV_MASKED(VMASKMOVPS, u32, qq, 32)
PV_MASKED(VMASKMOVPD, u64, dq, 16)
PV_MASKED(VMASKMOVPD, u64, qq, 32)
PV_MASKED(VPMASKMOVD, u32, dq, 16)
PV_MASKED(VPMASKMOVD, u32, qq, 32)
PV_MASKED(VPMASKMOVQ, u64, dq, 16)
PV_MASKED(VPMASKMOVQ, u64, qq, 32)

#define PV_GATHER(id, T, Index, bytes)        \
    PV_ROW(id) {                              \
        return gather<T, Index>(f, i, bytes); \
    }
PV_GATHER(VPGATHERDD_Vdq_VMdq_Hdq, u32, s32, 16)
PV_GATHER(VPGATHERDD_Vqq_VMqq_Hqq, u32, s32, 32)
PV_GATHER(VPGATHERDQ_Vdq_VMdq_Hdq, u64, s32, 16)
PV_GATHER(VPGATHERDQ_Vqq_VMqq_Hqq, u64, s32, 32)
PV_GATHER(VPGATHERQD_Vdq_VMdq_Hdq, u32, s64, 16)
PV_GATHER(VPGATHERQD_Vdq_VMqq_Hdq, u32, s64, 32)
PV_GATHER(VPGATHERQQ_Vdq_VMdq_Hdq, u64, s64, 16)
PV_GATHER(VPGATHERQQ_Vqq_VMqq_Hqq, u64, s64, 32)
PV_GATHER(VGATHERDPS_Vdq_VMdq_Hdq, u32, s32, 16)
PV_GATHER(VGATHERDPS_Vqq_VMqq_Hqq, u32, s32, 32)
PV_GATHER(VGATHERDPD_Vdq_VMdq_Hdq, u64, s32, 16)
PV_GATHER(VGATHERDPD_Vqq_VMqq_Hqq, u64, s32, 32)
PV_GATHER(VGATHERQPS_Vdq_VMdq_Hdq, u32, s64, 16)
PV_GATHER(VGATHERQPS_Vdq_VMqq_Hdq, u32, s64, 32)
PV_GATHER(VGATHERQPD_Vdq_VMdq_Hdq, u64, s64, 16)
PV_GATHER(VGATHERQPD_Vqq_VMqq_Hqq, u64, s64, 32)

}  // namespace polyvisor::soft
