// x87 loads, stores, exchanges and constants.
#include "soft/x87.hpp"

namespace polyvisor::soft::x87 {
namespace {

// --- Loads ---------------------------------------------------------------------------------------
// Conversions to the extended format are exact: no rounding, so the host's default control word
// does.

/// Pushes what `convert(Register&) -> status word` gives, unless #IA is unmasked. (#D is not reason
/// enough: the value is pushed and the exception pending.)
template <class Convert>
inline bool push_converted(VcpuFrame& f, Convert&& convert) {
    if (PV_UNLIKELY(!empty(f, 7))) {
        if (stack_fault(f, true)) push(f) = kIndefinite;
        return true;
    }
    Register value;
    u16 sw = convert(value);
    commit_status(f, static_cast<u16>(sw & ~kC1), kC1);
    if (!(unmasked(f, sw) & kInvalid)) push(f) = value;
    return true;
}

struct Extended {
    u8 bytes[10];
};

/// Stores, or only finds out whether a store would fault.
template <class T>
inline bool store_operand(VcpuFrame& f, const Insn& i, u64 ea, const T& value, bool really) {
    if (PV_UNLIKELY(!really)) return probe(f, i, ea, sizeof(T));
    return store(f, i, ea, value);
}

#define PV_X87_LOAD(name, type, text)                            \
    bool name(VcpuFrame& f, const Insn& i, u64 ea) {             \
        type source;                                             \
        if (!load(f, i, ea, source)) return false;               \
        note(f, i, ea);                                          \
        return push_converted(f, [&](Register& value) {          \
            u16 sw;                                              \
            asm volatile(text " %[s]" PV_X87_STATUS "fstpt %[r]" \
                         : [sw] "=&a"(sw), [r] "=m"(value)       \
                         : [s] "m"(source)                       \
                         : "cc");                                \
            return sw;                                           \
        });                                                      \
    }
PV_X87_LOAD(load_f32, u32, "flds")
PV_X87_LOAD(load_f64, u64, "fldl")
PV_X87_LOAD(load_f80, Extended, "fldt")
PV_X87_LOAD(load_i16, u16, "filds")
PV_X87_LOAD(load_i32, u32, "fildl")
PV_X87_LOAD(load_i64, u64, "fildq")
PV_X87_LOAD(load_bcd, Extended, "fbld")
#undef PV_X87_LOAD

bool load_sti(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = i.rm & 7;
    bool underflow = empty(f, n);
    if (PV_UNLIKELY(underflow || !empty(f, 7))) {
        if (stack_fault(f, !underflow)) push(f) = kIndefinite;
        return true;
    }
    Register value = st(f, n);
    f.x87.status &= static_cast<u16>(~kC1);
    push(f) = value;
    return true;
}

/// Constants are rounded as the control word says, without an exception.
#define PV_X87_CONSTANT(name)                                                       \
    bool name(VcpuFrame& f, const Insn& i, u64 ea) {                                \
        note(f, i, ea);                                                             \
        return push_converted(f, [&](Register& value) {                             \
            u16 sw;                                                                 \
            asm volatile(PV_X87_ENTER #name PV_X87_STATUS "fstpt %[r]" PV_X87_LEAVE \
                         : [sw] "=&a"(sw), [r] "=m"(value)                          \
                         : PV_X87_CONTROL                                           \
                         : "cc");                                                   \
            return sw;                                                              \
        });                                                                         \
    }
PV_X87_CONSTANT(fld1)
PV_X87_CONSTANT(fldl2t)
PV_X87_CONSTANT(fldl2e)
PV_X87_CONSTANT(fldpi)
PV_X87_CONSTANT(fldlg2)
PV_X87_CONSTANT(fldln2)
PV_X87_CONSTANT(fldz)
#undef PV_X87_CONSTANT

// --- Stores --------------------------------------------------------------------------------------

/// Unmasked, these leave memory and stack alone; precision is reported after the store.
constexpr u16 kNoStore = kInvalid | kOverflow | kUnderflow;

/// Memory is written before anything of the FPU changes, so that a page fault finds it untouched.
template <class T, class Convert>
inline bool store_converted(VcpuFrame& f, const Insn& i, u64 ea, const T& indefinite, bool pops,
                            Convert&& convert) {
    if (PV_UNLIKELY(empty(f, 0))) {
        bool masked = f.x87.control & kInvalid;
        if (!store_operand(f, i, ea, indefinite, masked)) return false;
        note(f, i, ea);
        stack_fault(f, false);
        if (masked && pops) pop(f);
        return true;
    }
    T value;
    u16 sw = convert(value);
    bool blocked = unmasked(f, sw) & kNoStore;
    if (!store_operand(f, i, ea, value, !blocked)) return false;
    note(f, i, ea);
    commit_status(f, sw, kC1);
    if (pops && !blocked) pop(f);
    return true;
}

// FISTTP and FBSTP exist only with a pop on the host; if it does not pop, something is left to
// drop.
#define PV_X87_STORE(name, type, indefinite, pops, text)                            \
    bool name(VcpuFrame& f, const Insn& i, u64 ea) {                                \
        return store_converted<type>(f, i, ea, indefinite, pops, [&](type& value) { \
            u16 sw;                                                                 \
            asm volatile(PV_X87_ENTER "fldt %[a]\n\t" text " %[v]" PV_X87_STATUS    \
                                      "fstp %%st(0)" PV_X87_LEAVE                   \
                         : [sw] "=&a"(sw), [v] "=m"(value)                          \
                         : [a] "m"(st(f, 0)), PV_X87_CONTROL                        \
                         : "cc");                                                   \
            return sw;                                                              \
        });                                                                         \
    }
#define PV_X87_STORE_POP(name, type, indefinite, text)                                    \
    bool name(VcpuFrame& f, const Insn& i, u64 ea) {                                      \
        return store_converted<type>(f, i, ea, indefinite, true, [&](type& value) {       \
            u16 before, sw;                                                               \
            asm volatile(PV_X87_ENTER                                                     \
                         "fldt %[a]\n\tfnstsw %[before]\n\t" text " %[v]" PV_X87_STATUS   \
                         "xorw %%ax, %[before]\n\ttestw $0x3800, %[before]\n\tjnz 4f\n\t" \
                         "fstp %%st(0)\n4:" PV_X87_LEAVE                                  \
                         : [sw] "=&a"(sw), [v] "=m"(value), [before] "=m"(before)         \
                         : [a] "m"(st(f, 0)), PV_X87_CONTROL                              \
                         : "cc");                                                         \
            return sw;                                                                    \
        });                                                                               \
    }
constexpr Extended kIndefiniteBcd{{0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff}};
PV_X87_STORE(store_f32, u32, 0xffc00000u, false, "fsts")
PV_X87_STORE(store_f32_pop, u32, 0xffc00000u, true, "fsts")
PV_X87_STORE(store_f64, u64, u64{0xfff8000000000000}, false, "fstl")
PV_X87_STORE(store_f64_pop, u64, u64{0xfff8000000000000}, true, "fstl")
PV_X87_STORE(store_i16, u16, u16{0x8000}, false, "fists")
PV_X87_STORE(store_i16_pop, u16, u16{0x8000}, true, "fists")
PV_X87_STORE(store_i32, u32, 0x80000000u, false, "fistl")
PV_X87_STORE(store_i32_pop, u32, 0x80000000u, true, "fistl")
PV_X87_STORE_POP(store_i64_pop, u64, u64{1} << 63, "fistpq")
PV_X87_STORE_POP(store_i16_truncated, u16, u16{0x8000}, "fisttps")
PV_X87_STORE_POP(store_i32_truncated, u32, 0x80000000u, "fisttpl")
PV_X87_STORE_POP(store_i64_truncated, u64, u64{1} << 63, "fisttpq")
PV_X87_STORE_POP(store_bcd, Extended, kIndefiniteBcd, "fbstp")
#undef PV_X87_STORE
#undef PV_X87_STORE_POP

/// FSTP m80 converts nothing.
bool store_f80(VcpuFrame& f, const Insn& i, u64 ea) {
    Extended value;
    bool underflow = empty(f, 0);
    Register from = underflow ? kIndefinite : st(f, 0);
    std::memcpy(&value, &from, sizeof value);
    bool stores = !underflow || (f.x87.control & kInvalid);
    if (!store_operand(f, i, ea, value, stores)) return false;
    note(f, i, ea);
    f.x87.status &= static_cast<u16>(~kC1);
    if (PV_UNLIKELY(underflow) && !stack_fault(f, false)) return true;
    pop(f);
    return true;
}

template <bool Pop>
bool store_sti(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = i.rm & 7;
    if (PV_UNLIKELY(empty(f, 0))) {
        if (!stack_fault(f, false)) return true;
        st(f, n) = kIndefinite;
    } else {
        f.x87.status &= static_cast<u16>(~kC1);
        st(f, n) = st(f, 0);
    }
    fill(f, n);
    if constexpr (Pop) pop(f);
    return true;
}

/// "Store and pop, no check for empty": an empty ST(0) is popped without being stored.
bool store_sti_unchecked(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = i.rm & 7;
    if (!empty(f, 0)) {
        st(f, n) = st(f, 0);
        fill(f, n);
    }
    f.x87.status &= static_cast<u16>(~kC1);
    pop(f);
    return true;
}

bool fxch(VcpuFrame& f, const Insn& i, u64 ea) {
    note(f, i, ea);
    unsigned n = i.rm & 7;
    if (PV_UNLIKELY(empty(f, 0) || empty(f, n))) {
        if (!stack_fault(f, false)) return true;
        for (unsigned m : {0u, n}) {
            if (empty(f, m)) st(f, m) = kIndefinite;
            fill(f, m);
        }
    }
    f.x87.status &= static_cast<u16>(~kC1);
    std::swap(st(f, 0), st(f, n));
    return true;
}

const OpBinding kOps[] = {
    bind<Op::FLD_Md_f, load_f32>(),
    bind<Op::FLD_Mq_f, load_f64>(),
    bind<Op::FLD_M80, load_f80>(),
    bind<Op::FILD_Mw_i, load_i16>(),
    bind<Op::FILD_Md_i, load_i32>(),
    bind<Op::FILD_Mq_i, load_i64>(),
    bind<Op::FBLD_M80, load_bcd>(),
    bind<Op::FLD_STi, load_sti>(),
    bind<Op::FLD1, fld1>(),
    bind<Op::FLDL2T, fldl2t>(),
    bind<Op::FLDL2E, fldl2e>(),
    bind<Op::FLDPI, fldpi>(),
    bind<Op::FLDLG2, fldlg2>(),
    bind<Op::FLDLN2, fldln2>(),
    bind<Op::FLDZ, fldz>(),
    bind<Op::FST_Md_f, store_f32>(),
    bind<Op::FSTP_Md_f, store_f32_pop>(),
    bind<Op::FST_Mq_f, store_f64>(),
    bind<Op::FSTP_Mq_f, store_f64_pop>(),
    bind<Op::FSTP_M80, store_f80>(),
    bind<Op::FIST_Mw_i, store_i16>(),
    bind<Op::FISTP_Mw_i, store_i16_pop>(),
    bind<Op::FIST_Md_i, store_i32>(),
    bind<Op::FISTP_Md_i, store_i32_pop>(),
    bind<Op::FISTP_Mq_i, store_i64_pop>(),
    bind<Op::FISTTP_Mw_i, store_i16_truncated>(),
    bind<Op::FISTTP_Md_i, store_i32_truncated>(),
    bind<Op::FISTTP_Mq_i, store_i64_truncated>(),
    bind<Op::FBSTP_M80, store_bcd>(),
    bind<Op::FST_STi_ST0, store_sti<false>>(),
    bind<Op::FSTP_STi_ST0, store_sti<true>>(),
    bind<Op::FSTP_STi_ST0_DF2, store_sti<true>>(),
    bind<Op::FSTP_STi_ST0_DF3, store_sti<true>>(),
    bind<Op::FSTPNCE_STi_ST0, store_sti_unchecked>(),
    bind<Op::FXCH_ST0_STi, fxch>(),
    bind<Op::FXCH_ST0_STi_DD, fxch>(),
    bind<Op::FXCH_ST0_STi_DF, fxch>(),
};

}  // namespace

std::span<const OpBinding> data_ops() {
    return kOps;
}

}  // namespace polyvisor::soft::x87
