// What a handler of a signal finds on its stack, and what rt_sigreturn() makes of it: Linux's
// struct rt_sigframe for x86-64 (arch/x86/include/asm/sigframe.h) with the FPU's registers above it
// in XSAVE's standard format.
//
// The frame lies in the program's memory. What comes back from there is the program's word: it is
// copied once, and registers that no program can have are refused.
#pragma once

#include <signal.h>

#include "cpu/state.hpp"
#include "process/address_space.hpp"

namespace polyvisor::process {

/// As rt_sigaction() takes it.
struct SignalAction {
    u64 handler = 0;  ///< or SIG_DFL, SIG_IGN
    u64 flags = 0;    ///< SA_*
    u64 restorer = 0;
    u64 mask = 0;  ///< bit n: signal n + 1

    static constexpr u64 kRestorer = 0x0400'0000;  ///< SA_RESTORER
    bool operator==(const SignalAction&) const = default;
};

/// As sigaltstack() takes it.
struct SignalStack {
    u64 base = 0;
    u32 flags = 0, unused = 0;
    u64 size = 0;

    static constexpr u32 kAutodisarm = 1u << 31;  ///< SS_AUTODISARM
    /// Whether a stack pointer is in it.
    bool holds(u64 rsp) const { return rsp > base && rsp - base <= size; }
    /// Whether it is in use by a handler, as far as that counts.
    bool busy(u64 rsp) const { return !(flags & kAutodisarm) && holds(rsp); }
    bool operator==(const SignalStack&) const = default;
};

/// What a handler interrupts, and goes back to.
struct SignalContext {
    GeneralRegisters registers;
    FpuState fpu;
    u64 mask = 0;
    SignalStack stack;
    /// Of the thread's last exception.
    struct Fault {
        u64 vector = 0, error = 0, address = 0;
    } fault;
};

/// The state that the FPU of a program, and of each handler, begins with.
FpuState initial_fpu();

/// Bytes that the frame of one signal takes of a stack at most; `xcr0` as the vCPU's.
u64 signal_frame_size(u64 xcr0);

/// Builds the frame below `context`'s stack pointer, or on its alternate stack; `registers` are
/// then the handler's at its first instruction. False: it cannot be (no memory there, no
/// restorer, ...), and nothing has changed that matters.
bool push_signal_frame(AddressSpace& space, u64 xcr0, const SignalAction& action,
                       const siginfo_t& info, const SignalContext& context,
                       GeneralRegisters& registers);

/// The frame that a handler's return leaves at `registers`' stack pointer; flags that no program
/// may change are `registers`'. False: there is none, or none that could be gone back to.
bool pop_signal_frame(const AddressSpace& space, u64 xcr0, const GeneralRegisters& registers,
                      SignalContext& context);

}  // namespace polyvisor::process
