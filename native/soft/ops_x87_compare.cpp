// x87 comparisons, FTST, FXAM and the conditional moves. None depends on rounding or precision, so
// that they run under the host's default (masked) control word.
#include "soft/operands.hpp"
#include "soft/x87.hpp"

namespace polyvisor::soft::x87 {
namespace {

/// Sets C0, C2, C3 and exceptions of a comparison, and pops unless an unmasked exception forbids
/// that.
bool finish_compare(VcpuFrame& f, u16 sw, unsigned pops) {
    commit_status(f, sw, kCodes);
    if (unmasked(f, sw)) return true;
    while (pops-- != 0) pop(f);
    return true;
}
bool compare_underflow(VcpuFrame& f, unsigned pops) {
    bool masked = stack_fault(f, false);
    f.x87.status |= kC0 | kC2 | kC3;  // unordered
    if (!masked) return true;
    while (pops-- != 0) pop(f);
    return true;
}

template <bool Unordered, unsigned Pops>
bool compare_sti(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = Pops == 2 ? 1 : i.rm & 7;  // FCOMPP, FUCOMPP: ST(1)
    if (PV_UNLIKELY(empty(f, 0) || empty(f, n))) return compare_underflow(f, Pops);
    u16 sw;
    if constexpr (Unordered) {
        asm volatile("fldt %[b]\n\tfldt %[a]\n\tfucom %%st(1)" PV_X87_STATUS
                     "fstp %%st(0)\n\tfstp %%st(0)"
                     : [sw] "=&a"(sw)
                     : [a] "m"(st(f, 0)), [b] "m"(st(f, n))
                     : "cc");
    } else {
        asm volatile("fldt %[b]\n\tfldt %[a]\n\tfcom %%st(1)" PV_X87_STATUS
                     "fstp %%st(0)\n\tfstp %%st(0)"
                     : [sw] "=&a"(sw)
                     : [a] "m"(st(f, 0)), [b] "m"(st(f, n))
                     : "cc");
    }
    return finish_compare(f, sw, Pops);
}

enum class Type { kFloat32, kFloat64, kInt16, kInt32 };

template <Type K, class T, unsigned Pops>
bool compare_memory(VcpuFrame& f, const Insn& i, u64 ea) {
    T source;
    if (!load(f, i, ea, source)) return false;
    note(f, i, ea);
    if (PV_UNLIKELY(empty(f, 0))) return compare_underflow(f, Pops);
    u16 sw;
#define PV_X87_COMPARE(kind, text)                                         \
    if constexpr (K == Type::kind)                                         \
    asm volatile("fldt %[a]\n\t" text " %[b]" PV_X87_STATUS "fstp %%st(0)" \
                 : [sw] "=&a"(sw)                                          \
                 : [a] "m"(st(f, 0)), [b] "m"(source)                      \
                 : "cc")
    PV_X87_COMPARE(kFloat32, "fcoms");
    PV_X87_COMPARE(kFloat64, "fcoml");
    PV_X87_COMPARE(kInt16, "ficoms");
    PV_X87_COMPARE(kInt32, "ficoml");
#undef PV_X87_COMPARE
    return finish_compare(f, sw, Pops);
}

/// FCOMI, FUCOMI: to EFLAGS.
template <bool Unordered, unsigned Pops>
bool compare_to_flags(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = i.rm & 7;
    if (PV_UNLIKELY(empty(f, 0) || empty(f, n))) {
        bool masked = stack_fault(f, false);
        f.oszapc = 0x200 | kStatusZ | kStatusP | kStatusC;
        if (Pops != 0 && masked) pop(f);
        return true;
    }
    u16 flags = f.oszapc;
    u16 sw;
#define PV_X87_COMI(text)                                                                    \
    asm volatile("fldt %[b]\n\tfldt %[a]\n\t" PV_FLAGS_IN text " %%st(1), %%st" PV_FLAGS_OUT \
                 "\n\tfnstsw %[sw]\n\tfnclex\n\tfstp %%st(0)\n\tfstp %%st(0)"                \
                 : [flags] "+&a"(flags), [sw] "=m"(sw)                                       \
                 : [a] "m"(st(f, 0)), [b] "m"(st(f, n))                                      \
                 : "cc")
    if constexpr (Unordered) {
        PV_X87_COMI("fucomi");
    } else {
        PV_X87_COMI("fcomi");
    }
#undef PV_X87_COMI
    commit_status(f, sw, 0);  // C1 changes only when the stack underflows
    f.oszapc = flags;
    if (Pops != 0 && !unmasked(f, sw)) pop(f);
    return true;
}

bool ftst(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    if (PV_UNLIKELY(empty(f, 0))) return compare_underflow(f, 0);
    u16 sw;
    asm volatile("fldt %[a]\n\tftst" PV_X87_STATUS "fstp %%st(0)"
                 : [sw] "=&a"(sw)
                 : [a] "m"(st(f, 0))
                 : "cc");
    return finish_compare(f, sw, 0);
}

/// Also of an empty register, of which C1 still gives the sign.
bool fxam(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    u16 sw;
    asm volatile("fldt %[a]\n\tfxam" PV_X87_STATUS "fstp %%st(0)"
                 : [sw] "=&a"(sw)
                 : [a] "m"(st(f, 0))
                 : "cc");
    if (empty(f, 0)) sw = static_cast<u16>((sw & kC1) | kC3 | kC0);
    f.x87.status = static_cast<u16>((f.x87.status & ~kCodes) | (sw & kCodes));
    return true;
}

/// FCMOVcc: condition 0..3 is B, E, BE, U. C1 changes only when the stack underflows.
template <unsigned Condition, bool Negated>
bool fcmov(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = i.rm & 7;
    if (PV_UNLIKELY(empty(f, 0) || empty(f, n))) {
        if (stack_fault(f, false)) {
            st(f, 0) = kIndefinite;
            fill(f, 0);
        }
        return true;
    }
    constexpr unsigned kMask[4] = {kStatusC, kStatusZ, kStatusC | kStatusZ, kStatusP};
    if (((f.oszapc & kMask[Condition]) != 0) != Negated) st(f, 0) = st(f, n);
    return true;
}

const OpBinding kOps[] = {
    bind<Op::FCOM_ST0_STi, compare_sti<false, 0>>(),
    bind<Op::FCOM_ST0_STi_DC, compare_sti<false, 0>>(),
    bind<Op::FCOMP_ST0_STi, compare_sti<false, 1>>(),
    bind<Op::FCOMP_ST0_STi_DC, compare_sti<false, 1>>(),
    bind<Op::FCOMP_ST0_STi_DE, compare_sti<false, 1>>(),
    bind<Op::FCOMPP, compare_sti<false, 2>>(),
    bind<Op::FUCOM_ST0_STi, compare_sti<true, 0>>(),
    bind<Op::FUCOMP_ST0_STi, compare_sti<true, 1>>(),
    bind<Op::FUCOMPP, compare_sti<true, 2>>(),
    bind<Op::FCOM_ST0_Md_f, compare_memory<Type::kFloat32, u32, 0>>(),
    bind<Op::FCOMP_ST0_Md_f, compare_memory<Type::kFloat32, u32, 1>>(),
    bind<Op::FCOM_ST0_Mq_f, compare_memory<Type::kFloat64, u64, 0>>(),
    bind<Op::FCOMP_ST0_Mq_f, compare_memory<Type::kFloat64, u64, 1>>(),
    bind<Op::FICOM_ST0_Mw_i, compare_memory<Type::kInt16, u16, 0>>(),
    bind<Op::FICOMP_ST0_Mw_i, compare_memory<Type::kInt16, u16, 1>>(),
    bind<Op::FICOM_ST0_Md_i, compare_memory<Type::kInt32, u32, 0>>(),
    bind<Op::FICOMP_ST0_Md_i, compare_memory<Type::kInt32, u32, 1>>(),
    bind<Op::FCOMI_ST0_STi, compare_to_flags<false, 0>>(),
    bind<Op::FCOMIP_ST0_STi, compare_to_flags<false, 1>>(),
    bind<Op::FUCOMI_ST0_STi, compare_to_flags<true, 0>>(),
    bind<Op::FUCOMIP_ST0_STi, compare_to_flags<true, 1>>(),
    bind<Op::FTST, ftst>(),
    bind<Op::FXAM, fxam>(),
    bind<Op::FCMOVB_ST0_STi, fcmov<0, false>>(),
    bind<Op::FCMOVE_ST0_STi, fcmov<1, false>>(),
    bind<Op::FCMOVBE_ST0_STi, fcmov<2, false>>(),
    bind<Op::FCMOVU_ST0_STi, fcmov<3, false>>(),
    bind<Op::FCMOVNB_ST0_STi, fcmov<0, true>>(),
    bind<Op::FCMOVNE_ST0_STi, fcmov<1, true>>(),
    bind<Op::FCMOVNBE_ST0_STi, fcmov<2, true>>(),
    bind<Op::FCMOVNU_ST0_STi, fcmov<3, true>>(),
};

}  // namespace

std::span<const OpBinding> compare_ops() {
    return kOps;
}

}  // namespace polyvisor::soft::x87
