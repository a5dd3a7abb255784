#include "process/signals.hpp"

#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "process/thread.hpp"
#include "process/trace.hpp"

namespace polyvisor::process {

namespace {

constexpr int kFirstRealTime = 32;
constexpr u64 kDefault = 0, kIgnore = 1;  // SIG_DFL, SIG_IGN
constexpr u64 kStopping =
    signal_bit(SIGSTOP) | signal_bit(SIGTSTP) | signal_bit(SIGTTIN) | signal_bit(SIGTTOU);
constexpr u64 kSynchronous = signal_bit(SIGSEGV) | signal_bit(SIGBUS) | signal_bit(SIGILL) |
                             signal_bit(SIGTRAP) | signal_bit(SIGFPE) | signal_bit(SIGSYS);

// Of flags that both units have in this order (SDM 1, 8.1.3.3 and 10.2.3).
int floating_point_code(u32 flags) {
    if (flags & 0x04) return FPE_FLTDIV;
    if (flags & 0x08) return FPE_FLTOVF;
    if (flags & 0x12) return FPE_FLTUND;
    if (flags & 0x20) return FPE_FLTRES;
    return FPE_FLTINV;
}

int floating_point_code(u8 vector, const FpuState& fpu) {
    u16 control, status;
    u32 mxcsr;
    std::memcpy(&control, fpu.legacy.data(), sizeof control);
    std::memcpy(&status, fpu.legacy.data() + 2, sizeof status);
    std::memcpy(&mxcsr, fpu.legacy.data() + 24, sizeof mxcsr);
    u32 flags = vector == 16 ? status & ~u32{control} : mxcsr & ~(mxcsr >> 7);
    if (flags & 1) flags = 1;
    return floating_point_code(flags);
}

}  // namespace

// --- What waits ----------------------------------------------------------------------------------

bool SignalQueue::add(const siginfo_t& info) {
    const u64 flag = signal_bit(info.si_signo);
    const bool timers = info.si_code == SI_TIMER;  // each has one of its own, whatever else waits
    if (info.si_signo < kFirstRealTime && (set_ & flag) && !timers) return true;
    if (waiting_.size() >= kMost) return false;
    waiting_.push_back(info);
    set_ |= flag;
    return true;
}

std::optional<siginfo_t> SignalQueue::take(u64 of) {
    of &= set_;
    if (of & kSynchronous) of &= kSynchronous;
    if (of == 0) return std::nullopt;
    const int number = std::countr_zero(of) + 1;
    auto is = [number](const siginfo_t& info) { return info.si_signo == number; };
    const auto found = std::find_if(waiting_.begin(), waiting_.end(), is);
    const siginfo_t info = *found;
    waiting_.erase(found);
    if (std::none_of(waiting_.begin(), waiting_.end(), is)) set_ &= ~signal_bit(number);
    return info;
}

void SignalQueue::drop(u64 set) {
    std::erase_if(waiting_,
                  [set](const siginfo_t& info) { return set & signal_bit(info.si_signo); });
    set_ &= ~set;
}

// --- A process and its threads -------------------------------------------------------------------

bool ProcessSignals::ignores(int number) {
    const u64 handler = action(number).handler;
    return handler == kIgnore ||
           (handler == kDefault && default_action(number) == DefaultAction::kIgnore);
}

bool ProcessSignals::leaves_children() {
    return action(SIGCHLD).handler == kIgnore || (action(SIGCHLD).flags & SA_NOCLDWAIT);
}

void ProcessSignals::reset_handlers() {
    for (SignalAction& action : actions) {
        const bool ignored = action.handler == kIgnore;
        action = {};
        if (ignored) action.handler = kIgnore;
    }
}

s64 change_stack(ThreadSignals& signals, const SignalStack& stack, u64 rsp) {
    constexpr u64 kLeast = 2048;  // MINSIGSTKSZ
    const u32 mode = stack.flags & ~SignalStack::kAutodisarm;
    if (signals.stack.busy(rsp)) return -EPERM;
    if (mode != SS_DISABLE && mode != SS_ONSTACK && mode != 0) return -EINVAL;
    if (mode == SS_DISABLE) {
        signals.stack = {0, stack.flags, 0, 0};
        return 0;
    }
    if (stack.size < kLeast) return -ENOMEM;
    signals.stack = {stack.base, stack.flags, 0, stack.size};
    return 0;
}

namespace {

// Whether a thread would take it, if it came now.
bool takes(const Thread& thread, u64 set) {
    return !thread.ending && (set & ~(thread.signals.mask & ~thread.signals.awaited));
}

void drop_everywhere(Process& process, u64 set) {
    process.signals.pending.drop(set);
    for (Thread* thread : process.threads) thread->signals.pending.drop(set);
}

// Somebody else is to take what waits for the process, and this thread does not take.
void hand_over(const Thread& thread, u64 set) {
    set &= thread.process().signals.pending.set();
    if (set == 0) return;
    for (Thread* other : thread.process().threads) {
        if (other != &thread && takes(*other, set)) other->interrupt();
    }
}

void go_on(Process& process) {
    process.signals.stopped = 0;
    process.signals.news = CLD_CONTINUED;
    for (Thread* thread : process.threads) thread->notify();
    tell_parent(process, CLD_CONTINUED);
}

void stop(Process& process, int number) {
    if (process.signals.stopped != 0) return;
    process.signals.stopped = number;
    process.signals.news = CLD_STOPPED;
    for (Thread* thread : process.threads) thread->interrupt();
    tell_parent(process, CLD_STOPPED);
}

// A terminal's signals do not stop a group that nobody of the same session would continue (POSIX,
// orphaned process groups).
bool may_stop(const Process& process, int number) {
    if (number == SIGSTOP) return true;
    for (auto& [pid, member] : process.kernel().processes()) {
        if (member->group != process.group || member->ended()) continue;
        const Process* parent = process.kernel().find_process(member->parent);
        if (parent != nullptr && parent->group != member->group &&
            parent->session == member->session) {
            return true;
        }
    }
    return false;
}

// What a signal does as it comes, whoever takes it and when. False: nobody need take it.
bool comes(Process& process, int number, u64 mask) {
    const u64 flag = signal_bit(number);
    if (number == SIGKILL) {
        process.exit({.reason = End::Reason::kSignal, .signal = number});
        return false;
    }
    if (flag & kStopping) {
        drop_everywhere(process, signal_bit(SIGCONT));
    } else if (number == SIGCONT) {
        drop_everywhere(process, kStopping);
        if (process.signals.stopped != 0) go_on(process);
    }
    return (mask & flag) || !process.signals.ignores(number);
}

}  // namespace

void set_mask(Thread& thread, u64 mask) {
    mask &= ~kUnmaskable;
    const u64 more = mask & ~thread.signals.mask;
    thread.signals.mask = mask;
    hand_over(thread, more);
}

void use_mask(Thread& thread, u64 mask) {
    thread.signals.mask_before = thread.signals.mask;
    set_mask(thread, mask);
}

void leave_signals(Thread& thread) {
    hand_over(thread, ~thread.signals.mask);
}

void set_action(Process& process, int number, const SignalAction& action) {
    SignalAction& kept = process.signals.action(number);
    kept = action;
    kept.mask &= ~kUnmaskable;
    if (process.signals.ignores(number)) drop_everywhere(process, signal_bit(number));
}

// --- Raising them --------------------------------------------------------------------------------

s64 raise(Process& process, const siginfo_t& info) {
    if (process.ended()) return 0;
    const auto& threads = process.threads;
    const u64 flag = signal_bit(info.si_signo);
    if (!comes(process, info.si_signo, threads.front()->signals.mask)) return 0;
    if (!process.signals.pending.add(info)) return -EAGAIN;
    const auto taker = std::find_if(threads.begin(), threads.end(),
                                    [flag](const Thread* thread) { return takes(*thread, flag); });
    if (taker != threads.end()) (*taker)->interrupt();
    return 0;
}

s64 raise(Thread& thread, const siginfo_t& info) {
    if (!comes(thread.process(), info.si_signo, thread.signals.mask)) return 0;
    if (!thread.signals.pending.add(info)) return -EAGAIN;
    if (takes(thread, signal_bit(info.si_signo))) thread.interrupt();
    return 0;
}

void force(Thread& thread, const siginfo_t& info) {
    SignalAction& action = thread.process().signals.action(info.si_signo);
    const u64 flag = signal_bit(info.si_signo);
    if ((thread.signals.mask & flag) || action.handler == kIgnore) action = {};
    thread.signals.mask &= ~flag;
    thread.signals.pending.drop(flag);
    thread.signals.pending.add(info);
}

int child_status(const Process& child, int code) {
    switch (code) {
        case CLD_EXITED:
            return child.end.status;
        case CLD_STOPPED:
            return child.signals.stopped;
        case CLD_CONTINUED:
            return SIGCONT;
        default:
            return child.end.wait_status();
    }
}

void tell_parent(Process& child, int code) {
    Process* parent = child.kernel().find_process(child.parent);
    if (parent == nullptr || parent->ended()) return;
    siginfo_t info = sent_signal(SIGCHLD, code, child.pid);
    info.si_status = child_status(child, code);
    const bool ended = code != CLD_STOPPED && code != CLD_CONTINUED;
    if (ended || !(parent->signals.action(SIGCHLD).flags & SA_NOCLDSTOP)) raise(*parent, info);
    for (Thread* thread : parent->threads) thread->notify();
}

// --- Taking them ---------------------------------------------------------------------------------

bool has_signals(const Thread& thread) {
    const ThreadSignals& mine = thread.signals;
    return (mine.pending.set() | thread.process().signals.pending.set()) &
           ~(mine.mask & ~mine.awaited);
}

std::optional<siginfo_t> take_signal(Thread& thread, u64 of) {
    auto info = thread.signals.pending.take(of);
    if (!info) info = thread.process().signals.pending.take(of);
    if (info) thread.process().timers.taken(*info);
    return info;
}

namespace {

// Whether a system call that was interrupted begins again after a handler with SA_RESTART
// (signal(7)).
bool begins_again(u64 number, const GeneralRegisters& registers) {
    switch (number) {
        case SYS_futex:  // without a timeout
            return registers.gpr[10] == 0;
        case SYS_pause:
        case SYS_rt_sigsuspend:
        case SYS_nanosleep:
        case SYS_clock_nanosleep:
        case SYS_poll:
        case SYS_ppoll:
        case SYS_select:
        case SYS_pselect6:
        case SYS_epoll_wait:
        case SYS_epoll_pwait:
        case SYS_epoll_pwait2:
        case SYS_semop:
        case SYS_semtimedop:
        case SYS_msgrcv:
        case SYS_msgsnd:
            return false;
        default:
            return true;
    }
}

void restart(Thread& thread) {
    constexpr u64 kSyscallLength = 2;
    thread.registers.gpr[kRax] = *thread.signals.interrupted;
    thread.registers.rip -= kSyscallLength;
}

void enter_handler(Thread& thread, const siginfo_t& info) {
    ThreadSignals& mine = thread.signals;
    SignalAction& current = thread.process().signals.action(info.si_signo);
    const SignalAction action = current;
    if (action.flags & SA_RESETHAND) current.handler = kDefault;
    if (mine.interrupted && (action.flags & SA_RESTART) &&
        begins_again(*mine.interrupted, thread.registers)) {
        restart(thread);
    }
    mine.interrupted.reset();

    const FpuState fpu = thread.vcpu().fpu();
    const u64 xcr0 = thread.vm().fresh(thread.cpu).xcr0;
    const SignalContext context{thread.registers, fpu, mine.mask_before.value_or(mine.mask),
                                mine.stack, mine.fault};
    if (!push_signal_frame(thread.space(), xcr0, action, info, context, thread.registers)) {
        if (info.si_signo == SIGSEGV) current = {};
        return force(thread, signal_info(SIGSEGV, SI_KERNEL));
    }
    if (fpu != initial_fpu()) thread.vcpu().set_fpu(initial_fpu());
    mine.mask_before.reset();
    const u64 own = action.flags & SA_NODEFER ? 0 : signal_bit(info.si_signo);
    set_mask(thread, mine.mask | action.mask | own);
    if (mine.stack.flags & SignalStack::kAutodisarm) mine.stack = {0, SS_DISABLE, 0, 0};
}

void restore_mask(Thread& thread) {
    if (!thread.signals.mask_before) return;
    set_mask(thread, *thread.signals.mask_before);
    thread.signals.mask_before.reset();
}

// It ends its process.
End fatal(const Thread& thread, const siginfo_t& info) {
    End end{.reason = End::Reason::kSignal, .signal = info.si_signo};
    if (!(signal_bit(info.si_signo) & kSynchronous) || info.si_code <= 0) return end;
    end.address =
        info.si_code == SI_KERNEL ? thread.registers.rip : reinterpret_cast<u64>(info.si_addr);
    return end;
}

}  // namespace

void deliver(Thread& thread) {
    Process& process = thread.process();
    ThreadSignals& mine = thread.signals;
    while (!thread.ending) {
        if (process.signals.stopped != 0) {
            thread.wait_until([&process] { return process.signals.stopped == 0; });
            continue;
        }
        const auto info = take_signal(thread, ~mine.mask);
        if (!info) break;
        if (Trace* trace = thread.kernel().observer.trace()) trace->signal(thread, *info);
        const u64 handler = process.signals.action(info->si_signo).handler;
        if (handler != kDefault && handler != kIgnore) {
            enter_handler(thread, *info);
        } else if (handler == kDefault) {
            const DefaultAction action = default_action(info->si_signo);
            if (action == DefaultAction::kStop && may_stop(process, info->si_signo)) {
                stop(process, info->si_signo);
            }
            if (action == DefaultAction::kTerminate) process.exit(fatal(thread, *info));
        }
    }
    if (mine.interrupted) {  // by what came to nothing
        restart(thread);
        mine.restarted = std::exchange(mine.interrupted, std::nullopt);
    }
    restore_mask(thread);
}

void return_from_handler(Thread& thread) {
    const u64 xcr0 = thread.vm().fresh(thread.cpu).xcr0;
    SignalContext context;
    if (!pop_signal_frame(thread.space(), xcr0, thread.registers, context)) {
        return force(thread, signal_info(SIGSEGV, SI_KERNEL));
    }
    // (A handler that has given itself another stack keeps it.)
    change_stack(thread.signals, context.stack, thread.registers.gpr[kRsp]);
    thread.registers = context.registers;
    set_mask(thread, context.mask);
    thread.vcpu().set_fpu(context.fpu);
}

void begin_call(Thread& thread, u64 number) {
    ThreadSignals& mine = thread.signals;
    if (mine.restarted != number) mine.waits_until.reset();
    mine.restarted.reset();
    mine.left_wait = false;
}

void end_call(Thread& thread, u64 number, s64 result) {
    // (Others may say EINTR, too. These two say themselves what they mean by it.)
    if (result == -EINTR && thread.signals.left_wait && number != SYS_rt_sigreturn &&
        number != SYS_rt_sigtimedwait) {
        thread.signals.interrupted = number;
    } else {
        restore_mask(thread);
    }
}

// --- What they mean ------------------------------------------------------------------------------

DefaultAction default_action(int number) {
    switch (number) {
        case SIGCHLD:
        case SIGURG:
        case SIGWINCH:
            return DefaultAction::kIgnore;
        case SIGCONT:
            return DefaultAction::kContinue;
        case SIGSTOP:
        case SIGTSTP:
        case SIGTTIN:
        case SIGTTOU:
            return DefaultAction::kStop;
        default:
            return DefaultAction::kTerminate;
    }
}

siginfo_t signal_info(int number, int code) {
    siginfo_t info{};
    info.si_signo = number;
    info.si_code = code;
    return info;
}

siginfo_t sent_signal(int number, int code, s32 pid) {
    siginfo_t info = signal_info(number, code);
    info.si_pid = pid;
    return info;
}

siginfo_t exception_signal(const Trap& trap, u64 rip, const AddressSpace& space, const Vcpu& vcpu) {
    constexpr int kFromKernel = SI_KERNEL;
    auto at = [](int number, int code, u64 address) {
        siginfo_t info = signal_info(number, code);
        info.si_addr = reinterpret_cast<void*>(address);
        return info;
    };
    switch (trap.vector) {
        case 0:
            return at(SIGFPE, FPE_INTDIV, rip);
        case 1: {
            constexpr u64 kSingleStep = bit(14), kBreakpoints = 15;
            const u64 dr6 = vcpu.save().dr6;
            return at(SIGTRAP,
                      dr6 & kSingleStep    ? TRAP_TRACE
                      : dr6 & kBreakpoints ? TRAP_HWBKPT
                                           : TRAP_BRKPT,
                      rip);
        }
        case 3:
            return signal_info(SIGTRAP, kFromKernel);
        case 6:
            return at(SIGILL, ILL_ILLOPN, rip);
        case 11:
        case 12:
            return signal_info(SIGBUS, kFromKernel);
        case 14: {
            auto area = space.areas().upper_bound(trap.address);
            const bool there = area != space.areas().begin() && (--area)->second.end > trap.address;
            return at(SIGSEGV, there ? SEGV_ACCERR : SEGV_MAPERR, trap.address);
        }
        case 16:
        case 19:
            return at(SIGFPE, floating_point_code(trap.vector, vcpu.save().fpu), rip);
        case 17:
            return signal_info(SIGBUS, BUS_ADRALN);
        default:
            return signal_info(SIGSEGV, kFromKernel);
    }
}

}  // namespace polyvisor::process
