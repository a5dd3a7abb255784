// Register forms of NOT NEG INC DEC, shifts, multiplication, bit tests, exchanges and conversions.
#include "soft/fast.hpp"

namespace polyvisor::soft {

namespace {

template <UnaryOp O, class T, bool Live>
const Uop* unary(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, u->dst);
    if constexpr (O == kNot) {
        a = static_cast<T>(~a);
    } else if constexpr (!Live) {
        a = static_cast<T>(O == kNeg ? 0 - a : O == kInc ? a + 1 : a - 1);
    } else {
        u32 flags;
        u32 old = f->oszapc;  // INC and DEC keep CF
        if constexpr (O == kNeg) {
            asm("neg %[a]\n\tlahf\n\tseto %%al" : [a] "+&r"(a), "=&a"(flags) : : "cc");
        } else if constexpr (O == kInc) {
            asm("btl $8, %[old]\n\tinc %[a]\n\tlahf\n\tseto %%al"
                : [a] "+&r"(a), "=&a"(flags)
                : [old] "r"(old)
                : "cc");
        } else {
            asm("btl $8, %[old]\n\tdec %[a]\n\tlahf\n\tseto %%al"
                : [a] "+&r"(a), "=&a"(flags)
                : [old] "r"(old)
                : "cc");
        }
        f->oszapc = static_cast<u16>(flags);
    }
    set_gpr<T>(f, u->dst, a);
    PV_NEXT;
}

enum ShiftOp : u8 { kShl, kShr, kSar };

template <ShiftOp O, class T>
PV_INLINE T shift_with_flags(VcpuFrame* f, T a, u8 count) {
    u32 flags;
    if constexpr (O == kShl) {
        asm("shl %%cl, %[a]\n\tlahf\n\tseto %%al" : [a] "+&r"(a), "=&a"(flags) : "c"(count) : "cc");
    } else if constexpr (O == kShr) {
        asm("shr %%cl, %[a]\n\tlahf\n\tseto %%al" : [a] "+&r"(a), "=&a"(flags) : "c"(count) : "cc");
    } else {
        asm("sar %%cl, %[a]\n\tlahf\n\tseto %%al" : [a] "+&r"(a), "=&a"(flags) : "c"(count) : "cc");
    }
    f->oszapc = static_cast<u16>(flags);
    return a;
}

template <ShiftOp O, class T, bool ByCl, bool Live>
const Uop* shift(const Uop* u, VcpuFrame* f) {
    constexpr u8 mask = sizeof(T) == 8 ? 63 : 31;
    u8 count = (ByCl ? gpr_at<u8>(f, kRcx * 8) : static_cast<u8>(u->imm)) & mask;
    T a = gpr_at<T>(f, u->dst);
    if constexpr (Live) {
        if (!ByCl || PV_LIKELY(count != 0)) a = shift_with_flags<O, T>(f, a, count);
    } else {
        using S = std::make_signed_t<T>;
        a = O == kShl ? a << count : O == kShr ? a >> count : static_cast<T>(static_cast<S>(a) >> count);
    }
    set_gpr<T>(f, u->dst, a);
    PV_NEXT;
}

template <class T>
PV_INLINE T imul_with_flags(VcpuFrame* f, T a, T b) {
    u32 flags;
    asm("imul %[b], %[a]\n\tlahf\n\tseto %%al" : [a] "+&r"(a), "=&a"(flags) : [b] "r"(b) : "cc");
    f->oszapc = static_cast<u16>(flags);
    return a;
}

template <class T, bool Immediate>
const Uop* imul(const Uop* u, VcpuFrame* f) {
    T a = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->dst);
    set_gpr<T>(f, u->dst, imul_with_flags<T>(f, a, gpr_at<T>(f, u->src)));
    PV_NEXT;
}

template <class T, AddressKind K>
const Uop* imul_load(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const T* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    set_gpr<T>(f, u->dst, imul_with_flags<T>(f, gpr_at<T>(f, u->dst), *at));
    PV_NEXT;
}

template <class T, bool Signed>
const Uop* mul(const Uop* u, VcpuFrame* f) {
    u64 a = gpr_at<T>(f, kRax * 8);  // becomes the flags
    T low, high;
    T b = gpr_at<T>(f, u->src);
    if constexpr (Signed) {
        asm("imul %[b]\n\tmov %%rax, %q[low]\n\tlahf\n\tseto %%al"
            : [low] "=&r"(low), "=&d"(high), "+a"(a)
            : [b] "r"(b)
            : "cc");
    } else {
        asm("mul %[b]\n\tmov %%rax, %q[low]\n\tlahf\n\tseto %%al"
            : [low] "=&r"(low), "=&d"(high), "+a"(a)
            : [b] "r"(b)
            : "cc");
    }
    f->oszapc = static_cast<u16>(a);
    set_gpr<T>(f, kRax * 8, low);
    set_gpr<T>(f, kRdx * 8, high);
    PV_NEXT;
}

template <class T>
const Uop* exchange(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, u->dst);
    T b = gpr_at<T>(f, u->src);
    set_gpr<T>(f, u->dst, b);
    set_gpr<T>(f, u->src, a);
    PV_NEXT;
}

// 98: CWDE, CDQE; 99: CDQ, CQO.
template <unsigned Opcode, class T>
const Uop* convert(const Uop* u, VcpuFrame* f) {
    if constexpr (Opcode == 0x98) {
        if constexpr (sizeof(T) == 8) {
            gpr_at<s64>(f, kRax * 8) = gpr_at<s32>(f, kRax * 8);
        } else {
            set_gpr<u32>(f, kRax * 8, static_cast<u32>(s32{gpr_at<s16>(f, kRax * 8)}));
        }
    } else {
        using S = std::make_signed_t<T>;
        set_gpr<T>(f, kRdx * 8, static_cast<T>(gpr_at<S>(f, kRax * 8) >> (sizeof(T) * 8 - 1)));
    }
    PV_NEXT;
}

template <class T, bool Immediate>
const Uop* bit_test(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, u->dst);
    T b = Immediate ? static_cast<T>(u->imm) : gpr_at<T>(f, u->src);
    u32 carry = static_cast<u32>(a >> (b & (sizeof(T) * 8 - 1))) & 1;
    f->oszapc = static_cast<u16>((f->oszapc & ~0x0100u) | carry << 8);
    PV_NEXT;
}

template <class T>
const Uop* byte_swap(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, u->dst);
    set_gpr<T>(f, u->dst, sizeof(T) == 8 ? __builtin_bswap64(a) : __builtin_bswap32(static_cast<u32>(a)));
    PV_NEXT;
}

template <unsigned C>
const Uop* setcc(const Uop* u, VcpuFrame* f) {
    gpr_at<u8>(f, u->dst) = condition<C>(f->oszapc);
    PV_NEXT;
}

template <unsigned C, class T>
const Uop* cmov(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, u->dst);
    T b = gpr_at<T>(f, u->src);
    set_gpr<T>(f, u->dst, condition<C>(f->oszapc) ? b : a);
    PV_NEXT;
}

#define PV_16(name, ...)                                                                        \
    {name<0 __VA_OPT__(,) __VA_ARGS__>,  name<1 __VA_OPT__(,) __VA_ARGS__>,                      \
     name<2 __VA_OPT__(,) __VA_ARGS__>,  name<3 __VA_OPT__(,) __VA_ARGS__>,                      \
     name<4 __VA_OPT__(,) __VA_ARGS__>,  name<5 __VA_OPT__(,) __VA_ARGS__>,                      \
     name<6 __VA_OPT__(,) __VA_ARGS__>,  name<7 __VA_OPT__(,) __VA_ARGS__>,                      \
     name<8 __VA_OPT__(,) __VA_ARGS__>,  name<9 __VA_OPT__(,) __VA_ARGS__>,                      \
     name<10 __VA_OPT__(,) __VA_ARGS__>, name<11 __VA_OPT__(,) __VA_ARGS__>,                     \
     name<12 __VA_OPT__(,) __VA_ARGS__>, name<13 __VA_OPT__(,) __VA_ARGS__>,                     \
     name<14 __VA_OPT__(,) __VA_ARGS__>, name<15 __VA_OPT__(,) __VA_ARGS__>}

constexpr Handler kSetcc[16] = PV_16(setcc);
constexpr Handler kCmov32[16] = PV_16(cmov, u32);
constexpr Handler kCmov64[16] = PV_16(cmov, u64);

template <class T, bool Live>
constexpr Handler kUnary[4] = {unary<kNot, T, Live>, unary<kNeg, T, Live>, unary<kInc, T, Live>,
                               unary<kDec, T, Live>};

template <class T, bool ByCl, bool Live>
constexpr Handler kShifts[3] = {shift<kShl, T, ByCl, Live>, shift<kShr, T, ByCl, Live>,
                                shift<kSar, T, ByCl, Live>};

}  // namespace

Handler unary_handler(unsigned which, unsigned size, bool live) {
    return with_size(size, [&]<class T>(T) -> Handler {
        return live ? kUnary<T, true>[which] : kUnary<T, false>[which];
    });
}

// group: ModRM.reg of C0/C1/D0..D3. Rotates are generic.
Handler shift_handler(unsigned group, unsigned size, bool by_cl, bool live) {
    if (group < 4 || size < 4) return nullptr;
    unsigned which = group == 5 ? kShr : group == 7 ? kSar : kShl;
    return with_size(size, [&]<class T>(T) -> Handler {
        if constexpr (sizeof(T) < 4) return nullptr;
        else if (by_cl) return kShifts<T, true, true>[which];
        else return live ? kShifts<T, false, true>[which] : kShifts<T, false, false>[which];
    });
}

Handler imul_handler(unsigned size, bool immediate) {
    if (size == 4) return immediate ? imul<u32, true> : imul<u32, false>;
    if (size == 8) return immediate ? imul<u64, true> : imul<u64, false>;
    return nullptr;
}

Handler imul_load_handler(unsigned size, AddressKind kind) {
    if (size != 8) return nullptr;
    return kind == kAddressBase    ? imul_load<u64, kAddressBase>
           : kind == kAddressIndex ? imul_load<u64, kAddressIndex>
                                   : nullptr;
}

Handler mul_handler(unsigned size, bool is_signed) {
    if (size == 4) return is_signed ? mul<u32, true> : mul<u32, false>;
    if (size == 8) return is_signed ? mul<u64, true> : mul<u64, false>;
    return nullptr;
}

Handler exchange_handler(unsigned size) {
    return size == 8 ? exchange<u64> : size == 4 ? exchange<u32> : nullptr;
}

Handler convert_handler(unsigned opcode, unsigned size) {
    if (size == 8) return opcode == 0x98 ? convert<0x98, u64> : convert<0x99, u64>;
    if (size == 4) return opcode == 0x98 ? convert<0x98, u32> : convert<0x99, u32>;
    return nullptr;
}

Handler bit_test_handler(unsigned size, bool immediate) {
    if (size == 4) return immediate ? bit_test<u32, true> : bit_test<u32, false>;
    if (size == 8) return immediate ? bit_test<u64, true> : bit_test<u64, false>;
    return nullptr;
}

Handler byte_swap_handler(unsigned size) {
    return size == 8 ? byte_swap<u64> : size == 4 ? byte_swap<u32> : nullptr;
}

Handler setcc_handler(unsigned cc) { return kSetcc[cc]; }

Handler cmov_handler(unsigned size, unsigned cc) {
    return size == 8 ? kCmov64[cc] : size == 4 ? kCmov32[cc] : nullptr;
}

}  // namespace polyvisor::soft
