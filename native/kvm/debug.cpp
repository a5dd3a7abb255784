#include "kvm/debug.hpp"

#include "base/error.hpp"
#include "cpu/debug.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/system.hpp"
#include "kvm/vcpu.hpp"

#ifndef KVM_GUESTDBG_BLOCKIRQ  // kernels since 5.15
#define KVM_GUESTDBG_BLOCKIRQ 0x00100000
#endif

namespace polyvisor::kvm {

namespace {

using Kind = GuestDebug::Breakpoint::Kind;

constexpr u32 kDbVector = 1, kBpVector = 3;
constexpr u64 kTrapFlag = bit(8);

kvm_regs get_regs(const KvmVcpu& vcpu) {
    kvm_regs regs;
    call_ioctl(vcpu.fd(), KVM_GET_REGS, &regs);
    return regs;
}

u64 linear_rip(const KvmVcpu& vcpu, u64 rip) {
    kvm_sregs sregs;
    call_ioctl(vcpu.fd(), KVM_GET_SREGS, &sregs);
    bool long64 = (sregs.efer & bit(10)) && sregs.cs.l;
    return long64 ? rip : static_cast<u32>(sregs.cs.base + rip);
}

// The guest's byte at a linear address; nullptr where there is none.
u8* byte_at(const KvmVcpu& vcpu, u64 linear) {
    kvm_translation translation{};
    translation.linear_address = linear;
    if (try_ioctl(vcpu.fd(), KVM_TRANSLATE, &translation) < 0 || !translation.valid) return nullptr;
    std::span<u8> span = vcpu.vm().config().memory.span(Gpa(translation.physical_address), 1);
    return span.empty() ? nullptr : span.data();
}

}  // namespace

// Whether the instruction at step_rip_ is PUSHF, behind whatever prefixes.
bool VcpuDebug::at_pushf() const {
    for (u64 n = 0; n < 15; ++n) {
        const u8* byte = byte_at(vcpu_, step_rip_ + n);
        if (byte == nullptr) return false;
        if (*byte == 0x9c) return true;
        bool prefix = *byte == 0x66 || *byte == 0x67 || *byte == 0xf2 || *byte == 0xf3 ||
                      (*byte & 0xe7) == 0x26 || *byte == 0x64 || *byte == 0x65 ||
                      (*byte & 0xf0) == 0x40;
        if (!prefix) return false;
    }
    return false;
}

// KVM steps by TF, which a PUSHF stores: the guest must not find it there.
void VcpuDebug::hide_pushed_trap() const {
    kvm_sregs sregs;
    call_ioctl(vcpu_.fd(), KVM_GET_SREGS, &sregs);
    u64 stack = get_regs(vcpu_).rsp;
    bool long64 = (sregs.efer & bit(10)) && sregs.cs.l;
    if (!long64) stack = static_cast<u32>(sregs.ss.base + (sregs.ss.db ? stack : stack & 0xffff));
    if (u8* second = byte_at(vcpu_, stack + 1)) *second &= static_cast<u8>(~(kTrapFlag >> 8));
}

void VcpuDebug::set(const GuestDebug& wanted) {
    validate(wanted);
    if (wanted.int3_exits && !wanted_.int3_exits && !int3_can_exit(vcpu_.vm().system())) {
        throw StateMismatch(
            "KVM on this host gives INT3 to the guest even when asked to stop there, so it has no "
            "software breakpoints; take hardware breakpoints, or engine soft");
    }
    wanted_ = wanted;
    armed_ = false;
    active_ = true;  // until KVM was told, also of nothing
}

void VcpuDebug::apply(kvm_guest_debug& debug) {
    if (debug.control != 0) debug.control |= KVM_GUESTDBG_ENABLE;
    if (debug.control == 0 && !known_) return;
    call_ioctl(vcpu_.fd(), KVM_SET_GUEST_DEBUG, &debug);
    known_ = debug.control != 0;
}

void VcpuDebug::before_entry() {
    if (armed_) return;
    kvm_guest_debug debug{};
    stepping_ = wanted_.single_step;
    if (stepping_ || stopped_at_) {
        kvm_regs regs = get_regs(vcpu_);
        step_rip_ = linear_rip(vcpu_, regs.rip);
        guest_trap_ = regs.rflags & kTrapFlag;
        // On from a breakpoint: one instruction without it. (RF would do on a CPU, but not
        // everything that offers this interface honours it.)
        if (stopped_at_ == step_rip_) stepping_ = true;
        stopped_at_.reset();
        pushf_ = stepping_ && !guest_trap_ && at_pushf();
    }
    if (stepping_) {
        debug.control |= KVM_GUESTDBG_SINGLESTEP;
        int supported = vcpu_.vm().check(KVM_CAP_SET_GUEST_DEBUG2);
        if (supported > 0) debug.control |= supported & KVM_GUESTDBG_BLOCKIRQ;
    }
    u32 dr7 = kDr7AlwaysOne;
    for (unsigned n = 0; n < wanted_.hardware.size(); ++n) {
        const auto& breakpoint = wanted_.hardware[n];
        debug.arch.debugreg[n] = breakpoint.address;
        if (stepping_ && breakpoint.kind == Kind::kExecute) continue;
        dr7 |= dr7_bits(n, breakpoint);
    }
    if (dr7 & kDr7Enables) {
        debug.control |= KVM_GUESTDBG_USE_HW_BP;
        debug.arch.debugreg[7] = dr7;
    }
    if (wanted_.int3_exits) debug.control |= KVM_GUESTDBG_USE_SW_BP;
    debug.control |= std::exchange(inject_, 0);
    apply(debug);
    armed_ = true;
    active_ = known_;
}

bool VcpuDebug::exited(Exit& exit) {
    const auto& what = vcpu_.shared().debug.arch;
    exit = {};
    exit.reason = ExitReason::kDebug;
    exit.address = what.pc;
    if (what.exception == kBpVector) {
        if (wanted_.int3_exits) return true;
        // Left over from what was armed before.
        inject_ |= KVM_GUESTDBG_INJECT_BP;
        active_ = true;
        armed_ = false;
        return false;
    }
    u32 dr6 = static_cast<u32>(what.dr6);
    // B0-B3 tell of conditions that were met, also of breakpoints that are not enabled.
    u32 hits = dr6 & kDr6Hits & ((1u << wanted_.hardware.size()) - 1);
    for (unsigned n = 0; n < wanted_.hardware.size(); ++n) {
        const auto& breakpoint = wanted_.hardware[n];
        if (!(hits >> n & 1) || breakpoint.kind != Kind::kExecute) continue;
        if (stepping() || breakpoint.address != what.pc) {
            hits &= ~(1u << n);
        } else {
            stopped_at_ = what.pc;
            armed_ = false;
        }
    }
    if (stepping() && (dr6 & kDr6Step)) return finish_step(exit, hits | kDr6Step, what.pc);
    if (hits == 0) {  // the guest's own
        give_to_guest(dr6);
        return false;
    }
    exit.dr6 = hits;
    return true;
}

bool VcpuDebug::finish_step(Exit& exit, u32 dr6, u64 pc) {
    leave();
    if (pushf_ && pc != step_rip_) hide_pushed_trap();
    if (guest_trap_) give_to_guest(kDr6Step);
    if (!wanted_.single_step) dr6 &= ~u32{kDr6Step};  // it was only to get past a breakpoint
    if (dr6 == 0) return false;
    exit = {};
    exit.reason = ExitReason::kDebug;
    exit.address = pc;
    exit.dr6 = dr6;
    return true;
}

bool VcpuDebug::step_finished(Exit& exit) {
    if (!stepping()) return false;
    u64 rip = linear_rip(vcpu_, get_regs(vcpu_).rip);
    if (rip == step_rip_) return false;
    return finish_step(exit, kDr6Step, rip);
}

void VcpuDebug::leave() {
    if (!stepping()) return;
    armed_ = false;
    active_ = true;
    kvm_guest_debug nothing{};
    apply(nothing);
    if (!guest_trap_) return;
    // KVM takes TF away with its own.
    kvm_regs regs = get_regs(vcpu_);
    regs.rflags |= kTrapFlag;
    call_ioctl(vcpu_.fd(), KVM_SET_REGS, &regs);
}

void VcpuDebug::give_to_guest(u32 dr6) {
    kvm_debugregs registers;
    call_ioctl(vcpu_.fd(), KVM_GET_DEBUGREGS, &registers);
    registers.dr6 |= dr6 & (kDr6Hits | kDr6Step | bit(13) | bit(15));
    call_ioctl(vcpu_.fd(), KVM_SET_DEBUGREGS, &registers);
    inject_ |= KVM_GUESTDBG_INJECT_DB;
    armed_ = false;
    active_ = true;
}

void VcpuDebug::raise_int3() {
    inject_ |= KVM_GUESTDBG_INJECT_BP;
    armed_ = false;
    active_ = true;
}

bool debug_exit(KvmVcpu& vcpu, Exit& exit) {
    return vcpu.debug().exited(exit);
}

void KvmVcpu::set_debug(const GuestDebug& debug) {
    vm_.check_process();
    debug_.set(debug);
}

}  // namespace polyvisor::kvm
