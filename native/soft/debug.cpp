// Debugging in the soft engine, the guest's own (SDM 3B, 17.2 and 17.3) and the host's on top of
// it. Both make the run loop go by single instructions (kModeStep) and cost nothing otherwise; what
// the host set is out of the guest's sight.
#include "cpu/debug.hpp"

#include "soft/soft_tlb.hpp"
#include "soft/system.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

namespace {

u64 linear_ip(const VcpuFrame& f) {
    return f.long64() ? f.rip : static_cast<u32>(f.seg[kCs].base + f.rip);
}

u64 code_breakpoints(const u64 (&dr)[4], u64 dr7, u64 linear) {
    u64 hits = 0;
    for (unsigned n = 0; n < 4; ++n) {
        bool enabled = dr7 >> (2 * n) & 3;
        if (enabled && !(dr7 >> (16 + 4 * n) & 3) && dr[n] == linear) hits |= bit(n);
    }
    return hits;
}

Exit debug_exit(u64 linear, u32 dr6) {
    Exit exit;
    exit.reason = ExitReason::kDebug;
    exit.address = linear;
    exit.dr6 = dr6;
    return exit;
}

}  // namespace

void SoftVcpu::set_debug(const GuestDebug& debug) {
    validate(debug);
    frame.host_dr7 = 0;
    for (unsigned n = 0; n < debug.hardware.size(); ++n) {
        frame.host_dr[n] = debug.hardware[n].address;
        frame.host_dr7 |= dr7_bits(n, debug.hardware[n]);
    }
    frame.host_step = debug.single_step;
    if (frame.host_dr7 == 0) passing_ = ~u64{0};
    if (!debug.int3_exits) {
        frame.host_int3 = VcpuFrame::Int3::kRaise;
    } else if (frame.host_int3 == VcpuFrame::Int3::kRaise) {
        frame.host_int3 = VcpuFrame::Int3::kExit;
    }
    clear_tlbs(frame);  // pages with data breakpoints are kept out of it
    update_mode(frame);
}

bool SoftVcpu::exit_int3() {
    u64 ip = frame.block->ip + frame.uop->offset;  // frame.rip is behind it
    env.exit = debug_exit(frame.long64() ? ip : static_cast<u32>(frame.seg[kCs].base + ip), 0);
    frame.fault.pending = Pending::kExit;
    return false;
}

// While the host goes instruction by instruction, also just to get past a breakpoint.
bool SoftVcpu::holds_events() {
    if (passing_ != ~u64{0} && passing_ != linear_ip(frame)) passing_ = ~u64{0};
    return frame.host_step || passing_ != ~u64{0};
}

// What would end a HLT does so, though its handler has to wait.
void SoftVcpu::wake_without_event() {
    if (frame.activity != Activity::kHalted) return;
    bool nmi = frame.nmi_pending && !frame.nmi_blocked;
    bool interrupt = interrupt_waiting_ && (frame.rflags_rest & kFlagI) && env.lapic != nullptr &&
                     env.lapic->pending();
    if (nmi || interrupt) frame.activity = Activity::kRunning;
}

// A code breakpoint of the host. True: run() must return instead of executing the instruction.
bool SoftVcpu::host_breakpoint(u64 linear) {
    bool passed = std::exchange(passing_, ~u64{0}) == linear;
    if (frame.host_dr7 == 0 || frame.host_step || passed) return false;
    u64 hits = code_breakpoints(frame.host_dr, frame.host_dr7, linear);
    if (hits == 0) return false;
    passing_ = linear;
    env.exit = debug_exit(linear, static_cast<u32>(hits));
    frame.fault.pending = Pending::kExit;
    return true;
}

// The end of a step or a watchpoint of the host, once a fault of the instruction is delivered.
bool SoftVcpu::host_step_done(Exit& exit) {
    exit = debug_exit(linear_ip(frame), std::exchange(host_hits_, 0));
    return true;
}

// Code breakpoints. False: the instruction is not executed; fault.pending says what is instead.
bool SoftVcpu::before_step() {
    frame.no_step_trap = false;
    u64 linear = linear_ip(frame);
    if (host_breakpoint(linear)) return false;
    if (!(frame.dr7 & kDr7Enables)) return true;
    if (frame.rflags_rest & kFlagRf) {
        frame.rflags_rest &= ~u64{kFlagRf};
        return true;
    }
    u64 hits = code_breakpoints(frame.dr, frame.dr7, linear);
    if (hits == 0) return true;
    raise(frame, kDb);
    frame.fault.dr6 = hits;
    // For a host that steps, the way into the handler is the step.
    if (frame.host_step) host_hits_ |= kDr6Step;
    return false;
}

// Single step and data breakpoints: #DB as a trap, unless the instruction faulted or MOV SS holds
// it. The host's are not held.
void SoftVcpu::after_step(bool trap) {
    u64 hits = std::exchange(frame.debug_hits, 0);
    host_hits_ |= static_cast<u32>(hits >> 16) & kDr6Hits;
    hits &= kDr6Hits;
    bool int3 = frame.fault.pending == Pending::kExit && env.exit.reason == ExitReason::kDebug;
    if (frame.host_step && !int3) host_hits_ |= kDr6Step;
    if (std::exchange(frame.no_step_trap, false)) trap = false;
    // Between two elements of a repeated instruction there is a trap too, with RIP still at it.
    bool between = frame.fault.pending == Pending::kRestart;
    if ((frame.fault.pending != Pending::kNone && !between) || frame.shadow_ss) return;
    if (trap) hits |= kDr6Step;
    if (hits == 0) return;
    raise_trap(frame, kDb);
    frame.fault.dr6 = hits;
}

}  // namespace polyvisor::soft
