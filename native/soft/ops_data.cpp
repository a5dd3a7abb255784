// Data movement: MOV and its kin, XCHG, XADD, CMPXCHG*, LEA, the stack (PUSH, POP, PUSHA, POPA,
// ENTER, LEAVE), XLAT, single flags, SETcc, CMOVcc, hints and fences, BOUND, UD.
#include "soft/bindings.hpp"
#include "soft/operands.hpp"

namespace polyvisor::soft {

std::mutex& split_lock() {
    static std::mutex mutex;
    return mutex;
}

namespace {

// --- MOV -----------------------------------------------------------------------------------------

template <class T>
bool mov_eg(VcpuFrame& f, const Insn& i, u64 ea) {
    return write_e(f, i, ea, get_reg<T>(f, i, i.reg));
}
template <class T>
bool mov_ge(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    if (!read_e(f, i, ea, value)) return false;
    set_reg<T>(f, i, i.reg, value);
    return true;
}
template <class T>
bool mov_ei(VcpuFrame& f, const Insn& i, u64 ea) {
    return write_e(f, i, ea, static_cast<T>(i.imm));
}
template <class T>
bool mov_ao(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    if (!load(f, i, ea, value)) return false;
    set_accumulator(f, value);
    return true;
}
template <class T>
bool mov_oa(VcpuFrame& f, const Insn& i, u64 ea) {
    return store(f, i, ea, static_cast<T>(f.gpr[kRax]));
}
bool mov_eg_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(mov_eg);
}
bool mov_ge_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(mov_ge);
}
bool mov_ei_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(mov_ei);
}
bool mov_ao_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(mov_ao);
}
bool mov_oa_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(mov_oa);
}

bool mov_zi_b(VcpuFrame& f, const Insn& i, u64) {
    *reg8(f, i, i.rm) = static_cast<u8>(i.imm);
    return true;
}
bool mov_zi_v(VcpuFrame& f, const Insn& i, u64) {
    write_reg(f, i.rm, i.opsize, i.imm);
    return true;
}

/// MOVZX, MOVSX: From is the source's type, signed or not.
template <class From>
bool extend(VcpuFrame& f, const Insn& i, u64 ea) {
    std::make_unsigned_t<From> value;
    if (!read_e(f, i, ea, value)) return false;
    write_reg(f, i.reg, i.opsize, static_cast<u64>(static_cast<From>(value)));
    return true;
}

bool lea(VcpuFrame& f, const Insn& i, u64 ea) {
    write_reg(f, i.reg, i.opsize, ea);
    return true;
}

/// XLAT: AL = [rBX + AL].
bool xlat(VcpuFrame& f, const Insn& i, u64) {
    u64 address = (f.gpr[kRbx] + (f.gpr[kRax] & 0xff)) & address_mask(i);
    u8 value;
    if (!load(f, i, address, value)) return false;
    set_accumulator(f, value);
    return true;
}

// --- Exchanges -----------------------------------------------------------------------------------

/// With memory always locked, LOCK prefix or not (SDM 3A 9.1.2.1).
template <class T>
bool xchg_eg(VcpuFrame& f, const Insn& i, u64 ea) {
    T value = get_reg<T>(f, i, i.reg);
    if (!i.has_mem) {
        T other = get_reg<T>(f, i, i.rm);
        set_reg<T>(f, i, i.rm, value);
        set_reg<T>(f, i, i.reg, other);
        return true;
    }
    Target target;
    if (!open_target<T>(f, i, ea, target)) return false;
    T old;
    if (target.host) {
        old = value;
        asm volatile("xchg %0, %1"
                     : "+r"(old), "+m"(*reinterpret_cast<T*>(target.host))
                     :
                     : "memory");
    } else {
        std::lock_guard guard(split_lock());
        if (!target.read(f, old) || !target.write(f, value)) return false;
    }
    set_reg<T>(f, i, i.reg, old);
    return true;
}
bool xchg_eg_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(xchg_eg);
}
bool xchg_za(VcpuFrame& f, const Insn& i, u64) {
    u64 value = f.gpr[i.rm];
    write_reg(f, i.rm, i.opsize, f.gpr[kRax]);
    write_reg(f, kRax, i.opsize, value);
    return true;
}

template <class T>
inline T add_flags(u16& flags, T a, T b) {
    asm("add %[b], %[a]" PV_FLAGS_OUT : "=&a"(flags), [a] "+&r"(a) : [b] "r"(b) : "cc");
    return a;
}
template <class T>
bool xadd_eg(VcpuFrame& f, const Insn& i, u64 ea) {
    T addend = get_reg<T>(f, i, i.reg);
    if (!i.has_mem) {
        T old = get_reg<T>(f, i, i.rm);
        T sum = add_flags(f.oszapc, old, addend);
        set_reg<T>(f, i, i.reg, old);
        set_reg<T>(f, i, i.rm, sum);  // last: it wins when both are the same register
        return true;
    }
    T old{};
    bool ok = modify<T>(
        f, i, ea,
        [&](T value) {
            old = value;
            return add_flags(f.oszapc, value, addend);
        },
        [&](T* p) {
            old = addend;
            asm volatile("lock xadd %[b], %[p]" PV_FLAGS_OUT
                         : "=&a"(f.oszapc), [p] "+m"(*p), [b] "+&r"(old)
                         :
                         : "cc", "memory");
        });
    if (ok) set_reg<T>(f, i, i.reg, old);
    return ok;
}
bool xadd_eg_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(xadd_eg);
}

/// Whole registers through the host's instruction: what becomes of the upper halves is the host's.
template <class T>
inline void cmpxchg_registers(u16& flags, u64& accumulator, u64& destination, u64 source) {
    u64 rax = accumulator;
#define PV_CMPXCHG(modifier)                                                           \
    asm("cmpxchg %" modifier "[s], %" modifier "[d]\n\tmov %%rax, %[acc]" PV_FLAGS_OUT \
        : "+&a"(rax), [d] "+&r"(destination), [acc] "=&r"(accumulator)                 \
        : [s] "r"(source)                                                              \
        : "cc")
    if constexpr (sizeof(T) == 1) PV_CMPXCHG("b");
    if constexpr (sizeof(T) == 2) PV_CMPXCHG("w");
    if constexpr (sizeof(T) == 4) PV_CMPXCHG("k");
    if constexpr (sizeof(T) == 8) PV_CMPXCHG("q");
#undef PV_CMPXCHG
    flags = static_cast<u16>(rax);
}
template <class T>
bool cmpxchg_eg(VcpuFrame& f, const Insn& i, u64 ea) {
    T source = get_reg<T>(f, i, i.reg);
    if (!i.has_mem && sizeof(T) > 1) {
        u64 accumulator = f.gpr[kRax];
        if (i.rm == kRax) {  // equal to itself
            cmpxchg_registers<T>(f.oszapc, accumulator, f.gpr[kRax], source);
        } else {
            cmpxchg_registers<T>(f.oszapc, accumulator, f.gpr[i.rm], source);
            f.gpr[kRax] = accumulator;
        }
        return true;
    }
    u64 accumulator = f.gpr[kRax];
    bool ok = modify<T>(
        f, i, ea,
        [&](T value) {
            u64 destination = value;
            cmpxchg_registers<T>(f.oszapc, accumulator, destination, source);
            return static_cast<T>(destination);
        },
        [&](T* p) {
            u64 rax = accumulator;
            asm volatile("lock cmpxchg %[s], %[p]\n\tmov %%rax, %[acc]" PV_FLAGS_OUT
                         : "+&a"(rax), [p] "+m"(*p), [acc] "=&r"(accumulator)
                         : [s] "r"(source)
                         : "cc", "memory");
            f.oszapc = static_cast<u16>(rax);
        });
    if (!ok) return false;
    // Byte registers: only a failed comparison writes AL, and AH may be the destination.
    if (sizeof(T) > 1) {
        f.gpr[kRax] = accumulator;
    } else if (!(f.oszapc & kStatusZ)) {
        set_accumulator(f, static_cast<u8>(accumulator));
    }
    return true;
}
bool cmpxchg_eg_v(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(cmpxchg_eg);
}

/// CMPXCHG8B and CMPXCHG16B; T is half of the operand. On a host page always atomic: it costs
/// little and is never wrong.
template <class T>
bool cmpxchg_pair(VcpuFrame& f, const Insn& i, u64 ea) {
    struct Pair {
        T low, high;
        bool operator==(const Pair&) const = default;
    };
    Target target;
    if constexpr (sizeof(T) == 8) {
        u64 linear;
        if (!linear_address(f, i.segment, ea, 16, true, linear)) return false;
        if (linear & 15) return raise_gp(f);
    }
    if (!open_target<Pair>(f, i, ea, target)) return false;
    Pair expected{static_cast<T>(f.gpr[kRax]), static_cast<T>(f.gpr[kRdx])};
    Pair replacement{static_cast<T>(f.gpr[kRbx]), static_cast<T>(f.gpr[kRcx])};
    Pair found = expected;
    bool equal;
    if (target.host) {
        auto* p = reinterpret_cast<Pair*>(target.host);
        if constexpr (sizeof(T) == 4) {
            asm volatile("lock cmpxchg8b %[p]\n\tsetz %[equal]"
                         : [p] "+m"(*p), "+a"(found.low), "+d"(found.high), [equal] "=q"(equal)
                         : "b"(replacement.low), "c"(replacement.high)
                         : "cc", "memory");
        } else {
            asm volatile("lock cmpxchg16b %[p]\n\tsetz %[equal]"
                         : [p] "+m"(*p), "+a"(found.low), "+d"(found.high), [equal] "=q"(equal)
                         : "b"(replacement.low), "c"(replacement.high)
                         : "cc", "memory");
        }
    } else {
        std::lock_guard guard(split_lock());
        if (!target.read(f, found)) return false;
        equal = found == expected;
        if (!target.write(f, equal ? replacement : found)) return false;
    }
    if (equal) {
        f.oszapc |= kStatusZ;
    } else {
        f.oszapc &= static_cast<u16>(~kStatusZ);
        write_reg(f, kRax, sizeof(T), found.low);
        write_reg(f, kRdx, sizeof(T), found.high);
    }
    return true;
}

// --- The stack -----------------------------------------------------------------------------------

bool push_z(VcpuFrame& f, const Insn& i, u64) {
    return push(f, f.gpr[i.rm], i.opsize);
}
bool push_i(VcpuFrame& f, const Insn& i, u64) {
    return push(f, i.imm, i.opsize);
}
template <class T>
bool push_e_sized(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    return read_e(f, i, ea, value) && push(f, value, sizeof(T));
}
bool push_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(push_e_sized);
}

/// POP rSP: the popped value wins over the increment.
bool pop_z(VcpuFrame& f, const Insn& i, u64) {
    u64 value;
    if (!pop(f, value, i.opsize)) return false;
    write_reg(f, i.rm, i.opsize, value);
    return true;
}
/// An address based on rSP is computed after the increment (SDM 2B, POP).
template <class T>
bool pop_e_sized(VcpuFrame& f, const Insn& i, u64 ea) {
    u64 rsp = f.gpr[kRsp];
    u64 value;
    if (!pop(f, value, sizeof(T))) return false;
    if (i.has_mem && i.base == kRsp) ea = (ea + (f.gpr[kRsp] - rsp)) & address_mask(i);
    if (i.has_mem) {
        if (store(f, i, ea, static_cast<T>(value))) return true;
        f.gpr[kRsp] = rsp;
        return false;
    }
    write_reg(f, i.rm, sizeof(T), value);
    return true;
}
bool pop_e(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(pop_e_sized);
}

bool pusha(VcpuFrame& f, const Insn& i, u64) {
    u64 rsp = f.gpr[kRsp];
    for (u8 n = 0; n < 8; ++n) {
        if (!push(f, n == kRsp ? rsp : f.gpr[n], i.opsize)) {
            f.gpr[kRsp] = rsp;
            return false;
        }
    }
    return true;
}
/// Registers change one by one, also when a later one faults: it can be restarted all the same.
bool popa(VcpuFrame& f, const Insn& i, u64) {
    u64 rsp = f.gpr[kRsp];
    for (int n = 7; n >= 0; --n) {
        u64 value;
        if (!pop(f, value, i.opsize)) {
            f.gpr[kRsp] = rsp;
            return false;
        }
        if (n != kRsp) write_reg(f, static_cast<u8>(n), i.opsize, value);
    }
    return true;
}

/// Reads `size` bytes at SS:offset.
bool read_stack(VcpuFrame& f, u64 offset, u64& value, unsigned size) {
    u64 linear;
    value = 0;
    return linear_address(f, kSs, offset & stack_mask(f), size, false, linear) &&
           read_linear(f, linear, &value, size, Privilege::kCurrent, kSs);
}

/// Addresses have the width of the stack; what is pushed and rBP, but for 64-bit mode, the
/// operand's.
bool enter(VcpuFrame& f, const Insn& i, u64) {
    unsigned size = i.opsize;
    unsigned level = i.imm2 & 31;
    u64 rsp = f.gpr[kRsp];
    auto fail = [&] {
        f.gpr[kRsp] = rsp;
        return false;
    };
    if (!push(f, f.gpr[kRbp], size)) return false;
    u64 frame = f.gpr[kRsp];
    u64 outer = f.gpr[kRbp];
    for (unsigned n = 1; n < level; ++n) {
        outer -= size;
        u64 value;
        if (!read_stack(f, outer, value, size) || !push(f, value, size)) return fail();
    }
    if (level > 0 && !push(f, frame, size)) return fail();
    u64 top = moved_stack_pointer(f, f.gpr[kRsp], u64{0} - (i.imm & 0xffff));
    // The new top must be writable, though nothing is written there (SDM 2A, ENTER).
    u64 linear;
    if (!linear_address(f, kSs, top & stack_mask(f), size, true, linear) ||
        !probe_write_linear(f, linear, size, Privilege::kCurrent, kSs)) {
        return fail();
    }
    f.gpr[kRsp] = top;
    write_reg(f, kRbp, size,
              frame);  // in 64-bit mode, too, 16-bit ENTER writes only BP (as measured)
    return true;
}

bool leave(VcpuFrame& f, const Insn& i, u64) {
    u64 rsp = f.gpr[kRsp];
    u64 mask = stack_mask(f);
    f.gpr[kRsp] = (rsp & ~mask) | (f.gpr[kRbp] & mask);
    u64 value;
    if (!pop(f, value, i.opsize)) {
        f.gpr[kRsp] = rsp;
        return false;
    }
    write_reg(f, kRbp, i.opsize, value);
    return true;
}

// --- Flags and conditions ------------------------------------------------------------------------

bool lahf(VcpuFrame& f, const Insn&, u64) {
    u8 ah = static_cast<u8>((f.oszapc >> 8 & 0xd5) | 2);
    std::memcpy(reinterpret_cast<u8*>(f.gpr) + 1, &ah, 1);
    return true;
}
bool sahf(VcpuFrame& f, const Insn&, u64) {
    f.oszapc = static_cast<u16>((f.gpr[kRax] & 0xd500) | 0x200 | (f.oszapc & 1));
    return true;
}
bool clc(VcpuFrame& f, const Insn&, u64) {
    f.oszapc &= static_cast<u16>(~kStatusC);
    return true;
}
bool stc(VcpuFrame& f, const Insn&, u64) {
    f.oszapc |= kStatusC;
    return true;
}
bool cmc(VcpuFrame& f, const Insn&, u64) {
    f.oszapc ^= kStatusC;
    return true;
}
bool cld(VcpuFrame& f, const Insn&, u64) {
    f.rflags_rest &= ~u64{kFlagD};
    return true;
}
bool std_(VcpuFrame& f, const Insn&, u64) {
    f.rflags_rest |= kFlagD;
    return true;
}
bool salc(VcpuFrame& f, const Insn&, u64) {
    set_accumulator<u8>(f, f.oszapc & kStatusC ? 0xff : 0);
    return true;
}

bool setcc(VcpuFrame& f, const Insn& i, u64 ea) {
    return write_e<u8>(f, i, ea, condition(f.oszapc, i.opcode & 15));
}
/// The source is read, and the upper half of a 32-bit destination cleared, whatever the condition.
template <class T>
bool cmov_sized(VcpuFrame& f, const Insn& i, u64 ea) {
    T value;
    if (!read_e(f, i, ea, value)) return false;
    if (!condition(f.oszapc, i.opcode & 15)) value = get_reg<T>(f, i, i.reg);
    set_reg<T>(f, i, i.reg, value);
    return true;
}
bool cmov(VcpuFrame& f, const Insn& i, u64 ea) {
    return PV_BY_OPSIZE(cmov_sized);
}

// --- Hints, BOUND, UD ----------------------------------------------------------------------------

bool nop(VcpuFrame&, const Insn&, u64) {
    return true;
}
bool pause(VcpuFrame&, const Insn&, u64) {
    asm volatile("pause");
    return true;
}

// Guest accesses are host accesses, so that the host's fences order them.
bool lfence(VcpuFrame&, const Insn&, u64) {
    asm volatile("lfence" ::: "memory");
    return true;
}
bool mfence(VcpuFrame&, const Insn&, u64) {
    asm volatile("mfence" ::: "memory");
    return true;
}
bool sfence(VcpuFrame&, const Insn&, u64) {
    asm volatile("sfence" ::: "memory");
    return true;
}

/// MOVNTI: an ordinary store keeps more order than the guest asks for.
bool movnti(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.opsize == 8 ? store(f, i, ea, f.gpr[i.reg])
                         : store(f, i, ea, static_cast<u32>(f.gpr[i.reg]));
}

/// CLFLUSH, CLFLUSHOPT, CLWB: memory is coherent, so that only the address is checked, as for a
/// read.
bool flush_line(VcpuFrame& f, const Insn& i, u64 ea) {
    u64 linear;
    if (!linear_address(f, i.segment, ea, 1, false, linear)) return false;
    return readable_host(f, linear, 1, Privilege::kCurrent, i.segment) ||
           f.fault.pending == Pending::kNone;
}

template <class S>
bool bound_sized(VcpuFrame& f, const Insn& i, u64 ea) {
    S lower, upper;  // not one access: each is aligned for itself
    if (!load(f, i, ea, lower) || !load(f, i, (ea + sizeof(S)) & address_mask(i), upper)) {
        return false;
    }
    S index = static_cast<S>(f.gpr[i.reg]);
    return index >= lower && index <= upper ? true : raise(f, kBr);
}
bool bound(VcpuFrame& f, const Insn& i, u64 ea) {
    return i.opsize == 2 ? bound_sized<s16>(f, i, ea) : bound_sized<s32>(f, i, ea);
}

bool ud(VcpuFrame& f, const Insn&, u64) {
    return raise_ud(f);
}

#define PV_CONDITIONS(row)                                                                         \
    row(O), row(NO), row(B), row(NB), row(Z), row(NZ), row(BE), row(NBE), row(S), row(NS), row(P), \
        row(NP), row(L), row(NL), row(LE), row(NLE)
#define PV_SET_ROW(cc) bind<Op::SET##cc##_Eb, setcc>()
#define PV_CMOV_ROW(cc) bind<Op::CMOV##cc##_Gv_Ev, cmov>()

const OpBinding kDataOps[] = {
    bind<Op::MOV_Eb_Gb, mov_eg<u8>>(),
    bind<Op::MOV_Ev_Gv, mov_eg_v>(),
    bind<Op::MOV_Gb_Eb, mov_ge<u8>>(),
    bind<Op::MOV_Gv_Ev, mov_ge_v>(),
    bind<Op::MOV_AL_Ob, mov_ao<u8>>(),
    bind<Op::MOV_rAX_Ov, mov_ao_v>(),
    bind<Op::MOV_Ob_AL, mov_oa<u8>>(),
    bind<Op::MOV_Ov_rAX, mov_oa_v>(),
    bind<Op::MOV_Zb_Ib, mov_zi_b>(),
    bind<Op::MOV_Zv_Iv, mov_zi_v>(),
    bind<Op::MOV_Eb_Ib, mov_ei<u8>>(),
    bind<Op::MOV_Ev_Iz, mov_ei_v>(),
    bind<Op::MOVZX_Gv_Eb, extend<u8>>(),
    bind<Op::MOVZX_Gv_Ew, extend<u16>>(),
    bind<Op::MOVSX_Gv_Eb, extend<s8>>(),
    bind<Op::MOVSX_Gv_Ew, extend<s16>>(),
    bind<Op::MOVSXD_Gv_Ed, extend<s32>>(),
    bind<Op::LEA_Gv_M, lea>(),
    bind<Op::XLAT, xlat>(),
    bind<Op::XCHG_Eb_Gb, xchg_eg<u8>>(),
    bind<Op::XCHG_Ev_Gv, xchg_eg_v>(),
    bind<Op::XCHG_Zv_rAX, xchg_za>(),
    bind<Op::XADD_Eb_Gb, xadd_eg<u8>>(),
    bind<Op::XADD_Ev_Gv, xadd_eg_v>(),
    bind<Op::CMPXCHG_Eb_Gb, cmpxchg_eg<u8>>(),
    bind<Op::CMPXCHG_Ev_Gv, cmpxchg_eg_v>(),
    bind<Op::CMPXCHG8B_Mq, cmpxchg_pair<u32>>(),
    bind<Op::CMPXCHG16B_Mdq, cmpxchg_pair<u64>>(),
    bind<Op::PUSH_Zv, push_z>(),
    bind<Op::PUSH_Iz, push_i>(),
    bind<Op::PUSH_sIb, push_i>(),
    bind<Op::PUSH_Ev, push_e>(),
    bind<Op::POP_Zv, pop_z>(),
    bind<Op::POP_Ev, pop_e>(),
    bind<Op::PUSHA, pusha>(),
    bind<Op::POPA, popa>(),
    bind<Op::ENTER_Iw_Ib, enter>(),
    bind<Op::LEAVE, leave>(),
    bind<Op::LAHF, lahf>(),
    bind<Op::LAHF_64, lahf>(),
    bind<Op::SAHF, sahf>(),
    bind<Op::SAHF_64, sahf>(),
    bind<Op::CLC, clc>(),
    bind<Op::STC, stc>(),
    bind<Op::CMC, cmc>(),
    bind<Op::CLD, cld>(),
    bind<Op::STD, std_>(),
    bind<Op::SALC, salc>(),
    PV_CONDITIONS(PV_SET_ROW),
    PV_CONDITIONS(PV_CMOV_ROW),
    bind<Op::NOP, nop>(),
    bind<Op::NOP_Ev_0D, nop>(),
    bind<Op::NOP_Ev_18, nop>(),
    bind<Op::NOP_Ev_19, nop>(),
    bind<Op::NOP_Ev_1A, nop>(),
    bind<Op::NOP_Ev_1B, nop>(),
    bind<Op::NOP_Ev_1C, nop>(),
    bind<Op::NOP_Ev_1D, nop>(),
    bind<Op::NOP_Ev_1E, nop>(),
    bind<Op::NOP_Ev_1F, nop>(),
    bind<Op::ENDBR64, nop>(),
    bind<Op::ENDBR32, nop>(),
    bind<Op::PREFETCHW_M, nop>(),
    bind<Op::PREFETCH_M, nop>(),
    bind<Op::PREFETCHNTA_M, nop>(),
    bind<Op::PREFETCHT0_M, nop>(),
    bind<Op::PREFETCHT1_M, nop>(),
    bind<Op::PREFETCHT2_M, nop>(),
    bind<Op::PAUSE, pause>(),
    bind<Op::LFENCE, lfence>(),
    bind<Op::MFENCE, mfence>(),
    bind<Op::SFENCE, sfence>(),
    bind<Op::MOVNTI_My_Gy, movnti>(),
    bind<Op::CLFLUSH_Mb, flush_line>(),
    bind<Op::CLFLUSHOPT_Mb, flush_line>(),
    bind<Op::CLWB_Mb, flush_line>(),
    bind<Op::BOUND_Gv_Ma, bound>(),
    bind<Op::UD0_Gv_Ev, ud>(),
    bind<Op::UD1_Gv_Ev, ud>(),
    bind<Op::UD2, ud>(),
};

}  // namespace

std::span<const OpBinding> data_ops() {
    return kDataOps;
}

}  // namespace polyvisor::soft
