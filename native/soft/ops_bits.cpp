// Bit operations: shifts and rotates, BT*, bit scans and counts, BMI1/2, CRC32, MOVBE, BSWAP,
// RDRAND.
#include "soft/bindings.hpp"
#include "soft/environment.hpp"
#include "soft/operands.hpp"

namespace polyvisor::soft {
namespace {

// --- Shifts and rotates --------------------------------------------------------------------------

enum class Shift { kRol, kRor, kRcl, kRcr, kShl, kShr, kSar };
enum class Count { kImm, kOne, kCl };

/// The host masks the count as the guest's CPU would, and leaves the flags alone when it is 0.
template <Shift K, class T>
inline T shift(u16& flags, T a, u8 count) {
#define PV_SHIFT(kind, text)                        \
    if constexpr (K == Shift::kind)                 \
    asm(PV_FLAGS_IN text " %%cl, %[a]" PV_FLAGS_OUT \
        : "+&a"(flags), [a] "+&r"(a)                \
        : "c"(count)                                \
        : "cc")
    PV_SHIFT(kRol, "rol");
    PV_SHIFT(kRor, "ror");
    PV_SHIFT(kRcl, "rcl");
    PV_SHIFT(kRcr, "rcr");
    PV_SHIFT(kShl, "shl");
    PV_SHIFT(kShr, "shr");
    PV_SHIFT(kSar, "sar");
#undef PV_SHIFT
    return a;
}

template <Count C>
inline u8 shift_count(const VcpuFrame& f, const Insn& i) {
    return C == Count::kOne ? u8{1} : static_cast<u8>(C == Count::kImm ? i.imm : f.gpr[kRcx]);
}

template <Shift K, Count C, class T>
bool shift_e(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 count = shift_count<C>(f, i);
    return modify<T>(f, i, ea, [&](T a) { return shift<K>(f.oszapc, a, count); }, [](T*) {});
}
template <Shift K, Count C>
bool shift_e_v(VcpuFrame& f, const Insn& i, u64 ea) {
    switch (i.opsize) {
        case 4:
            return shift_e<K, C, u32>(f, i, ea);
        case 8:
            return shift_e<K, C, u64>(f, i, ea);
        default:
            return shift_e<K, C, u16>(f, i, ea);
    }
}

template <bool Left, Count C, class T>
bool double_shift(VcpuFrame& f, const Insn& i, u64 ea) {
    T from = get_reg<T>(f, i, i.reg);
    u8 count = shift_count<C>(f, i);
    return modify<T>(
        f, i, ea,
        [&](T a) {
            if constexpr (Left) {
                asm(PV_FLAGS_IN "shld %%cl, %[b], %[a]" PV_FLAGS_OUT
                    : "+&a"(f.oszapc), [a] "+&r"(a)
                    : [b] "r"(from), "c"(count)
                    : "cc");
            } else {
                asm(PV_FLAGS_IN "shrd %%cl, %[b], %[a]" PV_FLAGS_OUT
                    : "+&a"(f.oszapc), [a] "+&r"(a)
                    : [b] "r"(from), "c"(count)
                    : "cc");
            }
            return a;
        },
        [](T*) {});
}
template <bool Left, Count C>
bool double_shift_v(VcpuFrame& f, const Insn& i, u64 ea) {
    switch (i.opsize) {
        case 4:
            return double_shift<Left, C, u32>(f, i, ea);
        case 8:
            return double_shift<Left, C, u64>(f, i, ea);
        default:
            return double_shift<Left, C, u16>(f, i, ea);
    }
}

// --- BT, BTS, BTR, BTC ---------------------------------------------------------------------------

enum class Bit { kTest, kSet, kReset, kComplement };

template <Bit K, class T>
inline T bit_op(u16& flags, T a, T offset) {
#define PV_BIT(kind, text)                          \
    if constexpr (K == Bit::kind)                   \
    asm(PV_FLAGS_IN text " %[b], %[a]" PV_FLAGS_OUT \
        : "+&a"(flags), [a] "+&r"(a)                \
        : [b] "r"(offset)                           \
        : "cc")
    PV_BIT(kTest, "bt");
    PV_BIT(kSet, "bts");
    PV_BIT(kReset, "btr");
    PV_BIT(kComplement, "btc");
#undef PV_BIT
    return a;
}
/// offset < bits of T: a register offset would reach beyond the operand.
template <Bit K, class T>
inline void bit_op_locked(u16& flags, T* p, T offset) {
#define PV_BIT(kind, text)                                           \
    if constexpr (K == Bit::kind)                                    \
    asm volatile(PV_FLAGS_IN "lock " text " %[b], %[p]" PV_FLAGS_OUT \
                 : "+&a"(flags), [p] "+m"(*p)                        \
                 : [b] "r"(offset)                                   \
                 : "cc", "memory")
    PV_BIT(kSet, "bts");
    PV_BIT(kReset, "btr");
    PV_BIT(kComplement, "btc");
#undef PV_BIT
}

template <Bit K, class T>
inline bool bit_at(VcpuFrame& f, const Insn& i, u64 ea, T offset) {
    if constexpr (K == Bit::kTest) {
        T a;
        if (!read_e(f, i, ea, a)) return false;
        bit_op<K>(f.oszapc, a, offset);
        return true;
    } else {
        return modify<T>(
            f, i, ea, [&](T a) { return bit_op<K>(f.oszapc, a, offset); },
            [&](T* p) { bit_op_locked<K>(f.oszapc, p, offset); });
    }
}
/// A register bit offset is signed and reaches memory beyond the operand (SDM 1, 3.1.1.9).
template <Bit K, class T>
bool bit_eg(VcpuFrame& f, const Insn& i, u64 ea) {
    constexpr unsigned width = sizeof(T) * 8;
    T offset = get_reg<T>(f, i, i.reg);
    if (i.has_mem) {
        s64 units = static_cast<std::make_signed_t<T>>(offset) / static_cast<s64>(width);
        if (static_cast<std::make_signed_t<T>>(offset) % static_cast<s64>(width) < 0) --units;
        ea = (ea + static_cast<u64>(units) * sizeof(T)) & address_mask(i);
    }
    return bit_at<K, T>(f, i, ea, offset & (width - 1));
}
template <Bit K, class T>
bool bit_ei(VcpuFrame& f, const Insn& i, u64 ea) {
    return bit_at<K, T>(f, i, ea, static_cast<T>(i.imm & (sizeof(T) * 8 - 1)));
}
template <Bit K>
bool bit_eg_v(VcpuFrame& f, const Insn& i, u64 ea) {
    switch (i.opsize) {
        case 4:
            return bit_eg<K, u32>(f, i, ea);
        case 8:
            return bit_eg<K, u64>(f, i, ea);
        default:
            return bit_eg<K, u16>(f, i, ea);
    }
}
template <Bit K>
bool bit_ei_v(VcpuFrame& f, const Insn& i, u64 ea) {
    switch (i.opsize) {
        case 4:
            return bit_ei<K, u32>(f, i, ea);
        case 8:
            return bit_ei<K, u64>(f, i, ea);
        default:
            return bit_ei<K, u16>(f, i, ea);
    }
}

// --- Scans and counts ----------------------------------------------------------------------------

enum class Scan { kBsf, kBsr, kTzcnt, kLzcnt, kPopcnt };

/// On whole registers: BSF and BSR leave the destination alone when the source is 0, how much of it
/// is the host's to say.
template <Scan K, class T>
bool scan(VcpuFrame& f, const Insn& i, u64 ea) {
    T source;
    if (!read_e(f, i, ea, source)) return false;
    u64 result = f.gpr[i.reg];
#define PV_SCAN(kind, text)                                   \
    if constexpr (K == Scan::kind) {                          \
        if constexpr (sizeof(T) == 2)                         \
            asm(PV_FLAGS_IN text " %w[s], %w[d]" PV_FLAGS_OUT \
                : "+&a"(f.oszapc), [d] "+&r"(result)          \
                : [s] "r"(source)                             \
                : "cc");                                      \
        if constexpr (sizeof(T) == 4)                         \
            asm(PV_FLAGS_IN text " %k[s], %k[d]" PV_FLAGS_OUT \
                : "+&a"(f.oszapc), [d] "+&r"(result)          \
                : [s] "r"(source)                             \
                : "cc");                                      \
        if constexpr (sizeof(T) == 8)                         \
            asm(PV_FLAGS_IN text " %q[s], %q[d]" PV_FLAGS_OUT \
                : "+&a"(f.oszapc), [d] "+&r"(result)          \
                : [s] "r"(source)                             \
                : "cc");                                      \
    }
    PV_SCAN(kBsf, "bsf")
    PV_SCAN(kBsr, "bsr")
    PV_SCAN(kTzcnt, "tzcnt")
    PV_SCAN(kLzcnt, "lzcnt")
    PV_SCAN(kPopcnt, "popcnt")
#undef PV_SCAN
    f.gpr[i.reg] = result;
    return true;
}
template <Scan K>
bool scan_v(VcpuFrame& f, const Insn& i, u64 ea) {
    switch (i.opsize) {
        case 4:
            return scan<K, u32>(f, i, ea);
        case 8:
            return scan<K, u64>(f, i, ea);
        default:
            return scan<K, u16>(f, i, ea);
    }
}

// --- BMI1, BMI2 ----------------------------------------------------------------------------------

// y operands: 8 bytes with W in 64-bit mode, else 4.

#define PV_BY_Y(call) (i.rex_w && f.long64() ? call<u64>(f, i, ea) : call<u32>(f, i, ea))

template <class T>
bool andn_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    T result;
    asm(PV_FLAGS_IN "andn %[b], %[a], %[r]" PV_FLAGS_OUT
        : "+&a"(f.oszapc), [r] "=&r"(result)
        : [a] "r"(get_reg<T>(f, i, i.vvvv)), [b] "r"(b)
        : "cc");
    set_reg<T>(f, i, i.reg, result);
    return true;
}
bool andn(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_Y(andn_y);
}

enum class Lowest { kBlsr, kBlsmsk, kBlsi };
template <Lowest K, class T>
bool lowest_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T source;
    if (!read_e(f, i, ea, source)) return false;
    T result = 0;
#define PV_LOWEST(kind, text)                       \
    if constexpr (K == Lowest::kind)                \
    asm(PV_FLAGS_IN text " %[s], %[r]" PV_FLAGS_OUT \
        : "+&a"(f.oszapc), [r] "=&r"(result)        \
        : [s] "r"(source)                           \
        : "cc")
    PV_LOWEST(kBlsr, "blsr");
    PV_LOWEST(kBlsmsk, "blsmsk");
    PV_LOWEST(kBlsi, "blsi");
#undef PV_LOWEST
    set_reg<T>(f, i, i.vvvv, result);
    return true;
}
template <Lowest K>
bool lowest(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.rex_w && f.long64() ? lowest_y<K, u64>(f, i, ea) : lowest_y<K, u32>(f, i, ea);
}

/// BEXTR, BZHI: G = E by a control in vvvv.
template <bool Extract, class T>
bool extract_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T source;
    if (!read_e(f, i, ea, source)) return false;
    T control = get_reg<T>(f, i, i.vvvv);
    T result;
    if constexpr (Extract) {
        asm(PV_FLAGS_IN "bextr %[c], %[s], %[r]" PV_FLAGS_OUT
            : "+&a"(f.oszapc), [r] "=&r"(result)
            : [s] "r"(source), [c] "r"(control)
            : "cc");
    } else {
        asm(PV_FLAGS_IN "bzhi %[c], %[s], %[r]" PV_FLAGS_OUT
            : "+&a"(f.oszapc), [r] "=&r"(result)
            : [s] "r"(source), [c] "r"(control)
            : "cc");
    }
    set_reg<T>(f, i, i.reg, result);
    return true;
}
template <bool Extract>
bool extract(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.rex_w && f.long64() ? extract_y<Extract, u64>(f, i, ea)
                                 : extract_y<Extract, u32>(f, i, ea);
}

template <bool Deposit, class T>
bool pdep_pext_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T mask;
    if (!read_e(f, i, ea, mask)) return false;
    T source = get_reg<T>(f, i, i.vvvv);
    T result;
    if constexpr (Deposit) {
        asm("pdep %[m], %[s], %[r]" : [r] "=r"(result) : [s] "r"(source), [m] "r"(mask));
    } else {
        asm("pext %[m], %[s], %[r]" : [r] "=r"(result) : [s] "r"(source), [m] "r"(mask));
    }
    set_reg<T>(f, i, i.reg, result);
    return true;
}
template <bool Deposit>
bool pdep_pext(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.rex_w && f.long64() ? pdep_pext_y<Deposit, u64>(f, i, ea)
                                 : pdep_pext_y<Deposit, u32>(f, i, ea);
}

/// The high half is written last: with equal destinations it wins.
template <class T>
bool mulx_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    u128 product = u128{static_cast<T>(f.gpr[kRdx])} * b;
    set_reg<T>(f, i, i.vvvv, static_cast<T>(product));
    set_reg<T>(f, i, i.reg, static_cast<T>(product >> (sizeof(T) * 8)));
    return true;
}
bool mulx(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_Y(mulx_y);
}

template <class T>
bool rorx_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T a;
    if (!read_e(f, i, ea, a)) return false;
    set_reg<T>(f, i, i.reg, std::rotr(a, static_cast<int>(i.imm & (sizeof(T) * 8 - 1))));
    return true;
}
bool rorx(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_Y(rorx_y);
}

template <Shift K, class T>
bool shift_x_y(VcpuFrame& f, const Insn& i, u64 ea) {
    T a;
    if (!read_e(f, i, ea, a)) return false;
    unsigned count = get_reg<T>(f, i, i.vvvv) & (sizeof(T) * 8 - 1);
    T result;
    if constexpr (K == Shift::kShl) {
        result = a << count;
    } else if constexpr (K == Shift::kShr) {
        result = a >> count;
    } else {
        result = static_cast<T>(static_cast<std::make_signed_t<T>>(a) >> count);
    }
    set_reg<T>(f, i, i.reg, result);
    return true;
}
template <Shift K>
bool shift_x(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.rex_w && f.long64() ? shift_x_y<K, u64>(f, i, ea) : shift_x_y<K, u32>(f, i, ea);
}

// --- CRC32, MOVBE, BSWAP -------------------------------------------------------------------------

template <class T>
bool crc32_e(VcpuFrame& f, const Insn& i, u64 ea) {
    T source;
    if (!read_e(f, i, ea, source)) return false;
    u64 crc = static_cast<u32>(f.gpr[i.reg]);
    if constexpr (sizeof(T) == 1) asm("crc32b %b[s], %k[c]" : [c] "+r"(crc) : [s] "r"(source));
    if constexpr (sizeof(T) == 2) asm("crc32w %w[s], %k[c]" : [c] "+r"(crc) : [s] "r"(source));
    if constexpr (sizeof(T) == 4) asm("crc32l %k[s], %k[c]" : [c] "+r"(crc) : [s] "r"(source));
    if constexpr (sizeof(T) == 8) asm("crc32q %q[s], %q[c]" : [c] "+r"(crc) : [s] "r"(source));
    f.gpr[i.reg] = crc;
    return true;
}
bool crc32_ev(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(crc32_e);
}

template <class T>
inline T swap_bytes(T value) {
    if constexpr (sizeof(T) == 2) return __builtin_bswap16(value);
    if constexpr (sizeof(T) == 4) return __builtin_bswap32(value);
    if constexpr (sizeof(T) == 8) return __builtin_bswap64(value);
}
template <class T>
bool movbe_load(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    if (!load(f, i, ea, value)) return false;
    set_reg<T>(f, i, i.reg, swap_bytes(value));
    return true;
}
template <class T>
bool movbe_store(VcpuFrame& f, const Insn& i, u64 ea) {
    return store(f, i, ea, swap_bytes(get_reg<T>(f, i, i.reg)));
}
bool movbe_gm(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(movbe_load);
}
bool movbe_mg(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(movbe_store);
}

/// 16-bit BSWAP is undefined: as the host does it.
bool bswap(VcpuFrame& f, const Insn& i, u64) {
    u64 value = f.gpr[i.rm];
    if (i.opsize == 8) {
        value = __builtin_bswap64(value);
    } else if (i.opsize == 4) {
        value = __builtin_bswap32(static_cast<u32>(value));
    } else {
        asm(".byte 0x66\n\tbswap %k0" : "+r"(value));
    }
    f.gpr[i.rm] = value;
    return true;
}

// --- RDRAND, RDSEED ------------------------------------------------------------------------------

/// Deterministic mode: a hash (splitmix64's finalizer) of virtual time, the place and the CPU, so
/// that it needs no state of its own and goes on the same after a snapshot.
u64 deterministic_random(VcpuFrame& f, const Insn& i) {
    u64 x = read_tsc(f) * 0x9e3779b97f4a7c15 + current_ip(f, i) + (u64{environment(f).id} << 56) +
            (f.retired << 20);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

template <bool Seed>
bool random(VcpuFrame& f, const Insn& i, u64) {
    u64 value;
    bool ok = true;
    if (environment(f).deterministic) {
        value = deterministic_random(f, i) ^ (Seed ? 0x5851f42d4c957f2d : 0);
    } else if constexpr (Seed) {
        asm volatile("rdseed %0\n\tsetc %b1" : "=r"(value), "=q"(ok) : : "cc");
    } else {
        asm volatile("rdrand %0\n\tsetc %b1" : "=r"(value), "=q"(ok) : : "cc");
    }
    write_reg(f, i.rm, i.opsize, ok ? value : 0);
    f.oszapc = static_cast<u16>(0x200 | (ok ? kStatusC : 0));
    return true;
}

#define PV_SHIFT_ROWS(NAME, suffix, kind)                                        \
    bind<Op::NAME##_Eb_Ib##suffix, shift_e<Shift::kind, Count::kImm, u8>>(),     \
        bind<Op::NAME##_Ev_Ib##suffix, shift_e_v<Shift::kind, Count::kImm>>(),   \
        bind<Op::NAME##_Eb_I1##suffix, shift_e<Shift::kind, Count::kOne, u8>>(), \
        bind<Op::NAME##_Ev_I1##suffix, shift_e_v<Shift::kind, Count::kOne>>(),   \
        bind<Op::NAME##_Eb_CL##suffix, shift_e<Shift::kind, Count::kCl, u8>>(),  \
        bind<Op::NAME##_Ev_CL##suffix, shift_e_v<Shift::kind, Count::kCl>>()

const OpBinding kBitOps[] = {
    PV_SHIFT_ROWS(ROL, , kRol),
    PV_SHIFT_ROWS(ROR, , kRor),
    PV_SHIFT_ROWS(RCL, , kRcl),
    PV_SHIFT_ROWS(RCR, , kRcr),
    PV_SHIFT_ROWS(SHL, , kShl),
    PV_SHIFT_ROWS(SHR, , kShr),
    PV_SHIFT_ROWS(SHL, _6, kShl),
    PV_SHIFT_ROWS(SAR, , kSar),
    bind<Op::SHLD_Ev_Gv_Ib, double_shift_v<true, Count::kImm>>(),
    bind<Op::SHLD_Ev_Gv_CL, double_shift_v<true, Count::kCl>>(),
    bind<Op::SHRD_Ev_Gv_Ib, double_shift_v<false, Count::kImm>>(),
    bind<Op::SHRD_Ev_Gv_CL, double_shift_v<false, Count::kCl>>(),
    bind<Op::BT_Ev_Gv, bit_eg_v<Bit::kTest>>(),
    bind<Op::BTS_Ev_Gv, bit_eg_v<Bit::kSet>>(),
    bind<Op::BTR_Ev_Gv, bit_eg_v<Bit::kReset>>(),
    bind<Op::BTC_Ev_Gv, bit_eg_v<Bit::kComplement>>(),
    bind<Op::BT_Ev_Ib, bit_ei_v<Bit::kTest>>(),
    bind<Op::BTS_Ev_Ib, bit_ei_v<Bit::kSet>>(),
    bind<Op::BTR_Ev_Ib, bit_ei_v<Bit::kReset>>(),
    bind<Op::BTC_Ev_Ib, bit_ei_v<Bit::kComplement>>(),
    bind<Op::BSF_Gv_Ev, scan_v<Scan::kBsf>>(),
    bind<Op::BSR_Gv_Ev, scan_v<Scan::kBsr>>(),
    bind<Op::TZCNT_Gv_Ev, scan_v<Scan::kTzcnt>>(),
    bind<Op::LZCNT_Gv_Ev, scan_v<Scan::kLzcnt>>(),
    bind<Op::POPCNT_Gv_Ev, scan_v<Scan::kPopcnt>>(),
    bind<Op::ANDN_Gy_By_Ey, andn>(),
    bind<Op::BLSR_By_Ey, lowest<Lowest::kBlsr>>(),
    bind<Op::BLSMSK_By_Ey, lowest<Lowest::kBlsmsk>>(),
    bind<Op::BLSI_By_Ey, lowest<Lowest::kBlsi>>(),
    bind<Op::BEXTR_Gy_Ey_By, extract<true>>(),
    bind<Op::BZHI_Gy_Ey_By, extract<false>>(),
    bind<Op::PDEP_Gy_By_Ey, pdep_pext<true>>(),
    bind<Op::PEXT_Gy_By_Ey, pdep_pext<false>>(),
    bind<Op::MULX_Gy_By_Ey, mulx>(),
    bind<Op::RORX_Gy_Ey_Ib, rorx>(),
    bind<Op::SARX_Gy_Ey_By, shift_x<Shift::kSar>>(),
    bind<Op::SHLX_Gy_Ey_By, shift_x<Shift::kShl>>(),
    bind<Op::SHRX_Gy_Ey_By, shift_x<Shift::kShr>>(),
    bind<Op::CRC32_Gy_Eb, crc32_e<u8>>(),
    bind<Op::CRC32_Gy_Ev, crc32_ev>(),
    bind<Op::MOVBE_Gv_Mv, movbe_gm>(),
    bind<Op::MOVBE_Mv_Gv, movbe_mg>(),
    bind<Op::BSWAP_Zv, bswap>(),
    bind<Op::RDRAND_Rv, random<false>>(),
    bind<Op::RDSEED_Rv, random<true>>(),
};

}  // namespace

std::span<const OpBinding> bit_ops() {
    return kBitOps;
}

}  // namespace polyvisor::soft
