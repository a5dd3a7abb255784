#include "kvm/convert.hpp"

#include <algorithm>
#include <cstring>

namespace polyvisor::kvm {

namespace {

constexpr u64 kInterruptFlag = bit(9), kLma = bit(10);

kvm_segment to_kvm(const Segment& segment) {
    kvm_segment s{};
    s.base = segment.base;
    s.limit = segment.limit;
    s.selector = segment.selector;
    s.type = segment.type();
    s.s = segment.s();
    s.dpl = segment.dpl();
    // Both vendors' KVM keep one bit for the two: VMX has "unusable", SVM "present".
    s.present = segment.present() && !segment.unusable();
    s.unusable = segment.unusable();
    s.avl = (segment.attributes >> 12) & 1;
    s.l = segment.l();
    s.db = segment.db();
    s.g = segment.g();
    return s;
}

Segment from_kvm(const kvm_segment& s) {
    Segment segment;
    segment.base = s.base;
    segment.limit = s.limit;
    segment.selector = s.selector;
    segment.attributes = u32{s.type} | u32{s.s} << 4 | u32{s.dpl} << 5 |
                         u32{s.present && !s.unusable} << 7 | u32{s.avl} << 12 | u32{s.l} << 13 |
                         u32{s.db} << 14 | u32{s.g} << 15 | u32{s.unusable != 0} << 16;
    return segment;
}

void to_kvm(const DescriptorTable& table, kvm_dtable& t) {
    t.base = table.base;
    t.limit = table.limit;
}

}  // namespace

// --- Registers -----------------------------------------------------------------------------------

template <class Registers>
static void pack(const Registers& from, kvm_regs& regs) {
    const auto& r = from.gpr;
    regs.rax = r[kRax];
    regs.rbx = r[kRbx];
    regs.rcx = r[kRcx];
    regs.rdx = r[kRdx];
    regs.rsi = r[kRsi];
    regs.rdi = r[kRdi];
    regs.rsp = r[kRsp];
    regs.rbp = r[kRbp];
    regs.r8 = r[8];
    regs.r9 = r[9];
    regs.r10 = r[10];
    regs.r11 = r[11];
    regs.r12 = r[12];
    regs.r13 = r[13];
    regs.r14 = r[14];
    regs.r15 = r[15];
    regs.rip = from.rip;
    regs.rflags = from.rflags;
}

template <class Registers>
static void unpack(const kvm_regs& regs, Registers& to) {
    to.gpr = {regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
              regs.r8,  regs.r9,  regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15};
    to.rip = regs.rip;
    to.rflags = regs.rflags;
}

void to_kvm(const CpuState& state, kvm_regs& regs) {
    pack(state, regs);
}

void from_kvm(const kvm_regs& regs, CpuState& state) {
    unpack(regs, state);
}

void to_kvm(const GeneralRegisters& registers, kvm_regs& regs) {
    pack(registers, regs);
}

void from_kvm(const kvm_regs& regs, GeneralRegisters& registers) {
    unpack(regs, registers);
}

void to_kvm(const CpuState& state, kvm_sregs& sregs) {
    const auto& segments = state.segments;
    sregs.es = to_kvm(segments[kEs]);
    sregs.cs = to_kvm(segments[kCs]);
    sregs.ss = to_kvm(segments[kSs]);
    sregs.ds = to_kvm(segments[kDs]);
    sregs.fs = to_kvm(segments[kFs]);
    sregs.gs = to_kvm(segments[kGs]);
    sregs.tr = to_kvm(state.tr);
    sregs.ldt = to_kvm(state.ldtr);
    // A task register always holds a busy TSS: SVM shows it so, VMX insists on it.
    sregs.tr.type |= 2;
    // SVM takes the CPL from here.
    sregs.ss.dpl = privilege_level(state);
    // Outside IA-32e mode the bit means nothing, and KVM refuses it.
    if (!(state.msr.efer & kLma)) sregs.cs.l = 0;
    to_kvm(state.gdtr, sregs.gdt);
    to_kvm(state.idtr, sregs.idt);
    sregs.cr0 = state.cr0;
    sregs.cr2 = state.cr2;
    sregs.cr3 = state.cr3;
    sregs.cr4 = state.cr4;
    sregs.efer = state.msr.efer;
    // The interrupt in flight is one of kvm_vcpu_events.
    std::fill(std::begin(sregs.interrupt_bitmap), std::end(sregs.interrupt_bitmap), 0);
}

void from_kvm(const kvm_sregs& sregs, CpuState& state) {
    auto& segments = state.segments;
    segments[kEs] = from_kvm(sregs.es);
    segments[kCs] = from_kvm(sregs.cs);
    segments[kSs] = from_kvm(sregs.ss);
    segments[kDs] = from_kvm(sregs.ds);
    segments[kFs] = from_kvm(sregs.fs);
    segments[kGs] = from_kvm(sregs.gs);
    state.tr = from_kvm(sregs.tr);
    state.ldtr = from_kvm(sregs.ldt);
    state.gdtr = {sregs.gdt.base, sregs.gdt.limit};
    state.idtr = {sregs.idt.base, sregs.idt.limit};
    state.cr0 = sregs.cr0;
    state.cr2 = sregs.cr2;
    state.cr3 = sregs.cr3;
    state.cr4 = sregs.cr4;
    state.msr.efer = sregs.efer;
}

void to_kvm(const CpuState& state, kvm_xcrs& xcrs) {
    const bool host_has = xcrs.nr_xcrs != 0;
    xcrs = {};
    // Left to KVM's refusal where the host lacks it and the state needs it.
    xcrs.nr_xcrs = host_has || state.xcr0 != 1 ? 1 : 0;
    xcrs.xcrs[0].value = state.xcr0;
}

void from_kvm(const kvm_xcrs& xcrs, CpuState& state) {
    state.xcr0 = 1;
    for (u32 n = 0; n < std::min<u32>(xcrs.nr_xcrs, KVM_MAX_XCRS); ++n) {
        if (xcrs.xcrs[n].xcr == 0) state.xcr0 = xcrs.xcrs[n].value;
    }
}

void to_kvm(const CpuState& state, kvm_debugregs& debug) {
    debug = {};
    std::copy(state.dr.begin(), state.dr.end(), debug.db);
    debug.dr6 = state.dr6;
    debug.dr7 = state.dr7;
}

void from_kvm(const kvm_debugregs& debug, CpuState& state) {
    std::copy(std::begin(debug.db), std::end(debug.db), state.dr.begin());
    state.dr6 = debug.dr6;
    state.dr7 = debug.dr7;
}

// --- Events --------------------------------------------------------------------------------------

void to_kvm(const CpuState& state, kvm_vcpu_events& events) {
    using Kind = InFlightEvent::Kind;
    const InFlightEvent& event = state.event;
    events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    events.exception = {};
    events.interrupt = {};
    events.nmi.injected = event.kind == Kind::kNmi;
    events.nmi.pending = state.nmi_pending;
    events.nmi.masked = state.nmi_blocked;
    // VMX refuses a shadow of STI with interrupts off, and both kinds at once; SVM knows only one.
    if (state.interrupt_shadow) {
        events.interrupt.shadow =
            state.rflags & kInterruptFlag ? KVM_X86_SHADOW_INT_STI : KVM_X86_SHADOW_INT_MOV_SS;
    }
    switch (event.kind) {
        case Kind::kInterrupt:
            events.interrupt.injected = 1;
            events.interrupt.nr = event.vector;
            break;
        case Kind::kException:
            events.exception.injected = 1;
            events.exception.nr = event.vector;
            events.exception.has_error_code = event.has_error_code;
            events.exception.error_code = event.error_code;
            break;
        case Kind::kNone:
        case Kind::kNmi:
        // KVM has no place for the length of a software event's instruction, and tells none of
        // them; RIP is still there, and the instruction runs again.
        case Kind::kSoftwareInterrupt:
        case Kind::kSoftwareException:
            break;
    }
}

void from_kvm(const kvm_vcpu_events& events, CpuState& state) {
    using Kind = InFlightEvent::Kind;
    InFlightEvent& event = state.event;
    event = {};
    state.interrupt_shadow = events.interrupt.shadow != 0;
    state.nmi_pending = events.nmi.pending != 0;
    state.nmi_blocked = events.nmi.masked != 0;
    // An exception beside one of the others came up while that was being delivered, and will
    // again; an interrupt that was acknowledged, or an NMI, would be lost.
    if (events.interrupt.injected) {
        event.kind = Kind::kInterrupt;
        event.vector = events.interrupt.nr;
    } else if (events.nmi.injected) {
        event.kind = Kind::kNmi;
        event.vector = 2;
    } else if (events.exception.injected) {
        event.kind = Kind::kException;
        event.vector = events.exception.nr;
        event.has_error_code = events.exception.has_error_code != 0;
        event.error_code = event.has_error_code ? events.exception.error_code : 0;
    }
}

void to_kvm(const CpuState& state, kvm_mp_state& activity) {
    switch (state.activity) {
        case Activity::kHalted:
            activity.mp_state = KVM_MP_STATE_HALTED;
            return;
        case Activity::kWaitForSipi:
            activity.mp_state = KVM_MP_STATE_INIT_RECEIVED;
            return;
        case Activity::kRunning:
        case Activity::kShutdown:
            activity.mp_state = KVM_MP_STATE_RUNNABLE;
            return;
    }
}

void from_kvm(const kvm_mp_state& activity, CpuState& state) {
    switch (activity.mp_state) {
        case KVM_MP_STATE_HALTED:
        case KVM_MP_STATE_AP_RESET_HOLD:
            state.activity = Activity::kHalted;
            return;
        case KVM_MP_STATE_UNINITIALIZED:
        case KVM_MP_STATE_INIT_RECEIVED:
            state.activity = Activity::kWaitForSipi;
            return;
        default:
            state.activity = Activity::kRunning;
    }
}

// --- FPU -----------------------------------------------------------------------------------------

namespace {

// Offsets in the standard format (SDM 1, 10.5.1 and 13.4).
constexpr std::size_t kReservedAfterTags = 5, kMxcsrMask = 28, kSt0 = 32, kSoftware = 416;
constexpr std::size_t kXstateBv = 512, kHeaderEnd = 576, kYmmHigh = 576;
constexpr u64 kX87AndSse = 3, kAvx = 4;

}  // namespace

void to_kvm(const FpuState& fpu, bool avx, std::span<u8> xsave) {
    std::memcpy(xsave.data(), fpu.legacy.data(), fpu.legacy.size());
    // Components that the header does not list get their initial values.
    std::memset(xsave.data() + kXstateBv, 0, kHeaderEnd - kXstateBv);
    const u64 present = kX87AndSse | (avx ? kAvx : 0);
    std::memcpy(xsave.data() + kXstateBv, &present, sizeof present);
    if (avx) std::memcpy(xsave.data() + kYmmHigh, fpu.ymm_high.data(), sizeof fpu.ymm_high);
}

void from_kvm(std::span<const u8> xsave, FpuState& fpu) {
    std::memcpy(fpu.legacy.data(), xsave.data(), fpu.legacy.size());
    // What hardware leaves as it finds it, and what the kernel puts there for itself.
    u8* legacy = fpu.legacy.data();
    legacy[kReservedAfterTags] = 0;
    const u32 mxcsr_mask = 0xffff;
    std::memcpy(legacy + kMxcsrMask, &mxcsr_mask, sizeof mxcsr_mask);
    for (std::size_t n = 0; n < 8; ++n) std::memset(legacy + kSt0 + 16 * n + 10, 0, 6);
    std::memset(legacy + kSoftware, 0, fpu.legacy.size() - kSoftware);

    u64 present;
    std::memcpy(&present, xsave.data() + kXstateBv, sizeof present);
    fpu.ymm_high = {};
    if (present & kAvx) {
        std::memcpy(fpu.ymm_high.data(), xsave.data() + kYmmHigh, sizeof fpu.ymm_high);
    }
}

}  // namespace polyvisor::kvm
