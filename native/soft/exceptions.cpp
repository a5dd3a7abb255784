// Entering interrupt and exception handlers: real mode's vector table, protected mode's gates,
// virtual-8086 mode with and without VME, IA-32e mode with IST; double and triple faults
// (SDM 3A, chapter 6).
#include <utility>

#include "soft/descriptors.hpp"

namespace polyvisor::soft {
namespace {

constexpr u32 kIdtBit = 2;

/// The EXT bit of error codes that delivering this event gives.
u32 ext_of(EventType type) {
    return type == EventType::kSoftware || type == EventType::kSoftwareException ? 0 : 1;
}

/// INT n, INT3 and INTO need the gate's DPL; other events do not.
bool checks_dpl(EventType type) {
    return ext_of(type) == 0;
}

bool is_interrupt_gate(u8 type) {
    return type == kIntGate || type == kIntGate16;
}

// --- Real mode, and VME's redirection ------------------------------------------------------------

/// Through an interrupt vector table at linear address `table`. `pushed` is the flags image.
bool enter_vector(VcpuFrame& f, u64 table, u8 vector, u64 pushed) {
    u32 entry;
    if (!read_system(f, table + vector * 4u, entry)) return false;
    u16 ip = static_cast<u16>(entry), cs = static_cast<u16>(entry >> 16);
    StackFrame stack(f);
    if (!stack.push(pushed, 2) || !stack.push(f.seg[kCs].selector, 2) || !stack.push(f.rip, 2)) {
        return false;
    }
    if (ip > f.seg[kCs].limit) return raise_gp(f);
    stack.commit();
    load_real_segment(f, kCs, cs);
    f.rip = ip;
    return true;
}

bool enter_real(VcpuFrame& f, u8 vector) {
    if (vector * 4u + 3 > f.idtr.limit) return raise_gp(f, vector * 8u + kIdtBit);
    if (!enter_vector(f, f.idtr.base, vector, f.rflags())) return false;
    f.rflags_rest &= ~u64{kFlagI | kFlagT | kFlagRf | kFlagAc};
    update_mode(f);
    return true;
}

/// INT n of an 8086 program that VME sends to the program's own handler (SDM 3B, 20.3.3.4).
bool enter_redirected(VcpuFrame& f, u8 vector) {
    u64 pushed = f.rflags();
    const bool virtual_if = iopl(f) < 3;
    if (virtual_if) {
        pushed |= kFlagIopl;
        pushed = pushed & kFlagVif ? pushed | kFlagI : pushed & ~u64{kFlagI};
    }
    if (!enter_vector(f, 0, vector, pushed)) return false;
    f.rflags_rest &= ~u64{kFlagT | kFlagRf};
    f.rflags_rest &= ~u64{virtual_if ? kFlagVif : kFlagI};
    update_mode(f);
    return true;
}

// --- Protected mode ------------------------------------------------------------------------------

struct HandlerFrame {
    u64 flags;
    const u32* error;
    u32 ext;
};

/// Handler code's segment: present code of no lower privilege.
bool check_handler(VcpuFrame& f, u16 selector, Descriptor& d, u32 ext) {
    if (null_selector(selector)) return raise_gp(f, ext);
    if (!fetch_descriptor(f, selector, d, kGp, ext)) return false;
    bool good = d.code() && d.dpl() <= f.cpl;
    if (long_active(f)) good = good && d.l() && !d.db();
    if (!good) return raise_gp(f, selector_error(selector, ext));
    if (!d.present()) return raise(f, kNp, selector_error(selector, ext));
    return true;
}

void clear_entry_flags(VcpuFrame& f, bool interrupt_gate) {
    f.rflags_rest &= ~u64{kFlagT | kFlagNt | kFlagRf | kFlagVm};
    if (interrupt_gate) f.rflags_rest &= ~u64{kFlagI};
}

bool push_error(StackFrame& stack, const u32* error, u32 size) {
    return error == nullptr || stack.push(*error, size);
}

bool enter_same_level(VcpuFrame& f, const Descriptor& gate, u16 selector, Descriptor& code,
                      const HandlerFrame& h, u64 ip, u32 size) {
    StackFrame stack(f, f.seg[kSs], f.gpr[kRsp], false, f.cpl, h.ext);
    if (!check_target(f, code, ip, h.ext)) return false;
    if (!stack.push(h.flags, size) || !stack.push(f.seg[kCs].selector, size) ||
        !stack.push(f.rip, size) || !push_error(stack, h.error, size) ||
        !mark_accessed(f, selector, code)) {
        return false;
    }
    stack.commit();
    enter_code(f, selector, f.cpl, code, ip);
    clear_entry_flags(f, is_interrupt_gate(gate.type()));
    update_mode(f);
    return true;
}

bool enter_inner_level(VcpuFrame& f, const Descriptor& gate, u16 selector, Descriptor& code,
                       const HandlerFrame& h, u64 ip, u32 size) {
    const u8 cpl = code.dpl();
    const bool vm86 = f.vm86();
    if (vm86 && cpl != 0) return raise_gp(f, selector_error(selector, h.ext));
    u16 ss_selector;
    u32 esp;
    if (!inner_stack(f, cpl, h.ext, ss_selector, esp)) return false;
    Segment ss;
    if (!check_stack_segment(f, ss_selector, cpl, kTs, h.ext, ss)) return false;
    if (!check_target(f, code, ip, h.ext)) return false;
    StackFrame stack(f, ss, esp, false, cpl, selector_error(ss_selector, h.ext));
    bool ok = true;
    if (vm86) {
        for (u8 seg : {kGs, kFs, kDs, kEs}) ok = ok && stack.push(f.seg[seg].selector, size);
    }
    ok = ok && stack.push(f.seg[kSs].selector, size) && stack.push(f.gpr[kRsp], size) &&
         stack.push(h.flags, size) && stack.push(f.seg[kCs].selector, size) &&
         stack.push(f.rip, size) && push_error(stack, h.error, size) &&
         mark_accessed(f, selector, code);
    if (!ok) return false;
    f.seg[kSs] = ss;
    stack.commit();
    enter_code(f, selector, cpl, code, ip);
    if (vm86) {
        for (u8 seg : {kGs, kFs, kDs, kEs}) f.seg[seg] = null_segment(0);
    }
    clear_entry_flags(f, is_interrupt_gate(gate.type()));
    update_mode(f);
    return true;
}

bool enter_protected(VcpuFrame& f, u8 vector, EventType type, HandlerFrame h) {
    const u32 idt_error = vector * 8u + kIdtBit + h.ext;
    if (vector * 8u + 7 > f.idtr.limit) return raise_gp(f, idt_error);
    Descriptor gate;
    if (!read_system(f, f.idtr.base + vector * 8u, gate.raw)) return false;
    bool known = !gate.s() && (gate.type() == kTaskGate || gate.type() == kIntGate16 ||
                               gate.type() == kTrapGate16 || gate.type() == kIntGate ||
                               gate.type() == kTrapGate);
    if (!known || (checks_dpl(type) && gate.dpl() < f.cpl)) return raise_gp(f, idt_error);
    if (!gate.present()) return raise(f, kNp, idt_error);

    const u16 selector = gate.gate_selector();
    if (gate.type() == kTaskGate) {
        Descriptor tss;
        if (!fetch_tss(f, selector, tss, h.ext)) return false;
        // The outgoing task's image gets the flags that a handler's frame would.
        if (h.flags & kFlagRf) f.rflags_rest |= kFlagRf;
        return task_switch(f, selector, tss, TaskSwitch::kEvent, h.ext, h.error);
    }
    Descriptor code;
    if (!check_handler(f, selector, code, h.ext)) return false;
    const bool wide = gate.type() >= kIntGate;
    const u32 size = wide ? 4 : 2;
    const u64 ip = wide ? gate.gate_offset() : gate.gate_offset() & 0xffff;
    if (!code.conforming() && code.dpl() < f.cpl) {
        return enter_inner_level(f, gate, selector, code, h, ip, size);
    }
    // Same level: out of virtual-8086 mode there is only ring 0.
    if (f.vm86()) return raise_gp(f, selector_error(selector, h.ext));
    return enter_same_level(f, gate, selector, code, h, ip, size);
}

// --- IA-32e mode ---------------------------------------------------------------------------------

/// Stores `count` quadwords at `linear`, ascending, in one piece.
bool push_block(VcpuFrame& f, u64 linear, const u64* words, u32 bytes, u8 cpl) {
    Tlb& tlb = cpl == 3 ? f.tlb[kTlbUser] : supervisor_tlb(f);
    u64 n = (linear >> 12) & 255;
    if (PV_LIKELY(linear + tlb.neg_w[n] <= 4096 - bytes)) {
        std::memcpy(reinterpret_cast<u8*>(linear + tlb.addend[n]), words, bytes);
        return true;
    }
    return write_linear(f, linear, words, bytes,
                        cpl == 3 ? Privilege::kUser : Privilege::kSupervisor, kSs);
}

bool enter_long(VcpuFrame& f, u8 vector, EventType type, const HandlerFrame& h) {
    const u32 idt_error = vector * 8u + kIdtBit + h.ext;
    if (vector * 16u + 15 > f.idtr.limit) return raise_gp(f, idt_error);
    u64 words[2];
    if (!read_system(f, f.idtr.base + vector * 16u, words)) return false;
    const Descriptor gate{words[0], words[1]};
    bool known = !gate.s() && (gate.type() == kIntGate || gate.type() == kTrapGate) &&
                 !bits(gate.upper, 44, 40);
    if (!known || (checks_dpl(type) && gate.dpl() < f.cpl)) return raise_gp(f, idt_error);
    if (!gate.present()) return raise(f, kNp, idt_error);
    const u16 selector = gate.gate_selector();
    Descriptor code;
    if (!check_handler(f, selector, code, h.ext)) return false;
    if (!check_target(f, code, gate.gate_offset64(), h.ext)) return false;

    const u8 cpl = code.conforming() ? f.cpl : code.dpl();
    const bool inner = cpl < f.cpl;
    u64 rsp = f.gpr[kRsp];
    if (inner || gate.gate_ist()) {
        if (!inner_stack64(f, cpl, gate.gate_ist(), h.ext, rsp)) return false;
    }
    if (!is_canonical(f, rsp)) return raise(f, kSsFault, h.ext);
    rsp &= ~u64{15};

    u64 frame[6];
    u32 n = 0;
    if (h.error) frame[n++] = *h.error;
    frame[n++] = f.rip;
    frame[n++] = f.seg[kCs].selector;
    frame[n++] = h.flags;
    frame[n++] = f.gpr[kRsp];
    frame[n++] = f.seg[kSs].selector;
    rsp -= n * 8;
    if (!push_block(f, rsp, frame, n * 8, cpl) || !mark_accessed(f, selector, code)) return false;

    if (inner) f.seg[kSs] = null_segment(cpl, cpl);
    f.gpr[kRsp] = rsp;
    enter_code(f, selector, cpl, code, gate.gate_offset64());
    clear_entry_flags(f, is_interrupt_gate(gate.type()));
    update_mode(f);
    return true;
}

}  // namespace

bool enter_handler(VcpuFrame& f, u8 vector, EventType type, const u32* error, bool set_rf) {
    if (!(f.cr0 & 1)) return enter_real(f, vector);
    HandlerFrame h{f.rflags() | (set_rf ? u64{kFlagRf} : 0), error, ext_of(type)};
    if (PV_LIKELY(long_active(f))) return enter_long(f, vector, type, h);
    if (f.vm86() && type == EventType::kSoftware) {
        if (f.cr4 & 1) {
            bool redirects;
            if (!vme_redirects(f, vector, redirects)) return false;
            if (redirects) return enter_redirected(f, vector);
        }
        if (iopl(f) < 3) return raise_gp(f);
    }
    return enter_protected(f, vector, type, h);
}

namespace {

enum class Severity { kBenign, kContributory, kPageFault };

Severity severity(u8 vector) {
    switch (vector) {
        case kDe:
        case kTs:
        case kNp:
        case kSsFault:
        case kGp:
            return Severity::kContributory;
        case kPf:
            return Severity::kPageFault;
        default:
            return Severity::kBenign;
    }
}

/// What an exception changes whether or not its handler can be entered.
void note_exception(VcpuFrame& f, const Fault& fault) {
    if (fault.vector == kPf) f.cr2 = fault.cr2;
    if (fault.vector == kDb) {
        f.dr6 = (f.dr6 & ~u64{0xf}) | fault.dr6;
        if (fault.dr6 & bit(13)) f.dr6 |= bit(13);
        f.dr7 &= ~bit(13);  // general detect is off in the handler
    }
}

/// Delivers one event and whatever goes wrong on the way (SDM 3A, table 6-5).
bool deliver_all(VcpuFrame& f, Fault now, EventType type) {
    for (;;) {
        f.fault = {};
        const bool exception = type == EventType::kException;
        if (exception) note_exception(f, now);
        // Faults restart their instruction past its breakpoint; breakpoint faults themselves must
        // not hide that they came from one.
        const bool set_rf = exception && !now.trap && now.vector != kDb;
        const u32* error = now.has_error ? &now.error : nullptr;
        if (PV_LIKELY(enter_handler(f, now.vector, type, error, set_rf))) {
            f.fault = {};
            f.activity = Activity::kRunning;  // a trap after HLT ends it
            return true;
        }
        Fault next = f.fault;
        if (exception) {
            const Severity first = severity(now.vector), second = severity(next.vector);
            if (now.vector == kDf && second != Severity::kBenign) {
                f.fault = {};
                f.activity = Activity::kShutdown;
                return false;
            }
            bool doubled =
                (first == Severity::kContributory && second == Severity::kContributory) ||
                (first == Severity::kPageFault && second != Severity::kBenign);
            if (doubled) {
                if (next.vector == kPf) f.cr2 = next.cr2;
                next = Fault{.pending = Pending::kException, .vector = kDf, .has_error = true};
            }
        }
        now = next;
        type = EventType::kException;
    }
}

}  // namespace

bool deliver_fault(VcpuFrame& f) {
    return deliver_all(f, f.fault, EventType::kException);
}

bool deliver_event(VcpuFrame& f, u8 vector, EventType type) {
    Fault event{.pending = Pending::kException, .vector = vector, .trap = true};
    return deliver_all(f, event, type);
}

bool deliver_in_flight(VcpuFrame& f) {
    using Kind = InFlightEvent::Kind;
    const InFlightEvent event = std::exchange(f.event, {});
    f.shadow = f.shadow_ss = false;
    switch (event.kind) {
        case Kind::kNone:
            return true;
        case Kind::kInterrupt:
            return deliver_event(f, event.vector, EventType::kExternal);
        case Kind::kNmi:
            f.nmi_blocked = true;
            return deliver_event(f, kNmi, EventType::kNmi);
        case Kind::kException: {
            const bool fault = event.vector != kBp && event.vector != kOf && event.vector != kDf &&
                               event.vector != kMcFault;
            // CR2 and DR6 have been set already, and stay.
            f.fault = {.pending = Pending::kException,
                       .vector = event.vector,
                       .has_error = event.has_error_code,
                       .trap = !fault,
                       .error = event.error_code,
                       .cr2 = f.cr2,
                       .dr6 = f.dr6 & (0xf | bit(13) | bit(14) | bit(15))};
            return deliver_fault(f);
        }
        case Kind::kSoftwareInterrupt:
        case Kind::kSoftwareException:
            break;
    }
    // The handler returns behind the instruction; a fault on the way there is the instruction's.
    const u64 at = f.rip, next = at + event.length;
    const CodeSize size = f.code_size();
    f.rip = size == CodeSize::k64 ? next : next & (size == CodeSize::k32 ? 0xffffffff : 0xffff);
    f.fault = {};
    const EventType type = event.kind == Kind::kSoftwareInterrupt ? EventType::kSoftware
                                                                  : EventType::kSoftwareException;
    if (enter_handler(f, event.vector, type, nullptr, false)) {
        f.activity = Activity::kRunning;
        return true;
    }
    f.rip = at;
    return deliver_fault(f);
}

}  // namespace polyvisor::soft
