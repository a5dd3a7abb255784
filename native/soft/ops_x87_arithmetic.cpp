// x87 arithmetic: the four operations in all their forms, and the functions of one or two
// registers.
#include <span>

#include "soft/x87.hpp"

namespace polyvisor::soft::x87 {
namespace {

// --- FADD, FMUL, FSUB, FSUBR, FDIV, FDIVR --------------------------------------------------------

enum class Arith { kAdd = 0, kMul = 1, kSub = 4, kSubr = 5, kDiv = 6, kDivr = 7 };  // as encoded

/// destination = destination op source, both registers; returns the host's status word.
template <Arith K>
u16 with_register(VcpuFrame& f, Register& destination, const Register& source) {
    u16 sw;
    asm volatile(PV_X87_ENTER "fldt %[b]\n\tfldt %[a]\n\t.byte 0xd8, %c[op]" PV_X87_STATUS
                              "fstpt %[a]\n\tfstp %%st(0)" PV_X87_LEAVE
                 : [sw] "=&a"(sw), [a] "+m"(destination)
                 : [b] "m"(source), [op] "i"(0xc1 + 8 * static_cast<int>(K)), PV_X87_CONTROL
                 : "cc");
    return sw;
}

struct Float32 {
    u32 bits;
};
struct Float64 {
    u64 bits;
};
struct Int16 {
    u16 bits;
};
struct Int32 {
    u32 bits;
};

/// ST(0) = ST(0) op memory operand.
template <Arith K, class T>
u16 with_memory(VcpuFrame& f, Register& destination, const T& source) {
    u16 sw;
#define PV_X87_MEMORY(kind, type, text)                                                            \
    if constexpr (K == Arith::kind && std::is_same_v<T, type>)                                     \
    asm volatile(PV_X87_ENTER "fldt %[a]\n\t" text " %[b]" PV_X87_STATUS "fstpt %[a]" PV_X87_LEAVE \
                 : [sw] "=&a"(sw), [a] "+m"(destination)                                           \
                 : [b] "m"(source), PV_X87_CONTROL                                                 \
                 : "cc")
#define PV_X87_TYPES(kind, name)                \
    PV_X87_MEMORY(kind, Float32, "f" name "s"); \
    PV_X87_MEMORY(kind, Float64, "f" name "l"); \
    PV_X87_MEMORY(kind, Int16, "fi" name "s");  \
    PV_X87_MEMORY(kind, Int32, "fi" name "l")
    PV_X87_TYPES(kAdd, "add");
    PV_X87_TYPES(kMul, "mul");
    PV_X87_TYPES(kSub, "sub");
    PV_X87_TYPES(kSubr, "subr");
    PV_X87_TYPES(kDiv, "div");
    PV_X87_TYPES(kDivr, "divr");
#undef PV_X87_TYPES
#undef PV_X87_MEMORY
    return sw;
}

/// Exceptions that keep the operation from being done at all when they are unmasked.
constexpr u16 kBefore = kInvalid | kDenormal | kZeroDivide;

template <Arith K, class T>
bool st0_memory(VcpuFrame& f, const Insn& i, u64 ea) {
    T source;
    if (!load(f, i, ea, source)) return false;
    note(f, i, ea);
    if (PV_UNLIKELY(empty(f, 0))) {
        if (stack_fault(f, false)) {
            st(f, 0) = kIndefinite;
            fill(f, 0);
        }
        return true;
    }
    commit_status(f, with_memory<K>(f, st(f, 0), source), kC1);
    return true;
}

/// ToSt0: ST(0) op= ST(i), else ST(i) op= ST(0), with Pop followed by a pop.
template <Arith K, bool ToSt0, bool Pop>
bool st0_sti(VcpuFrame& f, const Insn& i, u64 ea) {
    unsigned n = i.rm & 7;
    note(f, i, ea);
    Register& destination = st(f, ToSt0 ? 0 : n);
    if (PV_UNLIKELY(empty(f, 0) || empty(f, n))) {
        if (!stack_fault(f, false)) return true;
        destination = kIndefinite;
        fill(f, ToSt0 ? 0 : n);
        if constexpr (Pop) pop(f);
        return true;
    }
    u16 sw = with_register<K>(f, destination, st(f, ToSt0 ? n : 0));
    commit_status(f, sw, kC1);
    if (Pop && !(unmasked(f, sw) & kBefore)) pop(f);
    return true;
}

// --- One register --------------------------------------------------------------------------------

enum class Unary { kChs, kAbs, k2xm1, kSqrt, kRndint, kSin, kCos };

template <Unary K>
bool st0_unary(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    constexpr unsigned codes = K == Unary::kSin || K == Unary::kCos ? kC1 | kC2 : kC1;
    if (PV_UNLIKELY(empty(f, 0))) {
        f.x87.status &= static_cast<u16>(~codes);
        if (stack_fault(f, false)) {
            st(f, 0) = kIndefinite;
            fill(f, 0);
        }
        return true;
    }
    u16 sw;
#define PV_X87_UNARY(kind, text)                                                           \
    if constexpr (K == Unary::kind)                                                        \
    asm volatile(PV_X87_ENTER "fldt %[a]\n\t" text PV_X87_STATUS "fstpt %[a]" PV_X87_LEAVE \
                 : [sw] "=&a"(sw), [a] "+m"(st(f, 0))                                      \
                 : PV_X87_CONTROL                                                          \
                 : "cc")
    PV_X87_UNARY(kChs, "fchs");
    PV_X87_UNARY(kAbs, "fabs");
    PV_X87_UNARY(k2xm1, "f2xm1");
    PV_X87_UNARY(kSqrt, "fsqrt");
    PV_X87_UNARY(kRndint, "frndint");
    PV_X87_UNARY(kSin, "fsin");
    PV_X87_UNARY(kCos, "fcos");
#undef PV_X87_UNARY
    commit_status(f, sw, codes);
    return true;
}

// --- One register in, two out --------------------------------------------------------------------

enum class Split { kPtan, kSincos, kXtract };

/// ST(0) is replaced and another value pushed, unless the host says otherwise (C2, exceptions).
template <Split K>
bool st0_split(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    constexpr unsigned codes = K == Split::kXtract ? kC1 : kC1 | kC2;
    bool underflow = empty(f, 0);
    if (PV_UNLIKELY(underflow || !empty(f, 7))) {
        f.x87.status &= static_cast<u16>(~codes);
        if (stack_fault(f, !underflow)) {
            st(f, 0) = kIndefinite;
            fill(f, 0);
            push(f) = kIndefinite;
        }
        return true;
    }
    u16 before, sw;
    Register pushed;
    Register& value = st(f, 0);
    // With two results the pushed one is on top.
#define PV_X87_SPLIT(kind, text)                                                                 \
    if constexpr (K == Split::kind)                                                              \
    asm volatile(PV_X87_ENTER "fldt %[a]\n\tfnstsw %[before]\n\t" text PV_X87_STATUS             \
                              "xorw %%ax, %[before]\n\ttestw $0x3800, %[before]\n\tjz 4f\n\t"    \
                              "fstpt %[pushed]\n4:\tfstpt %[a]" PV_X87_LEAVE                     \
                 : [sw] "=&a"(sw), [a] "+m"(value), [before] "=m"(before), [pushed] "=m"(pushed) \
                 : PV_X87_CONTROL                                                                \
                 : "cc")
    PV_X87_SPLIT(kPtan, "fptan");
    PV_X87_SPLIT(kSincos, "fsincos");
    PV_X87_SPLIT(kXtract, "fxtract");
#undef PV_X87_SPLIT
    commit_status(f, sw, codes);
    if (before & kTop) push(f) = pushed;
    return true;
}

// --- ST(0) and ST(1) -----------------------------------------------------------------------------

bool is_nan(const Register& value) {
    return (value.exponent & 0x7fff) == 0x7fff && value.significand << 1 != 0;
}

enum class Binary { kPrem, kPrem1, kScale };

template <Binary K>
bool st0_st1(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    constexpr bool remainder = K != Binary::kScale;
    if (PV_UNLIKELY(empty(f, 0) || empty(f, 1))) {
        if constexpr (remainder) f.x87.status &= static_cast<u16>(~kC2);
        if (stack_fault(f, false)) {
            st(f, 0) = kIndefinite;
            fill(f, 0);
        }
        return true;
    }
    u16 sw;
#define PV_X87_BINARY(kind, text)                                             \
    if constexpr (K == Binary::kind)                                          \
    asm volatile(PV_X87_ENTER "fldt %[b]\n\tfldt %[a]\n\t" text PV_X87_STATUS \
                              "fstpt %[a]\n\tfstp %%st(0)" PV_X87_LEAVE       \
                 : [sw] "=&a"(sw), [a] "+m"(st(f, 0))                         \
                 : [b] "m"(st(f, 1)), PV_X87_CONTROL                          \
                 : "cc")
    PV_X87_BINARY(kPrem, "fprem");
    PV_X87_BINARY(kPrem1, "fprem1");
    PV_X87_BINARY(kScale, "fscale");
#undef PV_X87_BINARY
    unsigned codes = kC1;
    if constexpr (remainder) {
        // Without a quotient (NaN, or not done) C0 and C3 keep what they were.
        bool none = is_nan(st(f, 0)) || (unmasked(f, sw) & kBefore);
        codes = none ? kC1 | kC2 : unsigned{kCodes};
    }
    commit_status(f, sw, codes);
    return true;
}

enum class Merge { kYl2x, kYl2xp1, kPatan };

/// The result replaces ST(1), and ST(0) is popped, unless an unmasked exception forbids both.
template <Merge K>
bool st1_st0(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    if (PV_UNLIKELY(empty(f, 0) || empty(f, 1))) {
        if (stack_fault(f, false)) {
            st(f, 1) = kIndefinite;
            fill(f, 1);
            pop(f);
        }
        return true;
    }
    u16 before, sw;
    Register result;
    // Not popped: what is on top is ST(0) as it was, and another value is below.
#define PV_X87_MERGE(kind, text)                                                                \
    if constexpr (K == Merge::kind)                                                             \
    asm volatile(PV_X87_ENTER                                                                   \
                 "fldt %[b]\n\tfldt %[a]\n\tfnstsw %[before]\n\t" text PV_X87_STATUS            \
                 "xorw %%ax, %[before]\n\tfstpt %[r]\n\ttestw $0x3800, %[before]\n\tjnz 4f\n\t" \
                 "fstp %%st(0)\n4:" PV_X87_LEAVE                                                \
                 : [sw] "=&a"(sw), [before] "=m"(before), [r] "=m"(result)                      \
                 : [a] "m"(st(f, 0)), [b] "m"(st(f, 1)), PV_X87_CONTROL                         \
                 : "cc")
    PV_X87_MERGE(kYl2x, "fyl2x");
    PV_X87_MERGE(kYl2xp1, "fyl2xp1");
    PV_X87_MERGE(kPatan, "fpatan");
#undef PV_X87_MERGE
    commit_status(f, sw, kC1);
    if (before & kTop) {
        st(f, 1) = result;
        pop(f);
    }
    return true;
}

#define PV_ARITH_ROWS(NAME, kind)                                          \
    bind<Op::F##NAME##_ST0_Md_f, st0_memory<Arith::kind, Float32>>(),      \
        bind<Op::F##NAME##_ST0_Mq_f, st0_memory<Arith::kind, Float64>>(),  \
        bind<Op::FI##NAME##_ST0_Md_i, st0_memory<Arith::kind, Int32>>(),   \
        bind<Op::FI##NAME##_ST0_Mw_i, st0_memory<Arith::kind, Int16>>(),   \
        bind<Op::F##NAME##_ST0_STi, st0_sti<Arith::kind, true, false>>(),  \
        bind<Op::F##NAME##_STi_ST0, st0_sti<Arith::kind, false, false>>(), \
        bind<Op::F##NAME##P_STi_ST0, st0_sti<Arith::kind, false, true>>()

const OpBinding kOps[] = {
    PV_ARITH_ROWS(ADD, kAdd),
    PV_ARITH_ROWS(MUL, kMul),
    PV_ARITH_ROWS(SUB, kSub),
    PV_ARITH_ROWS(SUBR, kSubr),
    PV_ARITH_ROWS(DIV, kDiv),
    PV_ARITH_ROWS(DIVR, kDivr),
    bind<Op::FCHS, st0_unary<Unary::kChs>>(),
    bind<Op::FABS, st0_unary<Unary::kAbs>>(),
    bind<Op::F2XM1, st0_unary<Unary::k2xm1>>(),
    bind<Op::FSQRT, st0_unary<Unary::kSqrt>>(),
    bind<Op::FRNDINT, st0_unary<Unary::kRndint>>(),
    bind<Op::FSIN, st0_unary<Unary::kSin>>(),
    bind<Op::FCOS, st0_unary<Unary::kCos>>(),
    bind<Op::FPTAN, st0_split<Split::kPtan>>(),
    bind<Op::FSINCOS, st0_split<Split::kSincos>>(),
    bind<Op::FXTRACT, st0_split<Split::kXtract>>(),
    bind<Op::FPREM, st0_st1<Binary::kPrem>>(),
    bind<Op::FPREM1, st0_st1<Binary::kPrem1>>(),
    bind<Op::FSCALE, st0_st1<Binary::kScale>>(),
    bind<Op::FYL2X, st1_st0<Merge::kYl2x>>(),
    bind<Op::FYL2XP1, st1_st0<Merge::kYl2xp1>>(),
    bind<Op::FPATAN, st1_st0<Merge::kPatan>>(),
};

}  // namespace

std::span<const OpBinding> arithmetic_ops() {
    return kOps;
}

}  // namespace polyvisor::soft::x87
