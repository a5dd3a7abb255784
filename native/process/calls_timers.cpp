// Timers: what raises signals by itself.
#include <sys/syscall.h>

#include <algorithm>

#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

constexpr s64 kSecond = 1'000'000'000;

// --- setitimer() and alarm() ---------------------------------------------------------------------

bool from_timeval(const timeval& time, s64& result) {
    constexpr s64 kMicroseconds = 1'000'000;
    if (time.tv_usec < 0 || time.tv_usec >= kMicroseconds) return false;
    return to_nanoseconds(timespec{time.tv_sec, time.tv_usec * 1000}, result);
}

timeval to_timeval(s64 time) {
    return {time / kSecond, time % kSecond / 1000};
}
timespec to_timespec(s64 time) {
    return {time / kSecond, time % kSecond};
}

itimerval shown(const Timers::Setting& setting) {
    return {to_timeval(setting.interval), to_timeval(setting.left + 999)};
}

s64 sys_getitimer(Thread& thread, const Arguments& a) {
    if (a[0] > ITIMER_PROF) return -EINVAL;
    const auto setting = thread.process().timers.interval_timer(static_cast<int>(a[0]));
    return thread.space().store(a[1], shown(setting)) ? 0 : -EFAULT;
}

s64 sys_setitimer(Thread& thread, const Arguments& a) {
    itimerval wanted{};
    Timers::Setting setting;
    if (a[1] != 0 && !thread.space().load(a[1], wanted)) return -EFAULT;
    if (!from_timeval(wanted.it_value, setting.left) ||
        !from_timeval(wanted.it_interval, setting.interval) || a[0] > ITIMER_PROF) {
        return -EINVAL;
    }
    Timers& timers = thread.process().timers;
    const int which = static_cast<int>(a[0]);
    const auto before = timers.interval_timer(which);
    timers.set_interval_timer(which, setting);
    return a[2] == 0 || thread.space().store(a[2], shown(before)) ? 0 : -EFAULT;
}

s64 sys_alarm(Thread& thread, const Arguments& a) {
    Timers& timers = thread.process().timers;
    const s64 left = timers.interval_timer(ITIMER_REAL).left;
    timers.set_interval_timer(ITIMER_REAL, {static_cast<u32>(a[0]) * kSecond, 0});
    return left == 0 ? 0 : std::max<s64>(1, (left + kSecond / 2) / kSecond);
}

// --- timer_create() and its likes ----------------------------------------------------------------

// Which clock, and (for CPU time of a thread) whose: also those that pthread_getcpuclockid() and
// its likes make (linux/posix-timers_types.h).
bool find_clock(const Thread& thread, s32 id, clockid_t& clock, s32& whose) {
    constexpr s32 kThread = 4, kKind = 3, kScheduled = 2;
    whose = thread.tid();
    clock = id;
    if (id >= 0) {
        constexpr u64 kClocks = bit(CLOCK_REALTIME) | bit(CLOCK_MONOTONIC) |
                                bit(CLOCK_PROCESS_CPUTIME_ID) | bit(CLOCK_THREAD_CPUTIME_ID) |
                                bit(CLOCK_BOOTTIME) | bit(CLOCK_TAI);
        return id < 64 && (kClocks & bit(static_cast<unsigned>(id)));
    }
    if ((id & kKind) > kScheduled) return false;
    const s32 named = ~(id >> 3);
    clock = id & kThread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_PROCESS_CPUTIME_ID;
    if (named == 0) return true;
    if (!(id & kThread)) return named == thread.process().pid;
    const Thread* other = thread.kernel().find_thread(named);
    whose = named;
    return other != nullptr && &other->process() == &thread.process();
}

s64 sys_timer_create(Thread& thread, const Arguments& a) {
    struct {
        u64 value;
        s32 signal, notify, thread, unused[11];
    } event{};
    static_assert(sizeof event == 64);
    event.signal = SIGALRM;
    if (a[1] != 0 && !thread.space().load(a[1], event)) return -EFAULT;
    clockid_t clock;
    s32 whose, whom = 0;
    if (!find_clock(thread, static_cast<s32>(a[0]), clock, whose)) return -EINVAL;
    if (event.notify == (SIGEV_SIGNAL | SIGEV_THREAD_ID)) {
        whom = event.thread;
        const Thread* taker = thread.kernel().find_thread(whom);
        if (taker == nullptr || &taker->process() != &thread.process()) return -EINVAL;
    } else if (event.notify != SIGEV_SIGNAL && event.notify != SIGEV_NONE &&
               event.notify != SIGEV_THREAD) {
        return -EINVAL;
    }
    if (event.notify == SIGEV_NONE) event.signal = 0;
    if (event.notify != SIGEV_NONE && !is_signal(static_cast<u64>(event.signal))) return -EINVAL;
    Timers& timers = thread.process().timers;
    if (a[1] == 0) event.value = static_cast<u64>(timers.next());
    siginfo_t info = signal_info(event.signal, SI_TIMER);
    info.si_value.sival_ptr = reinterpret_cast<void*>(event.value);
    const s64 number = timers.create(clock, info, whom, whose);
    if (number < 0) return number;
    if (thread.space().store(a[2], static_cast<s32>(number))) return 0;
    timers.remove(number);
    return -EFAULT;
}

itimerspec shown_precisely(const Timers::Setting& setting) {
    return {to_timespec(setting.interval), to_timespec(setting.left)};
}

s64 sys_timer_settime(Thread& thread, const Arguments& a) {
    itimerspec wanted;
    Timers::Setting setting;
    if (a[2] == 0) return -EINVAL;
    if (!thread.space().load(a[2], wanted)) return -EFAULT;
    Timers& timers = thread.process().timers;
    const s64 number = static_cast<s32>(a[0]);
    if (!to_nanoseconds(wanted.it_value, setting.left) ||
        !to_nanoseconds(wanted.it_interval, setting.interval) || !timers.exists(number)) {
        return -EINVAL;
    }
    const auto before = timers.get(number);
    timers.set(number, setting, a[1] & TIMER_ABSTIME);
    return a[3] == 0 || thread.space().store(a[3], shown_precisely(before)) ? 0 : -EFAULT;
}

s64 sys_timer_gettime(Thread& thread, const Arguments& a) {
    Timers& timers = thread.process().timers;
    const s64 number = static_cast<s32>(a[0]);
    if (!timers.exists(number)) return -EINVAL;
    return thread.space().store(a[1], shown_precisely(timers.get(number))) ? 0 : -EFAULT;
}

s64 sys_timer_getoverrun(Thread& thread, const Arguments& a) {
    Timers& timers = thread.process().timers;
    const s64 number = static_cast<s32>(a[0]);
    return timers.exists(number) ? timers.overrun(number) : -EINVAL;
}

s64 sys_timer_delete(Thread& thread, const Arguments& a) {
    Timers& timers = thread.process().timers;
    const s64 number = static_cast<s32>(a[0]);
    if (!timers.exists(number)) return -EINVAL;
    timers.remove(number);
    return 0;
}

constexpr Call kCalls[] = {
    {SYS_alarm, sys_alarm},
    {SYS_getitimer, sys_getitimer},
    {SYS_setitimer, sys_setitimer},
    {SYS_timer_create, sys_timer_create},
    {SYS_timer_settime, sys_timer_settime},
    {SYS_timer_gettime, sys_timer_gettime},
    {SYS_timer_getoverrun, sys_timer_getoverrun},
    {SYS_timer_delete, sys_timer_delete},
};

}  // namespace

std::span<const Call> timer_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
