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
        a = O == kShl   ? a << count
            : O == kShr ? a >> count
                        : static_cast<T>(static_cast<S>(a) >> count);
    }
    set_gpr<T>(f, u->dst, a);
    PV_NEXT;
}

// Multiplication: flags that the manuals leave undefined are what the host makes of the old ones.
template <class T, bool Live>
PV_INLINE T multiply(VcpuFrame* f, T a, T b) {
    if constexpr (!Live || sizeof(T) == 1) return static_cast<T>(a * b);  // there is no byte form
    u32 flags = f->oszapc;
    asm("sahf\n\timul %[b], %[a]\n\tlahf\n\tseto %%al"
        : [a] "+&r"(a), "+a"(flags)
        : [b] "r"(b)
        : "cc");
    f->oszapc = static_cast<u16>(flags);
    return a;
}

template <class T, bool Immediate, bool Live>
const Uop* imul(const Uop* u, VcpuFrame* f) {
    T a = Immediate ? immediate<T>(u) : gpr_at<T>(f, u->dst);
    set_gpr<T>(f, u->dst, multiply<T, Live>(f, a, gpr_at<T>(f, u->src)));
    PV_NEXT;
}

template <class T, AddressKind K, bool Live>
const Uop* imul_load(const Uop* u, VcpuFrame* f) {
    u64 linear = address_of<K>(u, f);
    const T* at;
    if (PV_UNLIKELY(!readable(f, linear, at))) return run_slowly(u, f, linear, false);
    set_gpr<T>(f, u->dst, multiply<T, Live>(f, gpr_at<T>(f, u->dst), *at));
    PV_NEXT;
}

template <class T, bool Signed, bool Live>
const Uop* mul(const Uop* u, VcpuFrame* f) {
    T a = gpr_at<T>(f, kRax * 8);
    T b = gpr_at<T>(f, u->src);
    if constexpr (!Live) {
        using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<Signed, s128, u128>,
                                        std::conditional_t<Signed, s64, u64>>;
        using Narrow = std::conditional_t<Signed, std::make_signed_t<T>, T>;
        Wide product = Wide{static_cast<Narrow>(a)} * static_cast<Narrow>(b);
        set_gpr<T>(f, kRax * 8, static_cast<T>(product));
        set_gpr<T>(f, kRdx * 8, static_cast<T>(product >> (sizeof(T) * 8)));
    } else {
        u64 flags = f->oszapc;
        T low, high;
        if constexpr (Signed) {
            asm("sahf\n\tmov %q[a], %%rax\n\timul %[b]\n\tmov %%rax, %q[low]\n\tlahf\n\tseto %%al"
                : [low] "=&r"(low), "=&d"(high), "+a"(flags)
                : [a] "r"(a), [b] "r"(b)
                : "cc");
        } else {
            asm("sahf\n\tmov %q[a], %%rax\n\tmul %[b]\n\tmov %%rax, %q[low]\n\tlahf\n\tseto %%al"
                : [low] "=&r"(low), "=&d"(high), "+a"(flags)
                : [a] "r"(a), [b] "r"(b)
                : "cc");
        }
        f->oszapc = static_cast<u16>(flags);
        set_gpr<T>(f, kRax * 8, low);
        set_gpr<T>(f, kRdx * 8, high);
    }
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
    set_gpr<T>(f, u->dst,
               sizeof(T) == 8 ? __builtin_bswap64(a) : __builtin_bswap32(static_cast<u32>(a)));
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

#define PV_16(name, ...)                                                       \
    {name<0 __VA_OPT__(, ) __VA_ARGS__>,  name<1 __VA_OPT__(, ) __VA_ARGS__>,  \
     name<2 __VA_OPT__(, ) __VA_ARGS__>,  name<3 __VA_OPT__(, ) __VA_ARGS__>,  \
     name<4 __VA_OPT__(, ) __VA_ARGS__>,  name<5 __VA_OPT__(, ) __VA_ARGS__>,  \
     name<6 __VA_OPT__(, ) __VA_ARGS__>,  name<7 __VA_OPT__(, ) __VA_ARGS__>,  \
     name<8 __VA_OPT__(, ) __VA_ARGS__>,  name<9 __VA_OPT__(, ) __VA_ARGS__>,  \
     name<10 __VA_OPT__(, ) __VA_ARGS__>, name<11 __VA_OPT__(, ) __VA_ARGS__>, \
     name<12 __VA_OPT__(, ) __VA_ARGS__>, name<13 __VA_OPT__(, ) __VA_ARGS__>, \
     name<14 __VA_OPT__(, ) __VA_ARGS__>, name<15 __VA_OPT__(, ) __VA_ARGS__>}

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
        if constexpr (sizeof(T) < 4)
            return nullptr;
        else if (by_cl)
            return kShifts<T, true, true>[which];
        else
            return live ? kShifts<T, false, true>[which] : kShifts<T, false, false>[which];
    });
}

Handler imul_handler(unsigned size, bool immediate, bool live) {
    if (size < 4) return nullptr;
    return with_size(size, [&]<class T>(T) -> Handler {
        if (live) return immediate ? imul<T, true, true> : imul<T, false, true>;
        return immediate ? imul<T, true, false> : imul<T, false, false>;
    });
}

Handler imul_load_handler(unsigned size, AddressKind kind, bool live) {
    if (size != 8 || kind > kAddressIndex) return nullptr;
    if (kind == kAddressBase) {
        return live ? imul_load<u64, kAddressBase, true> : imul_load<u64, kAddressBase, false>;
    }
    return live ? imul_load<u64, kAddressIndex, true> : imul_load<u64, kAddressIndex, false>;
}

Handler mul_handler(unsigned size, bool is_signed, bool live) {
    auto choose = [&]<class T>(T) -> Handler {
        if (live) return is_signed ? mul<T, true, true> : mul<T, false, true>;
        return is_signed ? mul<T, true, false> : mul<T, false, false>;
    };
    return size == 8 ? choose(u64{}) : size == 4 ? choose(u32{}) : nullptr;
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

Handler setcc_handler(unsigned cc) {
    return kSetcc[cc];
}

Handler cmov_handler(unsigned size, unsigned cc) {
    return size == 8 ? kCmov64[cc] : size == 4 ? kCmov32[cc] : nullptr;
}

}  // namespace polyvisor::soft
