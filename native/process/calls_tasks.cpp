// Threads and processes: how they begin, wait for each other, and end.
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include <algorithm>

#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

constexpr s64 kSecond = 1'000'000'000;

// --- Beginnings and ends -------------------------------------------------------------------------

// A vector of strings, as execve() takes it: an errno.
int strings(Thread& thread, u64 address, std::vector<std::string>& into) {
    constexpr std::size_t kMost = 1 << 16, kLongest = 128 << 10, kTogether = 2 << 20;
    std::size_t bytes = 0;
    for (; address != 0; address += 8) {
        u64 text = 0;
        if (!thread.space().load(address, text)) return EFAULT;
        if (text == 0) return 0;
        auto found = thread.space().string(text, kLongest);
        if (!found) return EFAULT;
        bytes += found->size();
        if (into.size() == kMost || bytes > kTogether) return E2BIG;
        into.push_back(std::move(*found));
    }
    return 0;
}

s64 sys_execve(Thread& thread, const Arguments& a) {
    const auto path = thread.string(a[0]);
    std::vector<std::string> arguments, environment;
    if (!path) return -EFAULT;
    if (int error = strings(thread, a[1], arguments)) return -error;
    if (int error = strings(thread, a[2], environment)) return -error;
    if (arguments.empty()) arguments.push_back("");
    return -thread.execute(*path, std::move(arguments), std::move(environment));
}

s64 sys_clone(Thread& thread, const Arguments& a) {
    return thread.kernel().clone(thread, {a[0], a[1], a[4], a[2], a[3]});
}

s64 sys_fork(Thread& thread, const Arguments&) {
    return thread.kernel().clone(thread, {SIGCHLD});
}

s64 sys_vfork(Thread& thread, const Arguments&) {
    return thread.kernel().clone(thread, {CLONE_VM | CLONE_VFORK | SIGCHLD});
}

s64 sys_exit(Thread& thread, const Arguments& a) {
    Process& process = thread.process();
    const int status = static_cast<int>(a[0] & 0xff);
    if (process.threads.size() == 1) {
        process.exit({.status = status});
    } else {
        thread.exit();
    }
    return 0;
}

s64 sys_exit_group(Thread& thread, const Arguments& a) {
    thread.process().exit({.status = static_cast<int>(a[0] & 0xff)});
    return 0;
}

// --- Waiting for children ------------------------------------------------------------------------

// What wait() with these options (as waitid() has them) is to tell of a child; 0: nothing.
int news_of(const Process& child, u64 options) {
    if (child.ended()) {
        if (!(options & WEXITED)) return 0;
        return child.end.reason == End::Reason::kExited ? CLD_EXITED : CLD_KILLED;
    }
    const int news = child.signals.news;
    const u64 wanted = news == CLD_STOPPED ? WSTOPPED : WCONTINUED;
    return options & wanted ? news : 0;
}

// A child that wait() has news of; nullptr and `any` false: none is meant at all.
Process* child_with_news(Thread& thread, s64 which, u64 options, bool& any) {
    const Process& self = thread.process();
    any = false;
    for (auto& [pid, process] : thread.kernel().processes()) {
        const bool meant = which == -1 || which == pid ||
                           (which == 0 && process->group == self.group) ||
                           (which < -1 && process->group == -which);
        if (process->parent != self.pid || !meant) continue;
        any = true;
        if (news_of(*process, options) != 0) return process.get();
    }
    return nullptr;
}

rusage usage_of(u64 cpu_time) {
    rusage usage{};
    usage.ru_utime = {static_cast<time_t>(cpu_time / kSecond),
                      static_cast<suseconds_t>(cpu_time % kSecond / 1000)};
    return usage;
}

// A child that there are news of: `found`, or nullptr when there is none yet and that is no reason
// to wait; or -errno.
s64 wait_for_child(Thread& thread, s64 which, u64 options, Process*& found) {
    const bool nohang = options & WNOHANG;
    bool any = false;
    found = nullptr;
    thread.block([&] {
        found = child_with_news(thread, which, options, any);
        return found != nullptr || !any || nohang;
    });
    if (found == nullptr && !any) return -ECHILD;
    return found == nullptr && !nohang ? -EINTR : 0;
}

// As wait4() says it.
int told_status(const Process& child, int news) {
    constexpr int kStopped = 0x7f, kContinued = 0xffff;
    if (news == CLD_STOPPED) return child_status(child, news) << 8 | kStopped;
    return news == CLD_CONTINUED ? kContinued : child.end.wait_status();
}

// What there was to tell of a child has been told.
void be_told(Thread& thread, Process& child) {
    child.signals.news = 0;
    if (child.ended()) thread.kernel().reap(child);
}

s64 sys_wait4(Thread& thread, const Arguments& a) {
    if (a[2] & ~u64{WNOHANG | WUNTRACED | WCONTINUED | __WALL | __WCLONE | __WNOTHREAD}) {
        return -EINVAL;
    }
    Process* child = nullptr;
    const u64 options = a[2] | WEXITED;  // (WUNTRACED is WSTOPPED)
    const s64 error = wait_for_child(thread, static_cast<s32>(a[0]), options, child);
    if (error != 0 || child == nullptr) return error;
    const int pid = child->pid, status = told_status(*child, news_of(*child, options));
    const rusage usage = usage_of(child->cpu_time + child->children_cpu_time);
    be_told(thread, *child);
    if (a[1] != 0 && !thread.space().store(a[1], status)) return -EFAULT;
    if (a[3] != 0 && !thread.space().store(a[3], usage)) return -EFAULT;
    return pid;
}

s64 sys_waitid(Thread& thread, const Arguments& a) {
    if (a[3] & ~u64{WNOHANG | WEXITED | WSTOPPED | WCONTINUED | WNOWAIT | __WALL}) return -EINVAL;
    if (!(a[3] & (WEXITED | WSTOPPED | WCONTINUED))) return -EINVAL;
    s64 which = -1;
    const s64 id = static_cast<s32>(a[1]);
    if (a[0] == P_PID || a[0] == P_PGID) {
        if (id < (a[0] == P_PID ? 1 : 0)) return -EINVAL;
        which = a[0] == P_PID ? id : id == 0 ? 0 : -id;
    } else if (a[0] != P_ALL) {
        return -EINVAL;
    }
    Process* child = nullptr;
    const s64 error = wait_for_child(thread, which, a[3], child);
    if (error != 0) return error;
    siginfo_t info{};
    rusage usage{};
    if (child != nullptr) {
        info.si_signo = SIGCHLD;
        info.si_pid = child->pid;
        info.si_code = news_of(*child, a[3]);
        info.si_status = child_status(*child, info.si_code);
        usage = usage_of(child->cpu_time + child->children_cpu_time);
        if (!(a[3] & WNOWAIT)) be_told(thread, *child);
    }
    if (a[2] != 0 && !thread.space().store(a[2], info)) return -EFAULT;
    if (a[4] != 0 && !thread.space().store(a[4], usage)) return -EFAULT;
    return 0;
}

// --- Names ---------------------------------------------------------------------------------------

s64 sys_getpid(Thread& thread, const Arguments&) {
    return thread.process().pid;
}

s64 sys_gettid(Thread& thread, const Arguments&) {
    return thread.tid();
}

s64 sys_getppid(Thread& thread, const Arguments&) {
    return thread.process().parent;
}

Process* named(Thread& thread, u64 pid) {
    return pid == 0 ? &thread.process() : thread.kernel().find_process(static_cast<s32>(pid));
}

s64 sys_getpgid(Thread& thread, const Arguments& a) {
    Process* process = named(thread, a[0]);
    return process == nullptr ? -ESRCH : process->group;
}

s64 sys_getpgrp(Thread& thread, const Arguments&) {
    return thread.process().group;
}

s64 sys_getsid(Thread& thread, const Arguments& a) {
    Process* process = named(thread, a[0]);
    return process == nullptr ? -ESRCH : process->session;
}

s64 sys_setpgid(Thread& thread, const Arguments& a) {
    Process* process = named(thread, a[0]);
    const Process& self = thread.process();
    if (static_cast<s32>(a[1]) < 0) return -EINVAL;
    if (process == nullptr || (process != &self && process->parent != self.pid)) return -ESRCH;
    if (process->session != self.session || process->session == process->pid) return -EPERM;
    const int group = a[1] == 0 ? process->pid : static_cast<int>(a[1]);
    bool known = group == process->pid;
    for (auto& [pid, other] : thread.kernel().processes()) {
        known |= other->group == group && other->session == self.session;
    }
    if (!known) return -EPERM;
    process->group = group;
    return 0;
}

s64 sys_setsid(Thread& thread, const Arguments&) {
    Process& self = thread.process();
    for (auto& [pid, other] : thread.kernel().processes()) {
        if (other->group == self.pid) return -EPERM;
    }
    self.group = self.session = self.pid;
    return self.pid;
}

s64 sys_set_tid_address(Thread& thread, const Arguments& a) {
    thread.clear_child_tid = a[0];
    return thread.tid();
}

s64 sys_set_robust_list(Thread& thread, const Arguments& a) {
    constexpr u64 kHeadBytes = 24;
    if (a[1] != kHeadBytes) return -EINVAL;
    thread.robust_list = a[0];
    return 0;
}

// --- Futexes (futex(2)) --------------------------------------------------------------------------

std::optional<Thread::TimePoint> futex_limit(Thread& thread, const Arguments& a, s64& error) {
    timespec time{};
    error = 0;
    if (a[3] == 0) return std::nullopt;
    if (!thread.space().load(a[3], time)) {
        error = -EFAULT;
    } else if (time.tv_sec < 0 || time.tv_nsec < 0 || time.tv_nsec >= kSecond) {
        error = -EINVAL;
    }
    if (error != 0) return std::nullopt;
    if ((a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET) {  // a moment, not a while
        timespec now{};
        ::clock_gettime(a[1] & FUTEX_CLOCK_REALTIME ? CLOCK_REALTIME : CLOCK_MONOTONIC, &now);
        time.tv_sec -= now.tv_sec;
        time.tv_nsec -= now.tv_nsec;
    }
    constexpr s64 kCentury = 3'000'000'000;
    if (time.tv_sec > kCentury) return std::nullopt;
    return std::chrono::steady_clock::now() +
           std::chrono::nanoseconds(std::max<s64>(0, time.tv_sec * kSecond + time.tv_nsec));
}

// FUTEX_WAKE_OP's change of its second word, and its question about what was there.
s64 futex_change(Thread& thread, u64 address, u32 encoded, bool& asked) {
    const u32 operation = encoded >> 28 & 7, comparison = encoded >> 24 & 15;
    const s32 shifted = static_cast<s32>(encoded << 8) >> 20;
    const u32 operand = encoded >> 31 ? 1u << (shifted & 31) : static_cast<u32>(shifted);
    const s32 against = static_cast<s32>(encoded << 20) >> 20;
    if (address % 4 != 0) return -EINVAL;
    u32* at = thread.space().word(address);
    if (at == nullptr) return -EFAULT;
    u32 before = 0;
    switch (operation) {
        case FUTEX_OP_SET:
            before = __atomic_exchange_n(at, operand, __ATOMIC_SEQ_CST);
            break;
        case FUTEX_OP_ADD:
            before = __atomic_fetch_add(at, operand, __ATOMIC_SEQ_CST);
            break;
        case FUTEX_OP_OR:
            before = __atomic_fetch_or(at, operand, __ATOMIC_SEQ_CST);
            break;
        case FUTEX_OP_ANDN:
            before = __atomic_fetch_and(at, ~operand, __ATOMIC_SEQ_CST);
            break;
        case FUTEX_OP_XOR:
            before = __atomic_fetch_xor(at, operand, __ATOMIC_SEQ_CST);
            break;
        default:
            return -ENOSYS;
    }
    const s32 value = static_cast<s32>(before);
    const bool answers[] = {value == against, value != against,
                            value<against, value <= against, value> against, value >= against};
    if (comparison >= std::size(answers)) return -ENOSYS;
    asked = answers[comparison];
    return 0;
}

s64 sys_futex(Thread& thread, const Arguments& a) {
    Futexes& futexes = thread.kernel().futexes;
    const u32 command = a[1] & FUTEX_CMD_MASK;
    if (a[0] % 4 != 0) return -EINVAL;
    const Futexes::Key key = thread.futex_key(a[0]);
    switch (command) {
        case FUTEX_WAKE:
        case FUTEX_WAKE_BITSET: {
            const u32 bits = command == FUTEX_WAKE ? Futexes::kAny : static_cast<u32>(a[5]);
            return bits == 0 ? -EINVAL : futexes.wake(key, static_cast<u32>(a[2]), bits);
        }
        case FUTEX_WAIT:
        case FUTEX_WAIT_BITSET: {
            const u32 bits = command == FUTEX_WAIT ? Futexes::kAny : static_cast<u32>(a[5]);
            s64 error = 0;
            const auto until = futex_limit(thread, a, error);
            if (error != 0) return error;
            if (bits == 0) return -EINVAL;
            u32 value = 0;
            if (!thread.space().load(a[0], value)) return -EFAULT;
            if (value != static_cast<u32>(a[2])) return -EAGAIN;
            return futexes.wait(thread, key, bits, until);
        }
        case FUTEX_REQUEUE:
        case FUTEX_CMP_REQUEUE: {
            u32 value = 0;
            if (command == FUTEX_CMP_REQUEUE) {
                if (!thread.space().load(a[0], value)) return -EFAULT;
                if (value != static_cast<u32>(a[5])) return -EAGAIN;
            }
            const u32 woken = futexes.wake(key, static_cast<u32>(a[2]));
            const u32 moved = futexes.move(key, thread.futex_key(a[4]), static_cast<u32>(a[3]));
            return woken + (command == FUTEX_CMP_REQUEUE ? moved : 0);
        }
        case FUTEX_WAKE_OP: {
            bool asked = false;
            if (s64 error = futex_change(thread, a[4], static_cast<u32>(a[5]), asked)) return error;
            u32 woken = futexes.wake(key, static_cast<u32>(a[2]));
            if (asked) woken += futexes.wake(thread.futex_key(a[4]), static_cast<u32>(a[3]));
            return woken;
        }
        default:
            return -ENOSYS;
    }
}

constexpr Call kCalls[] = {
    {SYS_execve, sys_execve},
    {SYS_clone, sys_clone},
    {SYS_fork, sys_fork},
    {SYS_vfork, sys_vfork},
    {SYS_exit, sys_exit},
    {SYS_exit_group, sys_exit_group},
    {SYS_wait4, sys_wait4},
    {SYS_waitid, sys_waitid},
    {SYS_getpid, sys_getpid},
    {SYS_gettid, sys_gettid},
    {SYS_getppid, sys_getppid},
    {SYS_getpgid, sys_getpgid},
    {SYS_getpgrp, sys_getpgrp},
    {SYS_getsid, sys_getsid},
    {SYS_setpgid, sys_setpgid},
    {SYS_setsid, sys_setsid},
    {SYS_set_tid_address, sys_set_tid_address},
    {SYS_set_robust_list, sys_set_robust_list},
    {SYS_futex, sys_futex},
};

}  // namespace

std::span<const Call> task_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
