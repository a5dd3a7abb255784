// Integer arithmetic and logic: ADD..CMP, TEST, INC, DEC, NEG, NOT, ADCX, ADOX, MUL, DIV, the BCD
// adjustments and the sign extensions of the accumulator.
#include "soft/bindings.hpp"
#include "soft/operands.hpp"

namespace polyvisor::soft {
namespace {

// --- Two operands --------------------------------------------------------------------------------

enum class Alu { kAdd, kOr, kAdc, kSbb, kAnd, kSub, kXor, kCmp, kTest };

template <Alu K>
constexpr bool kWrites = K != Alu::kCmp && K != Alu::kTest;

template <Alu K, class T>
inline T alu(u16& flags, T a, T b) {
#define PV_ALU(kind, text)                          \
    if constexpr (K == Alu::kind)                   \
    asm(PV_FLAGS_IN text " %[b], %[a]" PV_FLAGS_OUT \
        : "+&a"(flags), [a] "+&r"(a)                \
        : [b] "r"(b)                                \
        : "cc")
    PV_ALU(kAdd, "add");
    PV_ALU(kOr, "or");
    PV_ALU(kAdc, "adc");
    PV_ALU(kSbb, "sbb");
    PV_ALU(kAnd, "and");
    PV_ALU(kSub, "sub");
    PV_ALU(kXor, "xor");
    PV_ALU(kCmp, "cmp");
    PV_ALU(kTest, "test");
#undef PV_ALU
    return a;
}

template <Alu K, class T>
inline void alu_locked(u16& flags, T* p, T b) {
#define PV_ALU(kind, text)                                           \
    if constexpr (K == Alu::kind)                                    \
    asm volatile(PV_FLAGS_IN "lock " text " %[b], %[p]" PV_FLAGS_OUT \
                 : "+&a"(flags), [p] "+m"(*p)                        \
                 : [b] "r"(b)                                        \
                 : "cc", "memory")
    PV_ALU(kAdd, "add");
    PV_ALU(kOr, "or");
    PV_ALU(kAdc, "adc");
    PV_ALU(kSbb, "sbb");
    PV_ALU(kAnd, "and");
    PV_ALU(kSub, "sub");
    PV_ALU(kXor, "xor");
#undef PV_ALU
}

/// E op= b, or only the flags of it.
template <Alu K, class T>
inline bool alu_to_e(VcpuFrame& f, const Insn& i, u64 ea, T b) {
    if constexpr (kWrites<K>) {
        return modify<T>(
            f, i, ea, [&](T a) { return alu<K>(f.oszapc, a, b); },
            [&](T* p) { alu_locked<K>(f.oszapc, p, b); });
    } else {
        T a;
        if (!read_e(f, i, ea, a)) return false;
        alu<K>(f.oszapc, a, b);
        return true;
    }
}

template <Alu K, class T>
bool alu_eg(VcpuFrame& f, const Insn& i, u64 ea) {
    return alu_to_e<K>(f, i, ea, get_reg<T>(f, i, i.reg));
}
template <Alu K, class T>
bool alu_ei(VcpuFrame& f, const Insn& i, u64 ea) {
    return alu_to_e<K>(f, i, ea, static_cast<T>(i.imm));
}
template <Alu K, class T>
bool alu_ge(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    T result = alu<K>(f.oszapc, get_reg<T>(f, i, i.reg), b);
    if constexpr (kWrites<K>) set_reg<T>(f, i, i.reg, result);
    return true;
}
template <Alu K, class T>
bool alu_ai(VcpuFrame& f, const Insn& i, u64) {
    T result = alu<K>(f.oszapc, static_cast<T>(f.gpr[kRax]), static_cast<T>(i.imm));
    if constexpr (kWrites<K>) set_accumulator(f, result);
    return true;
}

#define PV_V_FORM(name)                                  \
    template <Alu K>                                     \
    bool name##_v(VcpuFrame& f, const Insn& i, u64 ea) { \
        switch (i.opsize) {                              \
            case 4:                                      \
                return name<K, u32>(f, i, ea);           \
            case 8:                                      \
                return name<K, u64>(f, i, ea);           \
            default:                                     \
                return name<K, u16>(f, i, ea);           \
        }                                                \
    }
PV_V_FORM(alu_eg)
PV_V_FORM(alu_ei)
PV_V_FORM(alu_ge)
PV_V_FORM(alu_ai)
#undef PV_V_FORM

// --- One operand ---------------------------------------------------------------------------------

enum class Unary { kInc, kDec, kNeg, kNot };

template <Unary K, class T>
inline T unary(u16& flags, T a) {
#define PV_UNARY(kind, text)        \
    if constexpr (K == Unary::kind) \
    asm(PV_FLAGS_IN text " %[a]" PV_FLAGS_OUT : "+&a"(flags), [a] "+&r"(a) : : "cc")
    PV_UNARY(kInc, "inc");
    PV_UNARY(kDec, "dec");
    PV_UNARY(kNeg, "neg");
#undef PV_UNARY
    if constexpr (K == Unary::kNot) a = static_cast<T>(~a);
    return a;
}

template <Unary K, class T>
inline void unary_locked(u16& flags, T* p) {
    // INC and DEC have no operand that could tell the assembler the size.
#define PV_SIZED(text)                                                \
    do {                                                              \
        if constexpr (sizeof(T) == 1)                                 \
            asm volatile(PV_FLAGS_IN "lock " text "b %0" PV_FLAGS_OUT \
                         : "+m"(*p), "+&a"(flags)                     \
                         :                                            \
                         : "cc", "memory");                           \
        if constexpr (sizeof(T) == 2)                                 \
            asm volatile(PV_FLAGS_IN "lock " text "w %0" PV_FLAGS_OUT \
                         : "+m"(*p), "+&a"(flags)                     \
                         :                                            \
                         : "cc", "memory");                           \
        if constexpr (sizeof(T) == 4)                                 \
            asm volatile(PV_FLAGS_IN "lock " text "l %0" PV_FLAGS_OUT \
                         : "+m"(*p), "+&a"(flags)                     \
                         :                                            \
                         : "cc", "memory");                           \
        if constexpr (sizeof(T) == 8)                                 \
            asm volatile(PV_FLAGS_IN "lock " text "q %0" PV_FLAGS_OUT \
                         : "+m"(*p), "+&a"(flags)                     \
                         :                                            \
                         : "cc", "memory");                           \
    } while (0)
    if constexpr (K == Unary::kInc) PV_SIZED("inc");
    if constexpr (K == Unary::kDec) PV_SIZED("dec");
    if constexpr (K == Unary::kNeg) PV_SIZED("neg");
    if constexpr (K == Unary::kNot) PV_SIZED("not");
#undef PV_SIZED
}

template <Unary K, class T>
bool unary_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return modify<T>(
        f, i, ea, [&](T a) { return unary<K>(f.oszapc, a); },
        [&](T* p) { unary_locked<K>(f.oszapc, p); });
}
template <Unary K>
bool unary_e_v(VcpuFrame& f, const Insn& i, u64 ea) {
    switch (i.opsize) {
        case 4:
            return unary_e<K, u32>(f, i, ea);
        case 8:
            return unary_e<K, u64>(f, i, ea);
        default:
            return unary_e<K, u16>(f, i, ea);
    }
}

// --- ADCX, ADOX ----------------------------------------------------------------------------------

template <class T, u16 Carry>
bool add_one_carry(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    T a = get_reg<T>(f, i, i.reg);
    T sum;
    bool carry = __builtin_add_overflow(a, b, &sum);
    carry |= __builtin_add_overflow(sum, static_cast<T>((f.oszapc & Carry) != 0), &sum);
    f.oszapc = static_cast<u16>(carry ? f.oszapc | Carry : f.oszapc & ~Carry);
    set_reg<T>(f, i, i.reg, sum);
    return true;
}
template <u16 Carry>
bool add_one_carry_y(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.rex_w && f.long64() ? add_one_carry<u64, Carry>(f, i, ea)
                                 : add_one_carry<u32, Carry>(f, i, ea);
}

// --- MUL, IMUL -----------------------------------------------------------------------------------

/// One-operand multiply. The flags that MUL leaves undefined come from the host's own.
template <class T, bool Signed>
bool multiply(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    u16 flags = f.oszapc;
    u64 low = f.gpr[kRax];
    u64 high = 0;
#define PV_MUL(text, modifier)                                 \
    asm(PV_FLAGS_IN "mov %[low], %%rax\n\t" text " %" modifier \
                    "[b]\n\tmov %%rax, %[low]" PV_FLAGS_OUT    \
        : "+&a"(flags), "+&d"(high), [low] "+&r"(low)          \
        : [b] "r"(b)                                           \
        : "cc")
#define PV_SIZED(text)                                   \
    do {                                                 \
        if constexpr (sizeof(T) == 1) PV_MUL(text, "b"); \
        if constexpr (sizeof(T) == 2) PV_MUL(text, "w"); \
        if constexpr (sizeof(T) == 4) PV_MUL(text, "k"); \
        if constexpr (sizeof(T) == 8) PV_MUL(text, "q"); \
    } while (0)
    if constexpr (Signed) {
        PV_SIZED("imul");
    } else {
        PV_SIZED("mul");
    }
#undef PV_SIZED
#undef PV_MUL
    f.oszapc = flags;
    if constexpr (sizeof(T) == 1) {
        write_reg(f, kRax, 2, low);
    } else {
        write_reg(f, kRax, sizeof(T), low);
        write_reg(f, kRdx, sizeof(T), high);
    }
    return true;
}
template <class T>
bool mul_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return multiply<T, false>(f, i, ea);
}
template <class T>
bool imul_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return multiply<T, true>(f, i, ea);
}
bool mul_ev(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(mul_e);
}
bool imul_ev(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(imul_e);
}

template <class T>
inline T imul_truncated(u16& flags, T a, T b) {
    asm(PV_FLAGS_IN "imul %[b], %[a]" PV_FLAGS_OUT
        : "+&a"(flags), [a] "+&r"(a)
        : [b] "r"(b)
        : "cc");
    return a;
}
template <class T>
bool imul_ge(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    set_reg<T>(f, i, i.reg, imul_truncated(f.oszapc, get_reg<T>(f, i, i.reg), b));
    return true;
}
template <class T>
bool imul_gei(VcpuFrame& f, const Insn& i, u64 ea) {
    T b;
    if (!read_e(f, i, ea, b)) return false;
    set_reg<T>(f, i, i.reg, imul_truncated(f.oszapc, b, static_cast<T>(i.imm)));
    return true;
}
bool imul_gev(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(imul_ge);
}
bool imul_geiv(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(imul_gei);
}

// --- DIV, IDIV -----------------------------------------------------------------------------------

/// Divides on the host after the quotient is known to fit, so the host never takes #DE.
template <class T, bool Signed>
bool divide(VcpuFrame& f, const Insn& i, u64 ea) {
    using S = std::make_signed_t<T>;
    constexpr unsigned width = sizeof(T) * 8;
    T b;
    if (!read_e(f, i, ea, b)) return false;
    if (b == 0) return raise(f, kDe);

    T low = static_cast<T>(f.gpr[kRax]);
    T high = static_cast<T>(sizeof(T) == 1 ? f.gpr[kRax] >> 8 : f.gpr[kRdx]);
    if constexpr (!Signed) {
        if (high >= b) return raise(f, kDe);
    } else {
        // Dividend and divisor by magnitude; one quotient more is allowed on the negative side.
        u128 dividend = (u128{high} << width) | low;
        bool negative_dividend = static_cast<S>(high) < 0;
        bool negative_divisor = static_cast<S>(b) < 0;
        constexpr u128 kMask = sizeof(T) == 8 ? ~u128{0} : (u128{1} << (2 * width % 128)) - 1;
        if (negative_dividend) dividend = (~dividend + 1) & kMask;
        T divisor = negative_divisor ? static_cast<T>(~b + 1) : b;
        u128 limit = (u128{1} << (width - 1)) - (negative_dividend == negative_divisor ? 1 : 0);
        // quotient <= limit  <=>  dividend < (limit + 1) * divisor
        if (dividend >= (limit + 1) * divisor) return raise(f, kDe);
    }

    u16 flags = f.oszapc;
    u64 wide_low = sizeof(T) == 1 ? f.gpr[kRax] & 0xffff : low;
    u64 wide_high = high;
#define PV_DIV(text, modifier)                                  \
    asm(PV_FLAGS_IN "mov %[low], %%rax\n\t" text " %" modifier  \
                    "[b]\n\tmov %%rax, %[low]" PV_FLAGS_OUT     \
        : "+&a"(flags), "+&d"(wide_high), [low] "+&r"(wide_low) \
        : [b] "r"(b)                                            \
        : "cc")
#define PV_SIZED(text)                                   \
    do {                                                 \
        if constexpr (sizeof(T) == 1) PV_DIV(text, "b"); \
        if constexpr (sizeof(T) == 2) PV_DIV(text, "w"); \
        if constexpr (sizeof(T) == 4) PV_DIV(text, "k"); \
        if constexpr (sizeof(T) == 8) PV_DIV(text, "q"); \
    } while (0)
    if constexpr (Signed) {
        PV_SIZED("idiv");
    } else {
        PV_SIZED("div");
    }
#undef PV_SIZED
#undef PV_DIV
    f.oszapc = flags;
    if constexpr (sizeof(T) == 1) {
        write_reg(f, kRax, 2, wide_low);  // AH remainder, AL quotient
    } else {
        write_reg(f, kRax, sizeof(T), wide_low);
        write_reg(f, kRdx, sizeof(T), wide_high);
    }
    return true;
}
template <class T>
bool div_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return divide<T, false>(f, i, ea);
}
template <class T>
bool idiv_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return divide<T, true>(f, i, ea);
}
bool div_ev(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(div_e);
}
bool idiv_ev(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(idiv_e);
}

// --- Decimal adjustment --------------------------------------------------------------------------

// Not in 64-bit mode, so the host cannot do them for us. Flags that the manuals leave undefined are
// those of the addition or subtraction behind the adjustment, as on AMD CPUs.

u8 al(const VcpuFrame& f) {
    return static_cast<u8>(f.gpr[kRax]);
}
u8 ah(const VcpuFrame& f) {
    return static_cast<u8>(f.gpr[kRax] >> 8);
}

void set_carries(VcpuFrame& f, bool carry, bool half) {
    f.oszapc = static_cast<u16>((f.oszapc & ~(kStatusC | kStatusA)) | (carry ? kStatusC : 0) |
                                (half ? kStatusA : 0));
}

template <bool Subtract>
bool decimal_adjust(VcpuFrame& f, const Insn&, u64) {
    u8 old = al(f);
    bool old_carry = f.oszapc & kStatusC;
    bool half = (old & 15) > 9 || (f.oszapc & kStatusA);
    bool high = old > 0x99 || old_carry;
    // DAA drops a carry of the low digit's step, DAS keeps its borrow.
    bool carry = high || (Subtract && half && old < 6);
    u8 adjustment = static_cast<u8>((half ? 6 : 0) + (high ? 0x60 : 0));
    set_accumulator(f, alu<Subtract ? Alu::kSub : Alu::kAdd>(f.oszapc, old, adjustment));
    set_carries(f, carry, half);
    return true;
}

template <bool Subtract>
bool ascii_adjust(VcpuFrame& f, const Insn&, u64) {
    u16 ax = static_cast<u16>(f.gpr[kRax]);
    bool adjust = (ax & 15) > 9 || (f.oszapc & kStatusA);
    u16 adjustment = adjust ? 0x106 : 0;
    ax = alu<Subtract ? Alu::kSub : Alu::kAdd>(f.oszapc, ax, adjustment);
    write_reg(f, kRax, 2, ax & 0xff0f);
    set_carries(f, adjust, adjust);
    return true;
}

bool aam(VcpuFrame& f, const Insn& i, u64) {
    u8 base = static_cast<u8>(i.imm);
    if (base == 0) return raise(f, kDe);
    u8 value = al(f);
    u8 low = value % base;
    write_reg(f, kRax, 2, static_cast<u64>(value / base) << 8 | low);
    alu<Alu::kTest>(f.oszapc, low, low);
    return true;
}

bool aad(VcpuFrame& f, const Insn& i, u64) {
    u8 tens = static_cast<u8>(ah(f) * static_cast<u8>(i.imm));
    write_reg(f, kRax, 2, alu<Alu::kAdd>(f.oszapc, al(f), tens));
    return true;
}

// --- Sign extension of the accumulator -----------------------------------------------------------

/// CBW, CWDE, CDQE.
bool extend_accumulator(VcpuFrame& f, const Insn& i, u64) {
    write_reg(f, kRax, i.opsize,
              static_cast<u64>(sign_extend(f.gpr[kRax], static_cast<unsigned>(i.opsize) * 4)));
    return true;
}
/// CWD, CDQ, CQO.
bool extend_into_rdx(VcpuFrame& f, const Insn& i, u64) {
    bool negative = (f.gpr[kRax] >> (i.opsize * 8 - 1)) & 1;
    write_reg(f, kRdx, i.opsize, negative ? ~u64{0} : 0);
    return true;
}

#define PV_ALU_ROWS(NAME, kind)                             \
    bind<Op::NAME##_Eb_Gb, alu_eg<Alu::kind, u8>>(),        \
        bind<Op::NAME##_Ev_Gv, alu_eg_v<Alu::kind>>(),      \
        bind<Op::NAME##_Gb_Eb, alu_ge<Alu::kind, u8>>(),    \
        bind<Op::NAME##_Gv_Ev, alu_ge_v<Alu::kind>>(),      \
        bind<Op::NAME##_AL_Ib, alu_ai<Alu::kind, u8>>(),    \
        bind<Op::NAME##_rAX_Iz, alu_ai_v<Alu::kind>>(),     \
        bind<Op::NAME##_Eb_Ib, alu_ei<Alu::kind, u8>>(),    \
        bind<Op::NAME##_Eb_Ib_82, alu_ei<Alu::kind, u8>>(), \
        bind<Op::NAME##_Ev_Iz, alu_ei_v<Alu::kind>>(),      \
        bind<Op::NAME##_Ev_sIb, alu_ei_v<Alu::kind>>()

const OpBinding kArithmeticOps[] = {
    PV_ALU_ROWS(ADD, kAdd),
    PV_ALU_ROWS(OR, kOr),
    PV_ALU_ROWS(ADC, kAdc),
    PV_ALU_ROWS(SBB, kSbb),
    PV_ALU_ROWS(AND, kAnd),
    PV_ALU_ROWS(SUB, kSub),
    PV_ALU_ROWS(XOR, kXor),
    PV_ALU_ROWS(CMP, kCmp),
    bind<Op::TEST_Eb_Gb, alu_eg<Alu::kTest, u8>>(),
    bind<Op::TEST_Ev_Gv, alu_eg_v<Alu::kTest>>(),
    bind<Op::TEST_AL_Ib, alu_ai<Alu::kTest, u8>>(),
    bind<Op::TEST_rAX_Iz, alu_ai_v<Alu::kTest>>(),
    bind<Op::TEST_Eb_Ib, alu_ei<Alu::kTest, u8>>(),
    bind<Op::TEST_Eb_Ib_1, alu_ei<Alu::kTest, u8>>(),
    bind<Op::TEST_Ev_Iz, alu_ei_v<Alu::kTest>>(),
    bind<Op::TEST_Ev_Iz_1, alu_ei_v<Alu::kTest>>(),
    bind<Op::INC_Eb, unary_e<Unary::kInc, u8>>(),
    bind<Op::INC_Ev, unary_e_v<Unary::kInc>>(),
    bind<Op::INC_Zv, unary_e_v<Unary::kInc>>(),
    bind<Op::DEC_Eb, unary_e<Unary::kDec, u8>>(),
    bind<Op::DEC_Ev, unary_e_v<Unary::kDec>>(),
    bind<Op::DEC_Zv, unary_e_v<Unary::kDec>>(),
    bind<Op::NEG_Eb, unary_e<Unary::kNeg, u8>>(),
    bind<Op::NEG_Ev, unary_e_v<Unary::kNeg>>(),
    bind<Op::NOT_Eb, unary_e<Unary::kNot, u8>>(),
    bind<Op::NOT_Ev, unary_e_v<Unary::kNot>>(),
    bind<Op::ADCX_Gy_Ey, add_one_carry_y<kStatusC>>(),
    bind<Op::ADOX_Gy_Ey, add_one_carry_y<kStatusO>>(),
    bind<Op::MUL_Eb, mul_e<u8>>(),
    bind<Op::MUL_Ev, mul_ev>(),
    bind<Op::IMUL_Eb, imul_e<u8>>(),
    bind<Op::IMUL_Ev, imul_ev>(),
    bind<Op::IMUL_Gv_Ev, imul_gev>(),
    bind<Op::IMUL_Gv_Ev_Iz, imul_geiv>(),
    bind<Op::IMUL_Gv_Ev_sIb, imul_geiv>(),
    bind<Op::DIV_Eb, div_e<u8>>(),
    bind<Op::DIV_Ev, div_ev>(),
    bind<Op::IDIV_Eb, idiv_e<u8>>(),
    bind<Op::IDIV_Ev, idiv_ev>(),
    bind<Op::DAA, decimal_adjust<false>>(),
    bind<Op::DAS, decimal_adjust<true>>(),
    bind<Op::AAA, ascii_adjust<false>>(),
    bind<Op::AAS, ascii_adjust<true>>(),
    bind<Op::AAM_Ib, aam>(),
    bind<Op::AAD_Ib, aad>(),
    bind<Op::CBW, extend_accumulator>(),
    bind<Op::CWD, extend_into_rdx>(),
};

}  // namespace

std::span<const OpBinding> arithmetic_ops() {
    return kArithmeticOps;
}

}  // namespace polyvisor::soft
