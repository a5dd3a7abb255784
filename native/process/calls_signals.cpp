// Signals: what a program asks of them and whom it sends them to.
#include <sys/syscall.h>

#include <algorithm>

#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kSetSize = 8;

// --- What is done with them ----------------------------------------------------------------------

s64 sys_rt_sigaction(Thread& thread, const Arguments& a) {
    if (a[3] != kSetSize) return -EINVAL;
    SignalAction wanted;
    if (a[1] != 0 && !thread.space().load(a[1], wanted)) return -EFAULT;
    const u64 number = static_cast<u32>(a[0]);
    if (!is_signal(number)) return -EINVAL;
    const u64 flag = signal_bit(static_cast<int>(number));
    if (a[1] != 0 && (flag & kUnmaskable)) return -EINVAL;
    Process& process = thread.process();
    const SignalAction before = process.signals.action(static_cast<int>(number));
    if (a[1] != 0) set_action(process, static_cast<int>(number), wanted);
    return a[2] == 0 || thread.space().store(a[2], before) ? 0 : -EFAULT;
}

s64 sys_rt_sigprocmask(Thread& thread, const Arguments& a) {
    if (a[3] != kSetSize) return -EINVAL;
    const u64 before = thread.signals.mask;
    if (a[1] != 0) {
        u64 set = 0;
        if (!thread.space().load(a[1], set)) return -EFAULT;
        switch (static_cast<int>(a[0])) {
            case SIG_BLOCK:
                set_mask(thread, before | set);
                break;
            case SIG_UNBLOCK:
                set_mask(thread, before & ~set);
                break;
            case SIG_SETMASK:
                set_mask(thread, set);
                break;
            default:
                return -EINVAL;
        }
    }
    return a[2] == 0 || thread.space().store(a[2], before) ? 0 : -EFAULT;
}

s64 sys_rt_sigpending(Thread& thread, const Arguments& a) {
    if (a[1] > kSetSize) return -EINVAL;
    const ThreadSignals& mine = thread.signals;
    const u64 set = (mine.pending.set() | thread.process().signals.pending.set()) & mine.mask;
    const auto* bytes = reinterpret_cast<const u8*>(&set);
    return thread.space().copy_out(a[0], {bytes, a[1]}) ? 0 : -EFAULT;
}

s64 sys_sigaltstack(Thread& thread, const Arguments& a) {
    ThreadSignals& mine = thread.signals;
    const u64 rsp = thread.registers.gpr[kRsp];
    SignalStack wanted, before = mine.stack;
    if (a[0] != 0 && !thread.space().load(a[0], wanted)) return -EFAULT;
    before.flags &= SignalStack::kAutodisarm;
    before.flags |= before.size == 0 ? SS_DISABLE : before.busy(rsp) ? SS_ONSTACK : 0;
    if (a[0] != 0) {
        if (const s64 error = change_stack(mine, wanted, rsp)) return error;
    }
    return a[1] == 0 || thread.space().store(a[1], before) ? 0 : -EFAULT;
}

s64 sys_rt_sigreturn(Thread& thread, const Arguments&) {
    return_from_handler(thread);
    return static_cast<s64>(thread.registers.gpr[kRax]);
}

// --- Waiting for them ----------------------------------------------------------------------------

s64 sys_pause(Thread& thread, const Arguments&) {
    thread.wait(-1, 0, -1);
    return -EINTR;
}

s64 sys_rt_sigsuspend(Thread& thread, const Arguments& a) {
    u64 set = 0;
    if (a[1] != kSetSize) return -EINVAL;
    if (!thread.space().load(a[0], set)) return -EFAULT;
    use_mask(thread, set);
    return sys_pause(thread, {});
}

s64 sys_rt_sigtimedwait(Thread& thread, const Arguments& a) {
    u64 set = 0;
    s64 timeout = -1;
    if (a[3] != kSetSize) return -EINVAL;
    if (!thread.space().load(a[0], set)) return -EFAULT;
    if (a[2] != 0) {
        timespec limit;
        if (!thread.space().load(a[2], limit)) return -EFAULT;
        if (!to_nanoseconds(limit, timeout)) return -EINVAL;
    }
    set &= ~kUnmaskable;
    auto info = take_signal(thread, set);
    bool interrupted = false;
    if (!info && timeout != 0) {
        thread.signals.awaited = set;
        interrupted = !thread.wait(-1, 0, timeout);
        thread.signals.awaited = 0;
        info = take_signal(thread, set);
    }
    if (!info) return interrupted ? -EINTR : -EAGAIN;
    return a[1] == 0 || thread.space().store(a[1], *info) ? info->si_signo : -EFAULT;
}

// --- Sending them --------------------------------------------------------------------------------

// To a process (`thread` null) or one of its threads; number 0 only asks whether it is there.
s64 send(Process& process, Thread* thread, const siginfo_t& info) {
    if (info.si_signo == 0) return 0;
    return thread == nullptr ? raise(process, info) : raise(*thread, info);
}

s64 sys_kill(Thread& thread, const Arguments& a) {
    const s32 whom = static_cast<s32>(a[0]);
    const u64 number = static_cast<u32>(a[1]);
    if (whom == INT32_MIN) return -ESRCH;
    if (number > kSignals) return -EINVAL;
    const Process& self = thread.process();
    const siginfo_t info = sent_signal(static_cast<int>(number), SI_USER, self.pid);
    if (whom > 0) {
        Process* process = thread.kernel().find_process(whom);
        return process == nullptr ? -ESRCH : send(*process, nullptr, info);
    }
    const s32 group = whom == 0 ? self.group : -whom;
    s64 result = -ESRCH;
    for (auto& [pid, process] : thread.kernel().processes()) {
        if (whom == -1 ? process.get() == &self : process->group != group) continue;
        result = send(*process, nullptr, info);
    }
    return result;
}

s64 send_to_thread(Thread& from, s32 group, s32 whom, siginfo_t info) {
    if (whom <= 0 || group == 0 || group < -1) return -EINVAL;
    Thread* thread = from.kernel().find_thread(whom);
    if (thread == nullptr || (group != -1 && thread->process().pid != group)) return -ESRCH;
    if (info.si_signo < 0 || info.si_signo > kSignals) return -EINVAL;
    return send(thread->process(), thread, info);
}

s64 sys_tkill(Thread& thread, const Arguments& a) {
    return send_to_thread(thread, -1, static_cast<s32>(a[0]),
                          sent_signal(static_cast<int>(a[1]), SI_TKILL, thread.process().pid));
}

s64 sys_tgkill(Thread& thread, const Arguments& a) {
    if (static_cast<s32>(a[0]) <= 0) return -EINVAL;
    return send_to_thread(thread, static_cast<s32>(a[0]), static_cast<s32>(a[1]),
                          sent_signal(static_cast<int>(a[2]), SI_TKILL, thread.process().pid));
}

// What a program says itself that a signal is; only to itself may it say that it is the kernel's
// or kill()'s.
s64 load_info(Thread& thread, u64 address, int number, s32 group, siginfo_t& info) {
    if (!thread.space().load(address, info)) return -EFAULT;
    info.si_signo = number;
    const bool claims = info.si_code >= 0 || info.si_code == SI_TKILL;
    return claims && group != thread.process().pid ? -EPERM : 0;
}

s64 sys_rt_sigqueueinfo(Thread& thread, const Arguments& a) {
    siginfo_t info;
    const s32 whom = static_cast<s32>(a[0]);
    const int number = static_cast<int>(a[1]);
    if (const s64 error = load_info(thread, a[2], number, whom, info)) return error;
    if (number < 0 || number > kSignals) return -EINVAL;
    Process* process = thread.kernel().find_process(whom);
    return process == nullptr ? -ESRCH : send(*process, nullptr, info);
}

s64 sys_rt_tgsigqueueinfo(Thread& thread, const Arguments& a) {
    siginfo_t info;
    const s32 group = static_cast<s32>(a[0]);
    if (const s64 error = load_info(thread, a[3], static_cast<int>(a[2]), group, info))
        return error;
    if (group <= 0) return -EINVAL;
    return send_to_thread(thread, group, static_cast<s32>(a[1]), info);
}

constexpr Call kCalls[] = {
    {SYS_rt_sigaction, sys_rt_sigaction},
    {SYS_rt_sigprocmask, sys_rt_sigprocmask},
    {SYS_rt_sigpending, sys_rt_sigpending},
    {SYS_rt_sigreturn, sys_rt_sigreturn},
    {SYS_rt_sigsuspend, sys_rt_sigsuspend},
    {SYS_rt_sigtimedwait, sys_rt_sigtimedwait},
    {SYS_rt_sigqueueinfo, sys_rt_sigqueueinfo},
    {SYS_rt_tgsigqueueinfo, sys_rt_tgsigqueueinfo},
    {SYS_sigaltstack, sys_sigaltstack},
    {SYS_pause, sys_pause},
    {SYS_kill, sys_kill},
    {SYS_tkill, sys_tkill},
    {SYS_tgkill, sys_tgkill},
};

}  // namespace

std::span<const Call> signal_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
