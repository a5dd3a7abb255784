// Far transfers: JMP, CALL, RET and IRET in every mode, software interrupts, and the fast system
// calls.
#include "soft/bindings.hpp"
#include "soft/descriptors.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

// --- Stacks --------------------------------------------------------------------------------------

bool StackFrame::address(u64 sp, u32 size, u64& linear) {
    if (PV_LIKELY(long_)) {
        linear = sp;
        return true;
    }
    u32 offset = static_cast<u32>(sp & mask_);
    u64 last = u64{offset} + size - 1;
    bool expand_down = (ss_.attributes & 0xc) == 4 && f_.protected_mode();
    bool inside = expand_down ? offset > ss_.limit && last <= (ss_.db() ? 0xffffffff : 0xffff)
                              : last <= ss_.limit;
    if (ss_.unusable() || !inside) return raise(f_, kSsFault, error_);
    linear = static_cast<u32>(ss_.base + offset);
    return true;
}

namespace {

template <class T>
u64 load_as(const u8* host) {
    T value;
    std::memcpy(&value, host, sizeof value);
    return value;
}
/// Whole loads and stores, not byte copies: other CPUs may look.
u64 load_sized(const u8* host, u32 size) {
    return size == 8 ? load_as<u64>(host) : size == 4 ? load_as<u32>(host) : load_as<u16>(host);
}
void store_sized(u8* host, u64 value, u32 size) {
    if (size == 8) {
        std::memcpy(host, &value, 8);
    } else if (size == 4) {
        std::memcpy(host, &value, 4);
    } else {
        std::memcpy(host, &value, 2);
    }
}

/// The soft TLB that an access of this privilege uses, for the fast path of stack frames.
Tlb& tlb_for(VcpuFrame& f, Privilege privilege) {
    switch (privilege) {
        case Privilege::kCurrent:
            return *f.tlb_now;
        case Privilege::kUser:
            return f.tlb[kTlbUser];
        default:
            return supervisor_tlb(f);
    }
}

}  // namespace

bool StackFrame::push(u64 value, u32 size) {
    u64 sp = sp_ - size;
    u64 linear;
    if (!address(sp, size, linear)) return false;
    Tlb& tlb = tlb_for(f_, privilege_);
    u64 n = (linear >> 12) & 255;
    if (PV_LIKELY(linear + tlb.neg_w[n] <= 4096 - size)) {
        store_sized(reinterpret_cast<u8*>(linear + tlb.addend[n]), value, size);
    } else if (!write_linear(f_, linear, &value, size, privilege_, kSs)) {
        return false;
    }
    sp_ = sp;
    return true;
}

bool StackFrame::pop(u64& value, u32 size) {
    u64 linear;
    if (!address(sp_, size, linear)) return false;
    value = 0;
    Tlb& tlb = tlb_for(f_, privilege_);
    u64 n = (linear >> 12) & 255;
    if (PV_LIKELY(linear + tlb.neg_r[n] <= 4096 - size)) {
        value = load_sized(reinterpret_cast<const u8*>(linear + tlb.addend[n]), size);
    } else if (!read_linear(f_, linear, &value, size, privilege_, kSs)) {
        return false;
    }
    sp_ += size;
    return true;
}

bool check_target(VcpuFrame& f, const Descriptor& d, u64 ip, u32 ext) {
    bool good = long_active(f) && d.l() ? is_canonical(f, ip) : ip <= d.limit();
    return good || raise_gp(f, ext);
}

namespace {

u64 truncate(u64 value, u32 size) {
    return size == 8 ? value : value & (bit(size * 8) - 1);
}

/// New value of RSP's visible part on the stack segment just loaded.
void set_stack_pointer(VcpuFrame& f, u64 sp) {
    if (f.msr.efer & bit(10) && f.seg[kCs].l()) {
        f.gpr[kRsp] = sp;
    } else if (f.seg[kSs].db()) {
        f.gpr[kRsp] = static_cast<u32>(sp);
    } else {
        f.gpr[kRsp] = (f.gpr[kRsp] & ~u64{0xffff}) | (sp & 0xffff);
    }
}

/// Type, privilege and presence of the code segment a JMP or CALL names (SDM 3A, 5.8.1). `rpl` is 0
/// when it comes out of a gate.
bool check_code_segment(VcpuFrame& f, u16 selector, const Descriptor& d, u8 rpl) {
    bool good = d.code() && !(long_active(f) && d.l() && d.db());
    if (d.conforming()) {
        good = good && d.dpl() <= f.cpl;
    } else {
        good = good && d.dpl() == f.cpl && rpl <= f.cpl;
    }
    if (!good) return raise_gp(f, selector_error(selector));
    if (!d.present()) return raise(f, kNp, selector_error(selector));
    return true;
}

void finish_code(VcpuFrame& f, u16 selector, u8 cpl, const Descriptor& d, u64 ip) {
    enter_code(f, selector, cpl, d, ip);
    update_mode(f);
}

// --- JMP and CALL through gates ------------------------------------------------------------------

bool fetch_gate_target(VcpuFrame& f, const Descriptor& gate, u16& selector, Descriptor& code) {
    selector = gate.gate_selector();
    if (null_selector(selector)) return raise_gp(f);
    if (!fetch_descriptor(f, selector, code)) return false;
    if (long_active(f) && !(code.l() && !code.db())) return raise_gp(f, selector_error(selector));
    return true;
}

bool call_inner(VcpuFrame& f, const Descriptor& gate, u16 selector, Descriptor& code) {
    const u8 cpl = code.dpl();
    const bool wide = gate.type() == kCallGate;
    if (!code.present()) return raise(f, kNp, selector_error(selector));
    if (long_active(f)) {
        u64 rsp;
        if (!inner_stack64(f, cpl, 0, 0, rsp)) return false;
        if (!is_canonical(f, rsp)) return raise(f, kSsFault, 0);
        Segment ss = null_segment(cpl, cpl);
        StackFrame stack(f, ss, rsp, true, cpl, 0);
        if (!check_target(f, code, gate.gate_offset64())) return false;
        if (!stack.push(f.seg[kSs].selector, 8) || !stack.push(f.gpr[kRsp], 8) ||
            !stack.push(f.seg[kCs].selector, 8) || !stack.push(f.rip, 8) ||
            !mark_accessed(f, selector, code)) {
            return false;
        }
        f.seg[kSs] = ss;
        f.gpr[kRsp] = stack.sp();
        finish_code(f, selector, cpl, code, gate.gate_offset64());
        return true;
    }

    u16 ss_selector;
    u32 esp;
    if (!inner_stack(f, cpl, 0, ss_selector, esp)) return false;
    Segment ss;
    if (!check_stack_segment(f, ss_selector, cpl, kTs, 0, ss)) return false;
    const u32 size = wide ? 4 : 2;
    const u64 ip = wide ? gate.gate_offset() : gate.gate_offset() & 0xffff;
    if (!check_target(f, code, ip)) return false;
    u64 parameters[32];
    const unsigned count = gate.gate_parameters();
    StackFrame outer(f);
    for (unsigned n = 0; n < count; ++n) {
        if (!outer.pop(parameters[n], size)) return false;
    }
    StackFrame stack(f, ss, esp, false, cpl, selector_error(ss_selector));
    bool ok = stack.push(f.seg[kSs].selector, size) && stack.push(f.gpr[kRsp], size);
    for (unsigned n = count; ok && n-- > 0;) ok = stack.push(parameters[n], size);
    ok = ok && stack.push(f.seg[kCs].selector, size) && stack.push(f.rip, size) &&
         mark_accessed(f, selector, code);
    if (!ok) return false;
    f.seg[kSs] = ss;
    set_stack_pointer(f, stack.sp());
    finish_code(f, selector, cpl, code, ip);
    return true;
}

bool through_call_gate(VcpuFrame& f, u16 gate_selector, Descriptor& gate, bool call) {
    if (gate.dpl() < f.cpl || gate.dpl() < (gate_selector & 3)) {
        return raise_gp(f, selector_error(gate_selector));
    }
    if (!gate.present()) return raise(f, kNp, selector_error(gate_selector));
    if (long_active(f)) {
        if (!fetch_upper(f, gate_selector, gate)) return false;
        if (bits(gate.upper, 44, 40)) return raise_gp(f, selector_error(gate_selector));
    }
    u16 selector;
    Descriptor code;
    if (!fetch_gate_target(f, gate, selector, code)) return false;
    if (call && code.code() && !code.conforming() && code.dpl() < f.cpl) {
        return call_inner(f, gate, selector, code);
    }
    if (!check_code_segment(f, selector, code, 0)) return false;
    u64 ip = gate.type() == kCallGate16 ? gate.gate_offset() & 0xffff
             : long_active(f)           ? gate.gate_offset64()
                                        : gate.gate_offset();
    if (!check_target(f, code, ip)) return false;
    if (call) {
        u32 size = gate.type() == kCallGate16 ? 2 : long_active(f) ? 8 : 4;
        StackFrame stack(f);
        if (!stack.push(f.seg[kCs].selector, size) || !stack.push(f.rip, size)) return false;
        if (!mark_accessed(f, selector, code)) return false;
        stack.commit();
    } else if (!mark_accessed(f, selector, code)) {
        return false;
    }
    finish_code(f, selector, f.cpl, code, ip);
    return true;
}

bool far_to_system(VcpuFrame& f, u16 selector, Descriptor& d, bool call) {
    if (d.type() == kCallGate || (d.type() == kCallGate16 && !long_active(f))) {
        return through_call_gate(f, selector, d, call);
    }
    bool task =
        !long_active(f) && (d.type() == kTaskGate || d.type() == kTss || d.type() == kTss16);
    if (!task || d.dpl() < f.cpl || d.dpl() < (selector & 3)) {
        return raise_gp(f, selector_error(selector));
    }
    TaskSwitch kind = call ? TaskSwitch::kCall : TaskSwitch::kJump;
    if (d.type() == kTaskGate) {
        if (!d.present()) return raise(f, kNp, selector_error(selector));
        u16 tss_selector = d.gate_selector();
        Descriptor tss;
        return fetch_tss(f, tss_selector, tss) && task_switch(f, tss_selector, tss, kind);
    }
    if (selector & 4) return raise_gp(f, selector_error(selector));
    if (!d.present()) return raise(f, kNp, selector_error(selector));
    return task_switch(f, selector, d, kind);
}

bool far_real(VcpuFrame& f, u16 selector, u64 offset, u32 size, bool call) {
    if (offset > f.seg[kCs].limit) return raise_gp(f);
    if (call) {
        StackFrame stack(f);
        if (!stack.push(f.seg[kCs].selector, size) || !stack.push(f.rip, size)) return false;
        stack.commit();
    }
    load_real_segment(f, kCs, selector);
    f.rip = offset;
    update_mode(f);
    return true;
}

bool far_transfer(VcpuFrame& f, u16 selector, u64 offset, u32 size, bool call) {
    offset = truncate(offset, size);
    if (!f.protected_mode()) return far_real(f, selector, offset, size, call);
    if (null_selector(selector)) return raise_gp(f);
    Descriptor d;
    if (!fetch_descriptor(f, selector, d)) return false;
    if (!d.s()) return far_to_system(f, selector, d, call);
    if (!check_code_segment(f, selector, d, selector & 3)) return false;
    if (!check_target(f, d, offset)) return false;
    StackFrame stack(f);
    if (call && (!stack.push(f.seg[kCs].selector, size) || !stack.push(f.rip, size))) return false;
    if (!mark_accessed(f, selector, d)) return false;
    if (call) stack.commit();
    finish_code(f, selector, f.cpl, d, offset);
    return true;
}

template <bool call>
bool far_immediate(VcpuFrame& f, const Insn& i, u64) {
    return far_transfer(f, static_cast<u16>(i.imm2), i.imm, i.opsize, call);
}

template <bool call>
bool far_memory(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 bytes[10];
    if (!load_bytes(f, i, ea, bytes, i.opsize + 2)) return false;
    u64 offset = 0;
    u16 selector;
    std::memcpy(&offset, bytes, i.opsize);
    std::memcpy(&selector, bytes + i.opsize, 2);
    return far_transfer(f, selector, offset, i.opsize, call);
}

// --- RET -----------------------------------------------------------------------------------------

/// The code segment that a far return or IRET names; `rpl` becomes the CPL.
bool check_return_segment(VcpuFrame& f, u16 selector, Descriptor& d) {
    if (null_selector(selector)) return raise_gp(f);
    if (!fetch_descriptor(f, selector, d)) return false;
    const u8 rpl = selector & 3;
    bool good = rpl >= f.cpl && d.code() && (d.conforming() ? d.dpl() <= rpl : d.dpl() == rpl) &&
                !(long_active(f) && d.l() && d.db());
    if (!good) return raise_gp(f, selector_error(selector));
    if (!d.present()) return raise(f, kNp, selector_error(selector));
    return true;
}

/// The stack segment of a return to `cpl`; in 64-bit code below ring 3 it may be null.
bool check_return_stack(VcpuFrame& f, u16 selector, u8 cpl, const Descriptor& code, Segment& ss) {
    if (null_selector(selector) && long_active(f) && code.l() && cpl != 3) {
        if ((selector & 3) != cpl) return raise_gp(f);
        ss = null_segment(selector, cpl);
        return true;
    }
    return check_stack_segment(f, selector, cpl, kGp, 0, ss);
}

bool far_return(VcpuFrame& f, u32 size, u16 skip) {
    StackFrame stack(f);
    u64 ip, cs;
    if (!stack.pop(ip, size) || !stack.pop(cs, size)) return false;
    u16 selector = static_cast<u16>(cs);
    if (!f.protected_mode()) {
        if (ip > f.seg[kCs].limit) return raise_gp(f);
        stack.skip(skip);
        stack.commit();
        load_real_segment(f, kCs, selector);
        f.rip = ip;
        update_mode(f);
        return true;
    }
    Descriptor d;
    if (!check_return_segment(f, selector, d)) return false;
    const u8 rpl = selector & 3;
    stack.skip(skip);
    if (rpl == f.cpl) {
        if (!check_target(f, d, ip) || !mark_accessed(f, selector, d)) return false;
        stack.commit();
        finish_code(f, selector, rpl, d, ip);
        return true;
    }
    u64 sp, ss_value;
    if (!stack.pop(sp, size) || !stack.pop(ss_value, size)) return false;
    Segment ss;
    if (!check_return_stack(f, static_cast<u16>(ss_value), rpl, d, ss)) return false;
    if (!check_target(f, d, ip) || !mark_accessed(f, selector, d)) return false;
    enter_code(f, selector, rpl, d, ip);
    f.seg[kSs] = ss;
    set_stack_pointer(f, sp + skip);
    drop_privileged_segments(f);
    update_mode(f);
    return true;
}

bool retf(VcpuFrame& f, const Insn& i, u64) {
    return far_return(f, i.opsize, 0);
}
bool retf_iw(VcpuFrame& f, const Insn& i, u64) {
    return far_return(f, i.opsize, static_cast<u16>(i.imm));
}

// --- IRET ----------------------------------------------------------------------------------------

constexpr u64 kVmeFlags = kFlagVif | kFlagVip;

/// RFLAGS as IRET at this CPL and IOPL may change them.
u64 returned_flags(const VcpuFrame& f, u64 value, u32 size) {
    u64 mask = kFlagStatus | kFlagT | kFlagD | kFlagNt;
    if (size > 2) mask |= kFlagRf | kFlagAc | kFlagId;
    if (f.cpl <= iopl(f)) mask |= kFlagI;
    if (f.cpl == 0) mask |= kFlagIopl | (size > 2 ? kVmeFlags : 0);
    return (f.rflags() & ~mask) | (value & mask);
}

bool iret_real(VcpuFrame& f, u32 size) {
    StackFrame stack(f);
    u64 ip, cs, flags;
    if (!stack.pop(ip, size) || !stack.pop(cs, size) || !stack.pop(flags, size)) return false;
    if (ip > f.seg[kCs].limit) return raise_gp(f);
    u64 mask = kFlagStatus | kFlagT | kFlagI | kFlagD | kFlagNt | kFlagIopl;
    if (size > 2) mask |= kFlagRf | kFlagAc | kFlagId;
    flags = (f.rflags() & ~mask) | (flags & mask);
    stack.commit();
    load_real_segment(f, kCs, static_cast<u16>(cs));
    f.rip = ip;
    f.set_rflags(flags);
    update_mode(f);
    return true;
}

// SDM 3B, 20.2.7 and 20.3: an 8086 program's IRET needs IOPL 3, or VME and 16 bits.
bool iret_vm86(VcpuFrame& f, u32 size) {
    bool virtual_flag = false;
    if (iopl(f) < 3) {
        virtual_flag = (f.cr4 & 1) && size == 2;
        if (!virtual_flag) return raise_gp(f);
    }
    StackFrame stack(f);
    u64 ip, cs, flags;
    if (!stack.pop(ip, size) || !stack.pop(cs, size) || !stack.pop(flags, size)) return false;
    if (ip > f.seg[kCs].limit) return raise_gp(f);
    u64 mask = kFlagStatus | kFlagT | kFlagD | kFlagNt;
    if (size > 2) mask |= kFlagRf | kFlagAc | kFlagId;
    if (virtual_flag) {
        bool wants_if = flags & kFlagI;
        if ((flags & kFlagT) || (wants_if && (f.rflags_rest & kFlagVip))) return raise_gp(f);
        mask |= kFlagVif;
        flags = wants_if ? flags | kFlagVif : flags & ~u64{kFlagVif};
    } else {
        mask |= kFlagI;
    }
    flags = (f.rflags() & ~mask) | (flags & mask);
    stack.commit();
    load_real_segment(f, kCs, static_cast<u16>(cs));
    f.rip = ip;
    f.set_rflags(flags);
    update_mode(f);
    return true;
}

/// From ring 0 into a virtual-8086 task: nine doublewords on the stack.
bool iret_to_vm86(VcpuFrame& f, StackFrame& stack, u64 ip, u64 cs, u64 flags) {
    u64 value[6];  // ESP, SS, ES, DS, FS, GS
    for (u64& v : value) {
        if (!stack.pop(v, 4)) return false;
    }
    if ((ip & 0xffffffff) > 0xffff) return raise_gp(f);
    u64 keep = f.rflags() & ~u64{0x3f7fd7};
    f.set_rflags(keep | (flags & 0x3f7fd7));
    f.mode |= kModeVm86;  // so that segments load as that mode's
    f.cpl = 3;
    load_real_segment(f, kCs, static_cast<u16>(cs));
    load_real_segment(f, kSs, static_cast<u16>(value[1]));
    load_real_segment(f, kEs, static_cast<u16>(value[2]));
    load_real_segment(f, kDs, static_cast<u16>(value[3]));
    load_real_segment(f, kFs, static_cast<u16>(value[4]));
    load_real_segment(f, kGs, static_cast<u16>(value[5]));
    f.rip = ip & 0xffff;
    f.gpr[kRsp] = static_cast<u32>(value[0]);
    update_mode(f);
    return true;
}

bool return_from_task(VcpuFrame& f) {
    u16 selector;
    if (!read_system(f, f.tr.base, selector)) return false;
    if (null_selector(selector) || (selector & 4)) {
        return raise(f, kTs, selector_error(selector));
    }
    Descriptor tss;
    if (!fetch_descriptor(f, selector, tss, kTs)) return false;
    if (tss.s() || (tss.type() != kTssBusy && tss.type() != kTss16Busy)) {
        return raise(f, kTs, selector_error(selector));
    }
    if (!tss.present()) return raise(f, kNp, selector_error(selector));
    return task_switch(f, selector, tss, TaskSwitch::kReturn);
}

bool iret_protected(VcpuFrame& f, u32 size) {
    if (f.rflags_rest & kFlagNt) {
        return long_active(f) ? raise_gp(f) : return_from_task(f);
    }
    StackFrame stack(f);
    u64 ip, cs, flags;
    if (!stack.pop(ip, size) || !stack.pop(cs, size) || !stack.pop(flags, size)) return false;
    u16 selector = static_cast<u16>(cs);
    if (!long_active(f) && size == 4 && (flags & kFlagVm) && f.cpl == 0) {
        return iret_to_vm86(f, stack, ip, cs, flags);
    }
    Descriptor d;
    if (!check_return_segment(f, selector, d)) return false;
    const u8 rpl = selector & 3;
    const u64 new_flags = returned_flags(f, flags, size);
    if (rpl == f.cpl && !f.long64()) {
        if (!check_target(f, d, ip) || !mark_accessed(f, selector, d)) return false;
        stack.commit();
        enter_code(f, selector, rpl, d, ip);
    } else {
        u64 sp, ss_value;
        if (!stack.pop(sp, size) || !stack.pop(ss_value, size)) return false;
        Segment ss;
        if (!check_return_stack(f, static_cast<u16>(ss_value), rpl, d, ss)) return false;
        if (!check_target(f, d, ip) || !mark_accessed(f, selector, d)) return false;
        bool outer = rpl != f.cpl;
        enter_code(f, selector, rpl, d, ip);
        f.seg[kSs] = ss;
        set_stack_pointer(f, sp);
        if (outer) drop_privileged_segments(f);
    }
    f.set_rflags(new_flags);
    update_mode(f);
    return true;
}

bool iret(VcpuFrame& f, const Insn& i, u64) {
    f.nmi_blocked = false;  // even when the IRET itself faults (SDM 3A, 6.7.1)
    if (PV_LIKELY(f.protected_mode())) return iret_protected(f, i.opsize);
    return f.vm86() ? iret_vm86(f, i.opsize) : iret_real(f, i.opsize);
}

// --- Software interrupts -------------------------------------------------------------------------

bool software_interrupt(VcpuFrame& f, u8 vector, EventType type) {
    if (!enter_handler(f, vector, type, nullptr, false)) return false;
    f.no_step_trap = true;  // TF went with the flags that were pushed
    return true;
}

bool int_ib(VcpuFrame& f, const Insn& i, u64) {
    return software_interrupt(f, static_cast<u8>(i.imm), EventType::kSoftware);
}
bool int3(VcpuFrame& f, const Insn&, u64) {
    if (PV_UNLIKELY(f.host_int3 == VcpuFrame::Int3::kExit)) return f.vcpu->exit_int3();
    if (PV_UNLIKELY(f.host_int3 == VcpuFrame::Int3::kRaiseOnce)) {
        f.host_int3 = VcpuFrame::Int3::kExit;
    }
    return software_interrupt(f, kBp, EventType::kSoftwareException);
}
bool int1(VcpuFrame& f, const Insn&, u64) {
    return software_interrupt(f, kDb, EventType::kException);
}
bool into(VcpuFrame& f, const Insn&, u64) {
    if (!(f.oszapc & 1)) return true;
    return software_interrupt(f, kOf, EventType::kSoftwareException);
}

// --- Fast system calls ---------------------------------------------------------------------------

constexpr u32 kFlatCode64 = 0xa09b, kFlatCode32 = 0xc09b, kFlatData = 0xc093, kDpl3 = 3 << 5;

void set_flat(VcpuFrame& f, u8 seg, u16 selector, u32 attributes) {
    f.seg[seg] = {0, 0xffffffff, attributes, selector};
}

bool syscall(VcpuFrame& f, const Insn&, u64) {
    const bool intel = environment(f).cpuid.intel;
    if (!(f.msr.efer & 1) || !f.protected_mode()) return raise_ud(f);
    if (intel && !f.long64()) return raise_ud(f);
    const u16 selector = static_cast<u16>(f.msr.star >> 32) & 0xfffc;
    u64 flags = f.rflags() & ~u64{kFlagRf};
    if (long_active(f)) {
        f.gpr[kRcx] = f.rip;
        f.gpr[11] = flags;
        f.rip = f.long64() ? f.msr.lstar : f.msr.cstar;
        flags &= ~f.msr.sfmask;
        set_flat(f, kCs, selector, kFlatCode64);
    } else {
        f.gpr[kRcx] = static_cast<u32>(f.rip);
        f.rip = static_cast<u32>(f.msr.star);
        flags &= ~u64{kFlagVm | kFlagI};
        set_flat(f, kCs, selector, kFlatCode32);
    }
    set_flat(f, kSs, static_cast<u16>(selector + 8), kFlatData);
    f.cpl = 0;
    f.set_rflags(flags);
    f.no_step_trap = !(flags & kFlagT);  // the trap is for the handler only if it runs with TF
    update_mode(f);
    return true;
}

bool sysret(VcpuFrame& f, const Insn& i, u64) {
    const bool intel = environment(f).cpuid.intel;
    if (!(f.msr.efer & 1) || !f.protected_mode()) return raise_ud(f);
    if (intel && !f.long64()) return raise_ud(f);
    if (f.cpl != 0) return raise_gp(f);
    const u16 selector = static_cast<u16>(f.msr.star >> 48);
    if (long_active(f)) {
        const bool to64 = f.long64() && i.opsize == 8;
        // A non-canonical target faults here on Intel, and at CPL 3 on AMD.
        if (to64 && intel && !is_canonical(f, f.gpr[kRcx])) return raise_gp(f);
        f.rip = to64 ? f.gpr[kRcx] : static_cast<u32>(f.gpr[kRcx]);
        f.set_rflags(f.gpr[11] & 0x3c7fd7);
        set_flat(f, kCs, static_cast<u16>((selector + (to64 ? 16 : 0)) | 3),
                 (to64 ? kFlatCode64 : kFlatCode32) | kDpl3);
    } else {
        f.rip = static_cast<u32>(f.gpr[kRcx]);
        f.rflags_rest |= kFlagI;
        set_flat(f, kCs, selector | 3, kFlatCode32 | kDpl3);
    }
    set_flat(f, kSs, static_cast<u16>((selector + 8) | 3), kFlatData | kDpl3);
    f.cpl = 3;
    update_mode(f);
    return true;
}

bool sysenter(VcpuFrame& f, const Insn&, u64) {
    if (!environment(f).cpuid.intel && long_active(f)) return raise_ud(f);
    const u16 selector = static_cast<u16>(f.msr.sysenter_cs) & 0xfffc;
    if (!(f.cr0 & 1) || selector == 0) return raise_gp(f);
    const bool wide = long_active(f);
    f.rflags_rest &= ~u64{kFlagVm | kFlagI | kFlagRf};
    set_flat(f, kCs, selector, wide ? kFlatCode64 : kFlatCode32);
    set_flat(f, kSs, static_cast<u16>(selector + 8), kFlatData);
    f.cpl = 0;
    f.gpr[kRsp] = wide ? f.msr.sysenter_esp : static_cast<u32>(f.msr.sysenter_esp);
    f.rip = wide ? f.msr.sysenter_eip : static_cast<u32>(f.msr.sysenter_eip);
    update_mode(f);
    return true;
}

bool sysexit(VcpuFrame& f, const Insn& i, u64) {
    if (!environment(f).cpuid.intel && long_active(f)) return raise_ud(f);
    const u16 selector = static_cast<u16>(f.msr.sysenter_cs) & 0xfffc;
    if (!f.protected_mode() || f.cpl != 0 || selector == 0) return raise_gp(f);
    const bool to64 = f.long64() && i.opsize == 8;
    if (to64 && (!is_canonical(f, f.gpr[kRdx]) || !is_canonical(f, f.gpr[kRcx]))) {
        return raise_gp(f);
    }
    f.rip = to64 ? f.gpr[kRdx] : static_cast<u32>(f.gpr[kRdx]);
    f.gpr[kRsp] = to64 ? f.gpr[kRcx] : static_cast<u32>(f.gpr[kRcx]);
    set_flat(f, kCs, static_cast<u16>((selector + (to64 ? 32 : 16)) | 3),
             (to64 ? kFlatCode64 : kFlatCode32) | kDpl3);
    set_flat(f, kSs, static_cast<u16>((selector + (to64 ? 40 : 24)) | 3), kFlatData | kDpl3);
    f.cpl = 3;
    update_mode(f);
    return true;
}

bool rsm(VcpuFrame& f, const Insn&, u64) {
    return raise_ud(f);
}  // never in SMM

const OpBinding kFarOps[] = {
    bind<Op::JMPF_Ap, far_immediate<false>>(),
    bind<Op::CALLF_Ap, far_immediate<true>>(),
    bind<Op::JMPF_Mp, far_memory<false>>(),
    bind<Op::CALLF_Mp, far_memory<true>>(),
    bind<Op::RETF, retf>(),
    bind<Op::RETF_Iw, retf_iw>(),
    bind<Op::IRET, iret>(),
    bind<Op::INT_Ib, int_ib>(),
    bind<Op::INT3, int3>(),
    bind<Op::INT1, int1>(),
    bind<Op::INTO, into>(),
    bind<Op::SYSCALL, syscall>(),
    bind<Op::SYSRET, sysret>(),
    bind<Op::SYSENTER, sysenter>(),
    bind<Op::SYSEXIT, sysexit>(),
    bind<Op::RSM, rsm>(),
};

}  // namespace

std::span<const OpBinding> far_ops() {
    return kFarOps;
}

}  // namespace polyvisor::soft
