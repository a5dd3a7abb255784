// Moves between SIMD registers, memory and general registers: SSE to SSE4.1 and AVX.
//
// The hottest SIMD instructions of all, so they are written out: registers and TLB hits need no
// stack frame, everything else is in slow_load() and slow_store().
#include <emmintrin.h>

#include "soft/simd.hpp"

namespace polyvisor::soft {

namespace {

enum class Upper { kKeep, kClear };  ///< bits 255:128 of the destination: legacy, VEX

inline __m128i* vector(u8* p) {
    return reinterpret_cast<__m128i*>(p);
}
inline const __m128i* vector(const u8* p) {
    return reinterpret_cast<const __m128i*>(p);
}

template <unsigned n, Upper upper>
inline void copy(u8* to, const u8* from) {
    __m128i low = _mm_loadu_si128(vector(from));
    if constexpr (n == 32) {
        __m128i high = _mm_loadu_si128(vector(from + 16));
        _mm_store_si128(vector(to + 16), high);
    } else if constexpr (upper == Upper::kClear) {
        _mm_store_si128(vector(to + 16), _mm_setzero_si128());
    }
    _mm_store_si128(vector(to), low);
}

// Segmented addresses, TLB misses, page crossings.
template <unsigned n, Upper upper>
[[gnu::noinline]] bool slow_load(VcpuFrame& f, const Insn& i, u64 ea) {
    alignas(16) Bytes<n> buffer;
    if (!load(f, i, ea, buffer)) return false;
    copy<n, upper>(f.ymm[i.reg], buffer.b);
    return true;
}
template <unsigned n>
[[gnu::noinline]] bool slow_store(VcpuFrame& f, const Insn& i, u64 ea) {
    return store(f, i, ea, as<n>(f.ymm[i.reg]));
}

template <unsigned n, Upper upper>
inline bool load_vector(VcpuFrame& f, const Insn& i, u64 ea) {
    if (!i.has_mem) {
        copy<n, upper>(f.ymm[i.reg], f.ymm[i.rm]);
        return true;
    }
    u64 linear = i.segment < kFs ? ea : ea + f.seg[i.segment].base;
    u64 entry = (linear >> kPageShift) & 255;
    if (PV_UNLIKELY(!f.long64() || linear + f.tlb_now->neg_r[entry] > kPageSize - n)) {
        return slow_load<n, upper>(f, i, ea);
    }
    copy<n, upper>(f.ymm[i.reg], reinterpret_cast<const u8*>(linear + f.tlb_now->addend[entry]));
    return true;
}

template <unsigned n, Upper upper>
inline bool store_vector(VcpuFrame& f, const Insn& i, u64 ea) {
    if (!i.has_mem) {
        copy<n, upper>(f.ymm[i.rm], f.ymm[i.reg]);
        return true;
    }
    u64 linear = i.segment < kFs ? ea : ea + f.seg[i.segment].base;
    u64 entry = (linear >> kPageShift) & 255;
    if (PV_UNLIKELY(!f.long64() || linear + f.tlb_now->neg_w[entry] > kPageSize - n)) {
        return slow_store<n>(f, i, ea);
    }
    auto* to = vector(reinterpret_cast<u8*>(linear + f.tlb_now->addend[entry]));
    const u8* from = f.ymm[i.reg];
    _mm_storeu_si128(to, _mm_load_si128(vector(from)));
    if constexpr (n == 32) _mm_storeu_si128(to + 1, _mm_load_si128(vector(from + 16)));
    return true;
}

struct Halves {
    u64 low, high;
};

inline Halves halves(const VcpuFrame& f, u8 n) {
    Halves value;
    std::memcpy(&value, f.ymm[n], sizeof value);
    return value;
}
template <Upper upper>
inline void set(VcpuFrame& f, u8 n, Halves value) {
    std::memcpy(f.ymm[n], &value, sizeof value);
    if constexpr (upper == Upper::kClear) clear_upper(f, n);
}

// The low sizeof(T) bytes of a register.
template <class T>
inline T low(const VcpuFrame& f, u8 n) {
    T value;
    std::memcpy(&value, f.ymm[n], sizeof value);
    return value;
}

// MOVD, MOVQ, MOVSS, MOVSD from memory, MOVD from a general register: the rest is cleared.
template <class T, Upper upper>
inline bool load_low(VcpuFrame& f, const Insn& i, u64 ea, const u64* registers) {
    T value;
    if (registers != nullptr && !i.has_mem) {
        value = static_cast<T>(registers[0]);
    } else if (!load(f, i, ea, value)) {
        return false;
    }
    set<upper>(f, i.reg, {value, 0});
    return true;
}

template <class T>
inline bool store_low(VcpuFrame& f, const Insn& i, u64 ea) {
    return store(f, i, ea, low<T>(f, i.reg));
}

template <class T>
inline bool to_general(VcpuFrame& f, const Insn& i, u64 ea) {
    if (i.has_mem) return store_low<T>(f, i, ea);
    f.gpr[i.rm] = low<T>(f, i.reg);
    return true;
}

template <class T>
inline Halves merge_low(Halves into, T value) {
    std::memcpy(&into, &value, sizeof value);
    return into;
}

}  // namespace

#define PV_LOAD(id, n, upper)                          \
    PV_ROW(id) {                                       \
        return load_vector<n, Upper::upper>(f, i, ea); \
    }
#define PV_STORE(id, n, upper)                          \
    PV_ROW(id) {                                        \
        return store_vector<n, Upper::upper>(f, i, ea); \
    }
#define PV_FULL_MOVE(NAME)                  \
    PV_LOAD(NAME##_Vx_Wx, 16, kKeep)        \
    PV_STORE(NAME##_Wx_Vx, 16, kKeep)       \
    PV_LOAD(V##NAME##_Vdq_Wdq, 16, kClear)  \
    PV_STORE(V##NAME##_Wdq_Vdq, 16, kClear) \
    PV_LOAD(V##NAME##_Vqq_Wqq, 32, kKeep)   \
    PV_STORE(V##NAME##_Wqq_Vqq, 32, kKeep)
PV_FULL_MOVE(MOVUPS)
PV_FULL_MOVE(MOVUPD)
PV_FULL_MOVE(MOVAPS)
PV_FULL_MOVE(MOVAPD)
PV_FULL_MOVE(MOVDQA)
PV_FULL_MOVE(MOVDQU)

// The hint not to keep the data in caches is not passed on to the host.
#define PV_STREAMING_STORE(NAME)           \
    PV_STORE(NAME##_Mdq_Vx, 16, kKeep)     \
    PV_STORE(V##NAME##_Mdq_Vdq, 16, kKeep) \
    PV_STORE(V##NAME##_Mqq_Vqq, 32, kKeep)
PV_STREAMING_STORE(MOVNTPS)
PV_STREAMING_STORE(MOVNTPD)
PV_STREAMING_STORE(MOVNTDQ)
#define PV_LOAD_ONLY(NAME)                 \
    PV_LOAD(NAME##_Vx_Mdq, 16, kKeep)      \
    PV_LOAD(V##NAME##_Vdq_Mdq, 16, kClear) \
    PV_LOAD(V##NAME##_Vqq_Mqq, 32, kKeep)
PV_LOAD_ONLY(MOVNTDQA)
PV_LOAD_ONLY(LDDQU)

// --- Scalars ------------------------------------------------------------------------------------

PV_ROW(MOVNTSS_Md_Vss) {
    return store_low<u32>(f, i, ea);
}
PV_ROW(MOVNTSD_Mq_Vsd) {
    return store_low<u64>(f, i, ea);
}

#define PV_SCALAR_MOVE(NAME, T, m, s)                                                \
    PV_ROW(NAME##_V##s##_##m) {                                                      \
        return load_low<T, Upper::kKeep>(f, i, ea, nullptr);                         \
    }                                                                                \
    PV_ROW(NAME##_##m##_V##s) {                                                      \
        return store_low<T>(f, i, ea);                                               \
    }                                                                                \
    PV_ROW(NAME##_V##s##_Udq) {                                                      \
        T value = low<T>(f, i.rm);                                                   \
        std::memcpy(f.ymm[i.reg], &value, sizeof value);                             \
        return true;                                                                 \
    }                                                                                \
    PV_ROW(NAME##_Udq_V##s) {                                                        \
        T value = low<T>(f, i.reg);                                                  \
        std::memcpy(f.ymm[i.rm], &value, sizeof value);                              \
        return true;                                                                 \
    }                                                                                \
    PV_ROW(V##NAME##_V##s##_##m) {                                                   \
        return load_low<T, Upper::kClear>(f, i, ea, nullptr);                        \
    }                                                                                \
    PV_ROW(V##NAME##_##m##_V##s) {                                                   \
        return store_low<T>(f, i, ea);                                               \
    }                                                                                \
    PV_ROW(V##NAME##_V##s##_H##s##_Udq) {                                            \
        set<Upper::kClear>(f, i.reg, merge_low(halves(f, i.vvvv), low<T>(f, i.rm))); \
        return true;                                                                 \
    }                                                                                \
    PV_ROW(V##NAME##_Udq_H##s##_V##s) {                                              \
        set<Upper::kClear>(f, i.rm, merge_low(halves(f, i.vvvv), low<T>(f, i.reg))); \
        return true;                                                                 \
    }
PV_SCALAR_MOVE(MOVSS, u32, Md, ss)
PV_SCALAR_MOVE(MOVSD, u64, Mq, sd)

// --- Halves -------------------------------------------------------------------------------------

#define PV_LOW_MOVE(NAME)                                              \
    PV_ROW(NAME##_Vx_Mq) {                                             \
        u64 value;                                                     \
        if (!load(f, i, ea, value)) return false;                      \
        std::memcpy(f.ymm[i.reg], &value, 8);                          \
        return true;                                                   \
    }                                                                  \
    PV_ROW(NAME##_Mq_Vx) {                                             \
        return store_low<u64>(f, i, ea);                               \
    }                                                                  \
    PV_ROW(V##NAME##_Vdq_Hdq_Mq) {                                     \
        u64 value;                                                     \
        if (!load(f, i, ea, value)) return false;                      \
        set<Upper::kClear>(f, i.reg, {value, halves(f, i.vvvv).high}); \
        return true;                                                   \
    }                                                                  \
    PV_ROW(V##NAME##_Mq_Vdq) {                                         \
        return store_low<u64>(f, i, ea);                               \
    }
PV_LOW_MOVE(MOVLPS)
PV_LOW_MOVE(MOVLPD)

#define PV_HIGH_MOVE(NAME)                                            \
    PV_ROW(NAME##_Vx_Mq) {                                            \
        u64 value;                                                    \
        if (!load(f, i, ea, value)) return false;                     \
        std::memcpy(f.ymm[i.reg] + 8, &value, 8);                     \
        return true;                                                  \
    }                                                                 \
    PV_ROW(NAME##_Mq_Vx) {                                            \
        return store(f, i, ea, halves(f, i.reg).high);                \
    }                                                                 \
    PV_ROW(V##NAME##_Vdq_Hdq_Mq) {                                    \
        u64 value;                                                    \
        if (!load(f, i, ea, value)) return false;                     \
        set<Upper::kClear>(f, i.reg, {halves(f, i.vvvv).low, value}); \
        return true;                                                  \
    }                                                                 \
    PV_ROW(V##NAME##_Mq_Vdq) {                                        \
        return store(f, i, ea, halves(f, i.reg).high);                \
    }
PV_HIGH_MOVE(MOVHPS)
PV_HIGH_MOVE(MOVHPD)

PV_ROW(MOVHLPS_Vx_Udq) {
    set<Upper::kKeep>(f, i.reg, {halves(f, i.rm).high, halves(f, i.reg).high});
    return true;
}
PV_ROW(VMOVHLPS_Vdq_Hdq_Udq) {
    set<Upper::kClear>(f, i.reg, {halves(f, i.rm).high, halves(f, i.vvvv).high});
    return true;
}
PV_ROW(MOVLHPS_Vx_Udq) {
    set<Upper::kKeep>(f, i.reg, {halves(f, i.reg).low, halves(f, i.rm).low});
    return true;
}
PV_ROW(VMOVLHPS_Vdq_Hdq_Udq) {
    set<Upper::kClear>(f, i.reg, {halves(f, i.vvvv).low, halves(f, i.rm).low});
    return true;
}

// --- MOVD, MOVQ ---------------------------------------------------------------------------------

PV_ROW(MOVD_Vdq_Ed) {
    return load_low<u32, Upper::kKeep>(f, i, ea, &f.gpr[i.rm]);
}
PV_ROW(MOVQ_Vdq_Eq) {
    return load_low<u64, Upper::kKeep>(f, i, ea, &f.gpr[i.rm]);
}
PV_ROW(VMOVD_Vdq_Ed) {
    return load_low<u32, Upper::kClear>(f, i, ea, &f.gpr[i.rm]);
}
PV_ROW(VMOVQ_Vdq_Eq) {
    return load_low<u64, Upper::kClear>(f, i, ea, &f.gpr[i.rm]);
}
PV_ROW(MOVD_Ed_Vdq) {
    return to_general<u32>(f, i, ea);
}
PV_ROW(MOVQ_Eq_Vdq) {
    return to_general<u64>(f, i, ea);
}
PV_ROW(VMOVD_Ed_Vdq) {
    return to_general<u32>(f, i, ea);
}
PV_ROW(VMOVQ_Eq_Vdq) {
    return to_general<u64>(f, i, ea);
}

#define PV_MOVQ(NAME, upper)                                   \
    PV_ROW(NAME##_Vq_Wq) {                                     \
        u64 value = low<u64>(f, i.rm);                         \
        if (i.has_mem && !load(f, i, ea, value)) return false; \
        set<Upper::upper>(f, i.reg, {value, 0});               \
        return true;                                           \
    }                                                          \
    PV_ROW(NAME##_Wq_Vq) {                                     \
        if (i.has_mem) return store_low<u64>(f, i, ea);        \
        set<Upper::upper>(f, i.rm, {low<u64>(f, i.reg), 0});   \
        return true;                                           \
    }
PV_MOVQ(MOVQ, kKeep)
PV_MOVQ(VMOVQ, kClear)

// --- Insertion and extraction of elements -------------------------------------------------------

namespace {

// The r32/m8 or r32/m16 source of PINSRB and PINSRW is two rows: Rd (register) and M.
template <class T>
inline bool element_source(VcpuFrame& f, const Insn& i, u64 ea, T& value) {
    if (i.has_mem) return load(f, i, ea, value);
    value = static_cast<T>(f.gpr[i.rm]);
    return true;
}

template <class T>
inline bool insert(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    if (!element_source(f, i, ea, value)) return false;
    unsigned at = (i.imm & (16 / sizeof(T) - 1)) * sizeof(T);
    std::memcpy(f.ymm[i.reg] + at, &value, sizeof value);
    return true;
}

template <class T>
inline bool vex_insert(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    if (!element_source(f, i, ea, value)) return false;
    unsigned at = (i.imm & (16 / sizeof(T) - 1)) * sizeof(T);
    copy<16, Upper::kClear>(f.ymm[i.reg], f.ymm[i.vvvv]);
    std::memcpy(f.ymm[i.reg] + at, &value, sizeof value);
    return true;
}

template <class T>
inline T element(const VcpuFrame& f, const Insn& i, u8 n) {
    T value;
    std::memcpy(&value, f.ymm[n] + (i.imm & (16 / sizeof(T) - 1)) * sizeof(T), sizeof value);
    return value;
}

template <class T>
inline bool extract(VcpuFrame& f, const Insn& i, u64 ea) {
    T value = element<T>(f, i, i.reg);
    if (i.has_mem) return store(f, i, ea, value);
    f.gpr[i.rm] = value;
    return true;
}

}  // namespace

PV_ROW(PINSRB_Vdq_Rd_Ib) {
    return insert<u8>(f, i, ea);
}
PV_ROW(PINSRB_Vdq_Mb_Ib) {
    return insert<u8>(f, i, ea);
}
PV_ROW(PINSRW_Vdq_Rd_Ib) {
    return insert<u16>(f, i, ea);
}
PV_ROW(PINSRW_Vdq_Mw_Ib) {
    return insert<u16>(f, i, ea);
}
PV_ROW(PINSRD_Vdq_Ed_Ib) {
    return insert<u32>(f, i, ea);
}
PV_ROW(PINSRQ_Vdq_Eq_Ib) {
    return insert<u64>(f, i, ea);
}
PV_ROW(VPINSRB_Vdq_Hdq_Rd_Ib) {
    return vex_insert<u8>(f, i, ea);
}
PV_ROW(VPINSRB_Vdq_Hdq_Mb_Ib) {
    return vex_insert<u8>(f, i, ea);
}
PV_ROW(VPINSRW_Vdq_Hdq_Rd_Ib) {
    return vex_insert<u16>(f, i, ea);
}
PV_ROW(VPINSRW_Vdq_Hdq_Mw_Ib) {
    return vex_insert<u16>(f, i, ea);
}
PV_ROW(VPINSRD_Vdq_Hdq_Ed_Ib) {
    return vex_insert<u32>(f, i, ea);
}
PV_ROW(VPINSRQ_Vdq_Hdq_Eq_Ib) {
    return vex_insert<u64>(f, i, ea);
}

PV_ROW(PEXTRB_Rd_Vdq_Ib) {
    return extract<u8>(f, i, ea);
}
PV_ROW(PEXTRB_Mb_Vdq_Ib) {
    return extract<u8>(f, i, ea);
}
PV_ROW(PEXTRW_Rd_Vdq_Ib) {
    return extract<u16>(f, i, ea);
}
PV_ROW(PEXTRW_Mw_Vdq_Ib) {
    return extract<u16>(f, i, ea);
}
PV_ROW(PEXTRD_Ed_Vdq_Ib) {
    return extract<u32>(f, i, ea);
}
PV_ROW(PEXTRQ_Eq_Vdq_Ib) {
    return extract<u64>(f, i, ea);
}
PV_ROW(EXTRACTPS_Ed_Vdq_Ib) {
    return extract<u32>(f, i, ea);
}
PV_ROW(VPEXTRB_Rd_Vdq_Ib) {
    return extract<u8>(f, i, ea);
}
PV_ROW(VPEXTRB_Mb_Vdq_Ib) {
    return extract<u8>(f, i, ea);
}
PV_ROW(VPEXTRW_Rd_Vdq_Ib) {
    return extract<u16>(f, i, ea);
}
PV_ROW(VPEXTRW_Mw_Vdq_Ib) {
    return extract<u16>(f, i, ea);
}
PV_ROW(VPEXTRD_Ed_Vdq_Ib) {
    return extract<u32>(f, i, ea);
}
PV_ROW(VPEXTRQ_Eq_Vdq_Ib) {
    return extract<u64>(f, i, ea);
}
PV_ROW(VEXTRACTPS_Ed_Vdq_Ib) {
    return extract<u32>(f, i, ea);
}

// The older encoding of PEXTRW has the general register in ModRM.reg.
PV_ROW(PEXTRW_Gd_Udq_Ib) {
    f.gpr[i.reg] = element<u16>(f, i, i.rm);
    return true;
}
PV_ROW(VPEXTRW_Gd_Udq_Ib) {
    return rows::PEXTRW_Gd_Udq_Ib(f, i, ea);
}

// --- Masks of signs -----------------------------------------------------------------------------

#define PV_SIGNS(id, n, fetch, op, end)     \
    PV_ROW(id) {                            \
        u32 mask;                           \
        asm(fetch "\n\t" op ", %[mask]" end \
            : [mask] "=r"(mask)             \
            : [s] "m"(as<n>(f.ymm[i.rm]))   \
            : PV_CLOBBER);                  \
        f.gpr[i.reg] = mask;                \
        return true;                        \
    }
#define PV_SIGNS_ALL(NAME, op)                                              \
    PV_SIGNS(NAME##_Gd_Udq, 16, "movaps %[s], %%xmm0", op " %%xmm0", "")    \
    PV_SIGNS(V##NAME##_Gd_Udq, 16, "movaps %[s], %%xmm0", op " %%xmm0", "") \
    PV_SIGNS(V##NAME##_Gd_Uqq, 32, "vmovdqa %[s], %%ymm0", "v" op " %%ymm0", "\n\tvzeroupper")
PV_SIGNS_ALL(PMOVMSKB, "pmovmskb")
PV_SIGNS_ALL(MOVMSKPS, "movmskps")
PV_SIGNS_ALL(MOVMSKPD, "movmskpd")

}  // namespace polyvisor::soft
