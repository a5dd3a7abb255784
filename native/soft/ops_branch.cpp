// Near branches: JMP, CALL, RET, Jcc, LOOP, JrCXZ. These rows end their block: f.rip is already the
// next instruction's, and nothing may change before the target is known to be good.
#include "soft/bindings.hpp"
#include "soft/operands.hpp"

namespace polyvisor::soft {
namespace {

/// Truncates to the operand size and checks against CS (or for canonicality); false: raised #GP(0).
/// In 64-bit mode the operand size of near branches is 8 whatever the prefixes (Intel's way).
bool check_target(VcpuFrame& f, const Insn& i, u64& ip) {
    if (f.long64()) {
        unsigned width = f.cr4 & bit(12) ? 57 : 48;  // CR4.LA57
        return static_cast<u64>(sign_extend(ip, width)) == ip || raise_gp(f);
    }
    ip &= i.opsize == 2 ? 0xffff : 0xffffffff;
    return ip <= f.seg[kCs].limit || raise_gp(f);
}

bool jump(VcpuFrame& f, const Insn& i, u64 ip) {
    if (!check_target(f, i, ip)) return false;
    f.rip = ip;
    return true;
}
/// Of two faults the stack's comes first: real CPUs push before they look at the target.
[[gnu::cold]] bool call_failed(VcpuFrame& f, const Insn& i) {
    Fault target_fault = f.fault;
    f.fault = Fault{};
    u64 rsp = moved_stack_pointer(f, f.gpr[kRsp], u64{0} - i.opsize);
    u64 linear;
    if (!linear_address(f, kSs, rsp & stack_mask(f), i.opsize, true, linear) ||
        !probe_write_linear(f, linear, i.opsize, Privilege::kCurrent, kSs)) {
        return false;
    }
    f.fault = target_fault;
    return false;
}
bool call(VcpuFrame& f, const Insn& i, u64 ip) {
    if (!check_target(f, i, ip)) return call_failed(f, i);
    if (!push(f, f.rip, i.opsize)) return false;
    f.rip = ip;
    return true;
}
template <class T>
bool load_target(VcpuFrame& f, const Insn& i, u64 ea, u64& ip) {
    T value;
    if (!read_e(f, i, ea, value)) return false;
    ip = value;
    return true;
}
bool read_target(VcpuFrame& f, const Insn& i, u64 ea, u64& ip) {
    return i.opsize == 8   ? load_target<u64>(f, i, ea, ip)
           : i.opsize == 4 ? load_target<u32>(f, i, ea, ip)
                           : load_target<u16>(f, i, ea, ip);
}

bool jmp_j(VcpuFrame& f, const Insn& i, u64) {
    return jump(f, i, f.rip + i.imm);
}
bool jmp_e(VcpuFrame& f, const Insn& i, u64 ea) {
    u64 ip;
    return read_target(f, i, ea, ip) && jump(f, i, ip);
}
bool call_j(VcpuFrame& f, const Insn& i, u64) {
    return call(f, i, f.rip + i.imm);
}
bool call_e(VcpuFrame& f, const Insn& i, u64 ea) {
    u64 ip;
    return read_target(f, i, ea, ip) && call(f, i, ip);
}
template <bool Release>
bool ret(VcpuFrame& f, const Insn& i, u64) {
    u64 rsp = f.gpr[kRsp];
    u64 ip;
    if (!pop(f, ip, i.opsize)) return false;
    if (!check_target(f, i, ip)) {
        f.gpr[kRsp] = rsp;
        return false;
    }
    if constexpr (Release) f.gpr[kRsp] = moved_stack_pointer(f, f.gpr[kRsp], i.imm & 0xffff);
    f.rip = ip;
    return true;
}

bool jcc(VcpuFrame& f, const Insn& i, u64) {
    return condition(f.oszapc, i.opcode & 15) ? jump(f, i, f.rip + i.imm) : true;
}

enum class Loop { kPlain, kWhileZero, kWhileNotZero };
template <Loop K>
bool loop(VcpuFrame& f, const Insn& i, u64) {
    u64 count = (f.gpr[kRcx] - 1) & address_mask(i);
    bool zero = f.oszapc & kStatusZ;
    bool taken = count != 0 && (K == Loop::kPlain || zero == (K == Loop::kWhileZero));
    if (taken && !jump(f, i, f.rip + i.imm)) return false;
    write_address_reg(f, i, kRcx, count);
    return true;
}
bool jrcxz(VcpuFrame& f, const Insn& i, u64) {
    return (f.gpr[kRcx] & address_mask(i)) == 0 ? jump(f, i, f.rip + i.imm) : true;
}

#define PV_JCC_ROWS(cc) bind<Op::J##cc##_Jb, jcc>(), bind<Op::J##cc##_Jz, jcc>()

const OpBinding kBranchOps[] = {
    bind<Op::JMP_Jb, jmp_j>(),
    bind<Op::JMP_Jz, jmp_j>(),
    bind<Op::JMP_Ev, jmp_e>(),
    bind<Op::CALL_Jz, call_j>(),
    bind<Op::CALL_Ev, call_e>(),
    bind<Op::RET, ret<false>>(),
    bind<Op::RET_Iw, ret<true>>(),
    PV_JCC_ROWS(O),
    PV_JCC_ROWS(NO),
    PV_JCC_ROWS(B),
    PV_JCC_ROWS(NB),
    PV_JCC_ROWS(Z),
    PV_JCC_ROWS(NZ),
    PV_JCC_ROWS(BE),
    PV_JCC_ROWS(NBE),
    PV_JCC_ROWS(S),
    PV_JCC_ROWS(NS),
    PV_JCC_ROWS(P),
    PV_JCC_ROWS(NP),
    PV_JCC_ROWS(L),
    PV_JCC_ROWS(NL),
    PV_JCC_ROWS(LE),
    PV_JCC_ROWS(NLE),
    bind<Op::LOOP_Jb, loop<Loop::kPlain>>(),
    bind<Op::LOOPE_Jb, loop<Loop::kWhileZero>>(),
    bind<Op::LOOPNE_Jb, loop<Loop::kWhileNotZero>>(),
    bind<Op::JRCXZ_Jb, jrcxz>(),
};

}  // namespace

std::span<const OpBinding> branch_ops() {
    return kBranchOps;
}

}  // namespace polyvisor::soft
