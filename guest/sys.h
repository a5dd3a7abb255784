// System calls without a C library: init is one static program of a few kilobytes that starts in
// microseconds on an interpreted CPU, and builds with a bare gcc for x86-64 and for i386.
//
// Every call returns what the kernel returned: a negative errno is an error.
#pragma once

#include <asm/ioctls.h>
#include <asm/termbits.h>
#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/poll.h>
#include <linux/reboot.h>
#include <linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef unsigned long usize;

// From headers that need a C library's types around them.
enum {
    kSigKill = 9,
    kSigChld = 17,
    kSigPipe = 13,
    kSigSetMask = 2,
    kSigBlock = 0,
    kWnohang = 1,
    kAtFdCwd = -100,
    kMsNosuid = 2,
    kMsNodev = 4,
    kMsNoexec = 8,
};

#ifdef __x86_64__
static inline long sys5(long number, long a, long b, long c, long d, long e) {
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}
#else
static inline long sys5(long number, long a, long b, long c, long d, long e) {
    long result;
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                     : "memory");
    return result;
}
#endif

#define SYS(name, ...) SYS_PICK(__VA_ARGS__, SYS5, SYS4, SYS3, SYS2, SYS1)(name, __VA_ARGS__)
#define SYS_PICK(a, b, c, d, e, picked, ...) picked
#define SYS1(name, a) sys5(__NR_##name, (long)(a), 0, 0, 0, 0)
#define SYS2(name, a, b) sys5(__NR_##name, (long)(a), (long)(b), 0, 0, 0)
#define SYS3(name, a, b, c) sys5(__NR_##name, (long)(a), (long)(b), (long)(c), 0, 0)
#define SYS4(name, a, b, c, d) sys5(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), 0)
#define SYS5(name, a, b, c, d, e) \
    sys5(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

static inline usize length_of(const char* text) {
    usize length = 0;
    while (text[length]) length++;
    return length;
}

/// A decimal number; what is no digit ends it.
static inline long number_of(const char* text) {
    long number = 0;
    while (*text >= '0' && *text <= '9') number = number * 10 + (*text++ - '0');
    return number;
}

static inline int same_text(const char* a, const char* b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static inline int has_slash(const char* text) {
    while (*text && *text != '/') text++;
    return *text == '/';
}

// The compiler calls these by itself too.
void* memcpy(void* to, const void* from, usize size);
void* memset(void* to, int value, usize size);
void* memmove(void* to, const void* from, usize size);

/// Ignores a signal, or not any more.
static inline void ignore_signal(int number, int ignored) {
    struct {
        unsigned long handler, flags, restorer;
        u64 mask;
    } action = {(unsigned long)ignored, 0, 0, 0};  // SIG_DFL is 0, SIG_IGN is 1
    SYS(rt_sigaction, number, &action, 0, sizeof(u64));
}

/// Writes all of it, waiting as long as it takes; false on an error.
static inline int write_all(int fd, const void* data, usize size) {
    const u8* at = data;
    while (size) {
        long done = SYS(write, fd, at, size);
        if (done == -EINTR) continue;
        if (done <= 0) return 0;
        at += done;
        size -= (usize)done;
    }
    return 1;
}
