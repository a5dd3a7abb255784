// Guest debugging through KVM_SET_GUEST_DEBUG: how what the host wants (GuestDebug) is armed before
// KVM_RUN, and what a KVM_EXIT_DEBUG was for. See docs/debugging.md.
//
// While anything but INT3 exits is armed, KVM hands every #DB to us, also the guest's own: those
// are put back with KVM_GUESTDBG_INJECT_DB.
#pragma once

#include "kvm/abi.hpp"

#include <optional>

#include "cpu/engine.hpp"

namespace polyvisor::kvm {

class KvmVcpu;
class System;

/// The host's debugging of one vCPU. Everything is called by the thread that runs it.
class VcpuDebug {
  public:
    explicit VcpuDebug(KvmVcpu& vcpu) : vcpu_(vcpu) {}

    /// Throws ConfigError for impossible breakpoints, StateMismatch for what this KVM cannot do.
    void set(const GuestDebug& wanted);
    /// before_entry() has to be called before each KVM_RUN.
    bool active() const { return active_; }
    /// One instruction at a time: interrupts and NMIs wait, and every access that was served must
    /// be completed, followed by step_finished().
    bool stepping() const { return armed_ && stepping_; }
    /// A single step is wanted: no interrupt is to be injected.
    bool holds_interrupts() const { return wanted_.single_step; }
    void before_entry();
    /// After a KVM_EXIT_DEBUG. True: run() returns `exit`; false: the guest runs on.
    bool exited(Exit& exit);
    /// After KVM has completed an access, or halted: the same for a step that ended without an exit
    /// of its own.
    bool step_finished(Exit& exit);
    /// run() returns: the vCPU's registers are the guest's alone again.
    void leave();
    /// The INT3 that ended the last run() is the guest's own: #BP on the next entry.
    void raise_int3();

  private:
    bool finish_step(Exit& exit, u32 dr6, u64 pc);
    void apply(kvm_guest_debug& debug);
    bool at_pushf() const;
    void hide_pushed_trap() const;
    void give_to_guest(u32 dr6);

    KvmVcpu& vcpu_;
    GuestDebug wanted_;
    bool active_ = false;
    bool armed_ = false;             // KVM knows what it must for the next entry
    bool stepping_ = false;          // ... which is one instruction
    bool known_ = false;             // KVM has some of it on
    u32 inject_ = 0;                 // KVM_GUESTDBG_INJECT_*, at the next entry
    u64 step_rip_ = 0;               // linear RIP when the step began
    bool guest_trap_ = false;        // the guest's own TF then
    bool pushf_ = false;             // the step is over a PUSHF
    std::optional<u64> stopped_at_;  // the code breakpoint that ended the last run()
};

/// For KVM_EXIT_DEBUG: VcpuDebug::exited().
bool debug_exit(KvmVcpu& vcpu, Exit& exit);

/// Whether an INT3 of a guest comes to us when we ask for it; some emulations of KVM, and kvm-amd
/// on an emulated CPU, deliver it to the guest instead. Measured with a guest of two instructions,
/// once per process.
bool int3_can_exit(const System& system);

}  // namespace polyvisor::kvm
