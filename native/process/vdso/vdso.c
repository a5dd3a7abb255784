/* What a program of a process VM finds as its vDSO: the time without a system call. Where the page
 * of the clock is too old, or a clock is not in it, it is a system call after all. */
#include "clock_page.h"

#include <asm/unistd.h>
#include <linux/time_types.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))
#define ALIAS(name) __attribute__((weak, alias(name), visibility("default")))
#define SECOND UINT64_C(1000000000)

enum {
    REALTIME,
    MONOTONIC,
    MONOTONIC_RAW = 4,
    REALTIME_COARSE,
    MONOTONIC_COARSE,
    BOOTTIME,
    TAI = 11,
};

struct timeval_64 {
    int64_t seconds, microseconds;
};
struct time_zone {
    int32_t minutes_west, dst;
};

static long system_call(long number, long first, void* second, uint64_t third) {
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(first), "S"(second), "d"(third)
                     : "rcx", "r11", "memory");
    return result;
}

static uint64_t read_tsc(void) {
    uint32_t low, high;
    /* Not before what was read earlier. */
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

/* Nanoseconds of `clock`; 0: not from here. `tsc`: what was read. */
static uint64_t now(int clock, uint64_t* tsc) {
    const struct pv_clock_page* page = (const struct pv_clock_page*)PV_CLOCK_PAGE;
    uint64_t time;
    uint32_t sequence;
    do {
        while ((sequence = __atomic_load_n(&page->sequence, __ATOMIC_ACQUIRE)) & 1) {
            __builtin_ia32_pause();
        }
        const struct pv_clock_line* line = clock == MONOTONIC_RAW ? &page->raw : &page->monotonic;
        *tsc = read_tsc();
        const uint64_t elapsed = *tsc - line->reference;
        time = 0;
        if (elapsed < page->valid) {
            time = line->base + (elapsed * line->multiplier >> 32);
            if (clock == REALTIME || clock == REALTIME_COARSE) time += page->realtime;
            if (clock == BOOTTIME) time += page->boottime;
            if (clock == TAI) time += page->tai;
        }
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
    } while (__atomic_load_n(&page->sequence, __ATOMIC_RELAXED) != sequence);
    return time;
}

static int known(int clock) {
    const unsigned clocks = 1u << REALTIME | 1u << MONOTONIC | 1u << MONOTONIC_RAW |
                            1u << REALTIME_COARSE | 1u << MONOTONIC_COARSE | 1u << BOOTTIME |
                            1u << TAI;
    return (unsigned)clock < 32 && (clocks >> clock & 1);
}

/* Somebody wants to see each call. */
static int shown(void) {
    const struct pv_clock_page* page = (const struct pv_clock_page*)PV_CLOCK_PAGE;
    return __atomic_load_n(&page->shown, __ATOMIC_RELAXED) != 0;
}

EXPORT int __vdso_clock_gettime(int clock, struct __kernel_timespec* into) {
    uint64_t tsc = 0;
    const uint64_t time = known(clock) && !shown() ? now(clock, &tsc) : 0;
    /* (The monitor looks at the TSC that we saw: is it the one it thinks of?) */
    if (time == 0) return (int)system_call(__NR_clock_gettime, clock, into, tsc);
    into->tv_sec = (int64_t)(time / SECOND);
    into->tv_nsec = (int64_t)(time % SECOND);
    return 0;
}

EXPORT int __vdso_gettimeofday(struct timeval_64* into, struct time_zone* zone) {
    if (shown()) return (int)system_call(__NR_gettimeofday, (long)into, zone, 0);
    if (into != NULL) {
        struct __kernel_timespec time;
        const int error = __vdso_clock_gettime(REALTIME, &time);
        if (error != 0) return error;
        into->seconds = time.tv_sec;
        into->microseconds = time.tv_nsec / 1000;
    }
    if (zone != NULL) zone->minutes_west = zone->dst = 0;
    return 0;
}

EXPORT int64_t __vdso_time(int64_t* into) {
    struct __kernel_timespec time;
    if (shown()) return system_call(__NR_time, (long)into, NULL, 0);
    const int error = __vdso_clock_gettime(REALTIME, &time);
    if (error != 0) return error;
    if (into != NULL) *into = time.tv_sec;
    return time.tv_sec;
}

EXPORT int __vdso_clock_getres(int clock, struct __kernel_timespec* into) {
    if (!known(clock) || shown()) return (int)system_call(__NR_clock_getres, clock, into, 0);
    if (into != NULL) {
        into->tv_sec = 0;
        into->tv_nsec = 1;
    }
    return 0;
}

/* A thread may have moved by the time it knows where it was: CPU 0 is as good an answer as any. */
EXPORT long __vdso_getcpu(uint32_t* cpu, uint32_t* node, void* unused) {
    (void)unused;
    if (shown()) return system_call(__NR_getcpu, (long)cpu, node, 0);
    if (cpu != NULL) *cpu = 0;
    if (node != NULL) *node = 0;
    return 0;
}

ALIAS("__vdso_clock_gettime") int clock_gettime(int clock, struct __kernel_timespec* into);
ALIAS("__vdso_gettimeofday") int gettimeofday(struct timeval_64* into, struct time_zone* zone);
ALIAS("__vdso_time") int64_t time(int64_t* into);
ALIAS("__vdso_clock_getres") int clock_getres(int clock, struct __kernel_timespec* into);
ALIAS("__vdso_getcpu") long getcpu(uint32_t* cpu, uint32_t* node, void* unused);
