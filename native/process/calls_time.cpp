// Time, and randomness.
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

constexpr s64 kSecond = 1'000'000'000;

u64 host_time(clockid_t clock) {
    timespec now{};
    ::clock_gettime(clock, &now);
    return static_cast<u64>(now.tv_sec * kSecond + now.tv_nsec);
}

timespec timespec_of(u64 time) {
    return {static_cast<time_t>(time / kSecond), static_cast<long>(time % kSecond)};
}

bool is_valid(const timespec& time) {
    return time.tv_sec >= 0 && time.tv_nsec >= 0 && time.tv_nsec < kSecond;
}

// Nanoseconds of one of the program's clocks; nothing: there is no such clock. (The coarse ones are
// as good as the others, as in the vDSO.)
std::optional<u64> read_clock(const Thread& thread, u64 clock) {
    switch (static_cast<clockid_t>(clock)) {
        case CLOCK_REALTIME:
        case CLOCK_REALTIME_COARSE:
            return host_time(CLOCK_REALTIME);
        case CLOCK_MONOTONIC:
        case CLOCK_MONOTONIC_COARSE:
            return host_time(CLOCK_MONOTONIC);
        case CLOCK_MONOTONIC_RAW:
        case CLOCK_BOOTTIME:
        case CLOCK_TAI:
            return host_time(static_cast<clockid_t>(clock));
        case CLOCK_THREAD_CPUTIME_ID:
            return thread.cpu_time();
        case CLOCK_PROCESS_CPUTIME_ID: {
            u64 sum = thread.process().cpu_time;
            for (const Thread* one : thread.process().threads) sum += one->cpu_time();
            return sum;
        }
        default:
            return std::nullopt;
    }
}

s64 sys_clock_gettime(Thread& thread, const Arguments& a) {
    thread.vm().clock_page().confirm(a[2]);  // the vDSO tells what it saw
    const auto time = read_clock(thread, a[0]);
    if (!time) return -EINVAL;
    return thread.space().store(a[1], timespec_of(*time)) ? 0 : -EFAULT;
}

s64 sys_clock_getres(Thread& thread, const Arguments& a) {
    if (!read_clock(thread, a[0])) return -EINVAL;
    const timespec step = timespec_of(1);
    return a[1] == 0 || thread.space().store(a[1], step) ? 0 : -EFAULT;
}

s64 sys_gettimeofday(Thread& thread, const Arguments& a) {
    timeval now{};
    ::gettimeofday(&now, nullptr);
    const struct timezone zone{};
    if (a[0] != 0 && !thread.space().store(a[0], now)) return -EFAULT;
    return a[1] == 0 || thread.space().store(a[1], zone) ? 0 : -EFAULT;
}

s64 sys_time(Thread& thread, const Arguments& a) {
    const s64 now = ::time(nullptr);
    return a[0] == 0 || thread.space().store(a[0], now) ? now : -EFAULT;
}

// (In a process VM there is one CPU, whatever it runs on.)
s64 sys_getcpu(Thread& thread, const Arguments& a) {
    for (u64 address : {a[0], a[1]}) {
        if (address != 0 && !thread.space().store(address, u32{0})) return -EFAULT;
    }
    return 0;
}

s64 sys_times(Thread& thread, const Arguments& a) {
    const u64 zero[4]{};
    return a[0] == 0 || thread.space().store(a[0], zero) ? 0 : -EFAULT;
}

// `left`: address of what is left of the time when it is interrupted; 0: none.
s64 sleep_for(Thread& thread, const timespec& wanted, u64 left) {
    s64 time = 0;
    if (!to_nanoseconds(wanted, time)) return -EINVAL;
    if (thread.wait(-1, 0, time)) return 0;
    const s64 rest = *thread.signals.waits_until - now(CLOCK_MONOTONIC);
    const timespec shown = timespec_of(static_cast<u64>(std::max<s64>(0, rest)));
    return left == 0 || thread.space().store(left, shown) ? -EINTR : -EFAULT;
}

s64 sys_nanosleep(Thread& thread, const Arguments& a) {
    timespec wanted;
    return thread.space().load(a[0], wanted) ? sleep_for(thread, wanted, a[1]) : -EFAULT;
}

s64 sys_clock_nanosleep(Thread& thread, const Arguments& a) {
    timespec wanted;
    if (!thread.space().load(a[2], wanted)) return -EFAULT;
    const auto now = read_clock(thread, a[0]);
    if (!now) return -EINVAL;
    if (a[1] & TIMER_ABSTIME) {
        if (!is_valid(wanted)) return -EINVAL;
        const s64 until = std::min<s64>(wanted.tv_sec, 9 * kSecond) * kSecond + wanted.tv_nsec;
        wanted = timespec_of(static_cast<u64>(std::max<s64>(until - static_cast<s64>(*now), 0)));
    }
    return sleep_for(thread, wanted, a[1] & TIMER_ABSTIME ? 0 : a[3]);
}

s64 sys_getrandom(Thread& thread, const Arguments& a) {
    std::vector<u8> bytes(std::min<u64>(a[1], 1 << 20));
    for (std::size_t done = 0; done < bytes.size();) {
        const ssize_t got = ::getrandom(bytes.data() + done, bytes.size() - done, 0);
        if (got < 0) return -errno;
        done += static_cast<std::size_t>(got);
    }
    return thread.space().copy_out(a[0], bytes) ? static_cast<s64>(bytes.size()) : -EFAULT;
}

constexpr Call kCalls[] = {
    {SYS_clock_gettime, sys_clock_gettime},
    {SYS_clock_getres, sys_clock_getres},
    {SYS_gettimeofday, sys_gettimeofday},
    {SYS_time, sys_time},
    {SYS_getcpu, sys_getcpu},
    {SYS_times, sys_times},
    {SYS_nanosleep, sys_nanosleep},
    {SYS_clock_nanosleep, sys_clock_nanosleep},
    {SYS_getrandom, sys_getrandom},
};

}  // namespace

std::span<const Call> time_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
