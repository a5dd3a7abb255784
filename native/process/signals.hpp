// Signals as Linux has them: what is pending for a process and for each of its threads, who takes
// it, and what happens then.
//
// raise() only notes a signal and wakes who is to take it. That thread takes it in deliver(), on
// its way back to the program, where its registers are known: it goes on in a handler, or the
// process ends, stops, or nothing happens at all.
#pragma once

#include <optional>
#include <vector>

#include "process/signal_frame.hpp"
#include "process/supervisor.hpp"

namespace polyvisor::process {

class Process;
class Thread;

inline constexpr int kSignals = 64;
constexpr u64 signal_bit(int number) {
    return bit(static_cast<unsigned>(number) - 1);
}
constexpr bool is_signal(u64 number) {
    return number >= 1 && number <= kSignals;
}
inline constexpr u64 kUnmaskable = signal_bit(SIGKILL) | signal_bit(SIGSTOP);

/// What waits to be taken.
class SignalQueue {
  public:
    static constexpr std::size_t kMost = 1024;

    /// A standard signal that waits already is not added once more. False: there are too many.
    bool add(const siginfo_t& info);
    /// The next one of a set: exceptions first, then by number. Nothing: there is none.
    std::optional<siginfo_t> take(u64 of);
    void drop(u64 set);
    u64 set() const { return set_; }

  private:
    u64 set_ = 0;
    std::vector<siginfo_t> waiting_;  // in the order of their coming
};

enum class DefaultAction : u8 { kTerminate, kIgnore, kStop, kContinue };
DefaultAction default_action(int number);

siginfo_t signal_info(int number, int code);
/// As kill() and its likes send it: from process `pid`.
siginfo_t sent_signal(int number, int code, s32 pid);
/// What Linux makes of an exception at `rip` (arch/x86/kernel/traps.c, mm/fault.c).
siginfo_t exception_signal(const Trap& trap, u64 rip, const AddressSpace& space, const Vcpu& vcpu);

/// A process' part. fork() copies the actions.
struct ProcessSignals {
    std::array<SignalAction, kSignals> actions{};
    SignalQueue pending;
    int stopped = 0;  ///< by this signal
    int news = 0;     ///< CLD_STOPPED or CLD_CONTINUED, which its parent has not waited for

    SignalAction& action(int number) { return actions[static_cast<std::size_t>(number) - 1]; }
    bool ignores(int number);
    /// Nobody will wait for its children.
    bool leaves_children();
    /// As execve(): what was handled is so no longer.
    void reset_handlers();
};

/// A thread's part. A new thread has its maker's mask; fork() copies the stack, too.
struct ThreadSignals {
    u64 mask = 0;
    /// What the mask was before a system call that has one of its own, until a handler has begun.
    std::optional<u64> mask_before;
    u64 awaited = 0;  ///< rt_sigtimedwait() waits for these, blocked as they may be
    SignalQueue pending;
    SignalStack stack;
    SignalContext::Fault fault;  ///< its last exception
    bool left_wait = false;      ///< the system call that it is in had to leave a wait
    /// The system call that a signal has interrupted, until deliver() says how it goes on.
    std::optional<u64> interrupted;
    std::optional<u64> restarted;  ///< one that begins again as if nothing had been
    /// Until when it waits, ns of CLOCK_MONOTONIC.
    std::optional<s64> waits_until;
};

// All of these, with the lock of the kernel held.

/// For a process: for one of its threads that does not block it, now or later. 0, or -EAGAIN: too
/// many wait.
s64 raise(Process& process, const siginfo_t& info);
s64 raise(Thread& thread, const siginfo_t& info);
/// For what the thread itself did, whether it blocks that or not: when it does, or ignores it, the
/// process ends.
void force(Thread& thread, const siginfo_t& info);
/// si_status of a SIGCHLD with this code (CLD_*).
int child_status(const Process& child, int code);
/// A child has ended, stopped or goes on (`code`: CLD_*): its parent's threads that wait look.
void tell_parent(Process& child, int code);
/// What it set is in force; signals that are ignored from now on do not wait any more.
void set_action(Process& process, int number, const SignalAction& action);

/// Whether deliver() has something to take.
bool has_signals(const Thread& thread);
/// Takes what waits for the thread. Afterwards its registers are those to go on with, or it is to
/// end.
void deliver(Thread& thread);
/// The next signal of a set that waits for the thread or its process.
std::optional<siginfo_t> take_signal(Thread& thread, u64 of);
/// As rt_sigreturn().
void return_from_handler(Thread& thread);

/// A system call begins, or has its result. When that is -EINTR, deliver() decides how it goes on.
void begin_call(Thread& thread, u64 number);
void end_call(Thread& thread, u64 number, s64 result);

/// What it does not take any more of its process' signals, others do.
void set_mask(Thread& thread, u64 mask);
/// Another mask until the system call ends, or a handler has begun that it let come.
void use_mask(Thread& thread, u64 mask);
/// The thread ends: what it would have taken is for others.
void leave_signals(Thread& thread);
/// As sigaltstack(), with the thread's stack pointer: 0 or -errno.
s64 change_stack(ThreadSignals& signals, const SignalStack& stack, u64 rsp);

}  // namespace polyvisor::process
