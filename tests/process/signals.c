// What a program sees of signals: each topic prints the same in a process VM as outside.
#define _GNU_SOURCE
#include <errno.h>
#include <fenv.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define AUTODISARM (1u << 31)

static void handle(int number, void (*handler)(int, siginfo_t*, void*), int flags) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = flags | SA_SIGINFO};
    if (sigaction(number, &action, 0) != 0) perror("sigaction");
}

static void block(int how, int number) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    sigprocmask(how, &set, 0);
}

static int blocked(int number) {
    sigset_t set;
    sigprocmask(SIG_BLOCK, 0, &set);
    return sigismember(&set, number);
}

static void start_timer(int which, long microseconds, long interval) {
    struct itimerval timer = {.it_value = {microseconds / 1000000, microseconds % 1000000},
                              .it_interval = {interval / 1000000, interval % 1000000}};
    if (setitimer(which, &timer, 0) != 0) perror("setitimer");
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static volatile sig_atomic_t count;
static void counts(int number, siginfo_t* info, void* context) {
    ++count;
}

static void report(const char* what, long result) {
    printf("%s: %ld %d count %d\n", what, result, result < 0 ? errno : 0, count);
}

// --- A program that makes no system calls --------------------------------------------------------

static void spin(void) {
    const int clocks[] = {ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF};
    const int numbers[] = {SIGALRM, SIGVTALRM, SIGPROF};
    for (int n = 0; n < 3; ++n) {
        handle(numbers[n], counts, 0);
        count = 0;
        start_timer(clocks[n], 10000, 10000);
        while (count < 5) {
        }
        start_timer(clocks[n], 0, 0);
        printf("timer %d: five\n", n);
    }
}

// --- The frame -----------------------------------------------------------------------------------

static void shows_frame(int number, siginfo_t* info, void* context) {
    ucontext_t* user = context;
    greg_t* registers = user->uc_mcontext.gregs;
    uint64_t mask;
    memcpy(&mask, &user->uc_sigmask, sizeof mask);
    const uint32_t* fpu = (const uint32_t*)user->uc_mcontext.fpregs;
    int good = 1;
    printf("signal %d code %d pid %d uid %d\n", number, info->si_code, info->si_pid == getpid(),
           info->si_uid == getuid());
    printf("flags %lx link %p mask %lx\n", user->uc_flags & ~1, user->uc_link, mask);
    printf("stack %d %d\n", user->uc_stack.ss_flags, user->uc_stack.ss_size != 0);
    printf("r12 %llx rbx %llx rax %lld\n", registers[REG_R12], registers[REG_RBX],
           registers[REG_RAX]);
    printf("vector %lld error %lld cr2 %lld old %llx\n", registers[REG_TRAPNO], registers[REG_ERR],
           registers[REG_CR2], registers[REG_OLDMASK]);
    printf("below %d\n", (greg_t)context < registers[REG_RSP] - 128);
    printf("aligned %d %d\n", (int)((uintptr_t)fpu % 64), (int)((uintptr_t)context % 16));
    printf("order %d %d\n", (void*)info > context, (void*)fpu >= (void*)(info + 1));
    if (user->uc_flags & 1) {  // the CPU has XSAVE
        good &= fpu[116] == 0x46505853 && fpu[117] == fpu[120] + 4;
        good &= *(uint32_t*)((char*)fpu + fpu[120]) == 0x46505845;
    }
    printf("fpu %d\n", good);
    printf("fcw %x mxcsr %x\n", fpu[0] & 0xffff, fpu[6]);
    uint16_t control;
    uint32_t mxcsr;
    asm volatile("fnstcw %0; stmxcsr %1" : "=m"(control), "=m"(mxcsr));
    printf("here %x %x\n", control, mxcsr);
    // What the program finds when it goes on.
    registers[REG_R12] = 77;
    memset((char*)fpu + 160 + 16 * 9, 0x5a, 16);
    for (int n = 0; n < 16; ++n) asm volatile("pcmpeqb %xmm0, %xmm0; pcmpeqb %xmm9, %xmm9");
    asm volatile("fninit; fldpi; fldpi");
}

static void frame(void) {
    handle(SIGUSR1, shows_frame, 0);
    block(SIG_BLOCK, SIGUSR2);
    uint32_t mxcsr = 0x3f80, after_mxcsr;
    uint16_t control = 0x27f, after_control;
    uint64_t after = 0;
    unsigned char xmm9[16], xmm8[16];
    long result = SYS_tgkill;
    asm volatile(
        "ldmxcsr %[mxcsr]; fldcw %[control]; mov $0x1234, %%r12; pcmpeqb %%xmm8, %%xmm8;"
        "psrlq $5, %%xmm8; pxor %%xmm9, %%xmm9; mov $0x77, %%ebx; fld1; syscall;"
        "mov %%r12, %[after]; movups %%xmm8, %[xmm8]; movups %%xmm9, %[xmm9];"
        "stmxcsr %[after_mxcsr]; fnstcw %[after_control]; fstp %%st(0)"
        : "+a"(result), [after] "=m"(after), [xmm8] "=m"(xmm8), [xmm9] "=m"(xmm9),
          [after_mxcsr] "=m"(after_mxcsr), [after_control] "=m"(after_control)
        : "D"(getpid()), "S"(gettid()), "d"(SIGUSR1), [mxcsr] "m"(mxcsr), [control] "m"(control)
        : "rbx", "rcx", "r11", "r12", "xmm8", "xmm9", "memory");
    printf("after: %ld %lu %x %x %x %x\n", result, after, xmm8[7], xmm9[3], after_mxcsr,
           after_control);
    mxcsr = 0x1f80;
    asm volatile("ldmxcsr %0; fninit" ::"m"(mxcsr));
}

// --- Exceptions ----------------------------------------------------------------------------------

static sigjmp_buf escape;
static void escapes(int number, siginfo_t* info, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    printf("signal %d code %d errno %d vector %lld error %lld", number, info->si_code,
           info->si_errno, registers[REG_TRAPNO], registers[REG_ERR]);
    if (number == SIGSEGV && info->si_code != SI_KERNEL) {
        printf(" address %d", (greg_t)info->si_addr == registers[REG_CR2]);
    } else if (info->si_code != SI_KERNEL) {
        printf(" at %d", (greg_t)info->si_addr == registers[REG_RIP]);
    }
    printf("\n");
    siglongjmp(escape, 1);
}

static volatile int zero;
static void exceptions(void) {
    const int numbers[] = {SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGBUS};
    for (int n = 0; n < 5; ++n) handle(numbers[n], escapes, 0);
    static char data[64];
    char* page = mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* nothing = mmap(0, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(mmap(0, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096);
    if (!sigsetjmp(escape, 1)) *(volatile int*)8 = 1;
    if (!sigsetjmp(escape, 1)) printf("%d\n", *(volatile int*)8);
    (void)*(volatile char*)page;
    if (!sigsetjmp(escape, 1)) *(volatile char*)page = 1;
    if (!sigsetjmp(escape, 1)) printf("%d\n", *(volatile char*)nothing);
    if (!sigsetjmp(escape, 1)) ((void (*)(void))data)();
    if (!sigsetjmp(escape, 1)) ((void (*)(void))16)();
    if (!sigsetjmp(escape, 1))
        asm volatile("mov $1, %%rax; ror $1, %%rax; mov (%%rax), %%al" ::: "rax");
    if (!sigsetjmp(escape, 1)) asm volatile("idivl %0" ::"m"(zero), "a"(1), "d"(0));
    if (!sigsetjmp(escape, 1)) asm volatile("ud2");
    if (!sigsetjmp(escape, 1)) asm volatile("int3");
    if (!sigsetjmp(escape, 1)) asm volatile("hlt");
    if (!sigsetjmp(escape, 1)) {
        asm volatile("pushfq; orq $0x100, (%%rsp); popfq; nop; nop" ::: "memory", "cc");
    }
    feenableexcept(FE_ALL_EXCEPT);
    volatile double one = 1, none = 0, big = 1e308;
    volatile long double x87 = 1, no = 0;
    if (!sigsetjmp(escape, 1)) one = one / none;
    feenableexcept(FE_ALL_EXCEPT);
    if (!sigsetjmp(escape, 1)) one = none / none;
    feenableexcept(FE_OVERFLOW);
    if (!sigsetjmp(escape, 1)) one = big * big;
    feclearexcept(FE_ALL_EXCEPT);
    feenableexcept(FE_DIVBYZERO);
    if (!sigsetjmp(escape, 1)) {
        x87 = x87 / no;
        asm volatile("fwait");
    }
    printf("all\n");
}

static void skips(int number, siginfo_t* info, void* context) {
    ++count;
    ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] += 2;  // ud2
}

static void skip(void) {
    handle(SIGILL, skips, 0);
    for (int n = 0; n < 1000; ++n) asm volatile("ud2");
    printf("%d\n", count);
}

static void ends_blocked(void) {
    handle(SIGSEGV, counts, 0);
    block(SIG_BLOCK, SIGSEGV);
    *(volatile int*)8 = 1;
}

static void ends_ignored(void) {
    signal(SIGSEGV, SIG_IGN);
    *(volatile int*)8 = 1;
}

static void ends_without_stack(void) {  // no place for the frame
    handle(SIGUSR1, counts, 0);
    handle(SIGSEGV, counts, 0);
    asm volatile(
        "mov $39, %%eax; syscall; mov %%eax, %%edi; mov $10, %%esi; mov $62, %%eax;"
        "mov $4096, %%esp; syscall; hlt" ::
            : "memory");
}

static void fails_again(int number, siginfo_t* info, void* context) {
    *(volatile int*)16 = 1;
}
static void ends_nested(void) {
    handle(SIGSEGV, fails_again, 0);
    *(volatile int*)8 = 1;
}

// --- Alternate stacks ----------------------------------------------------------------------------

static char other[65536] __attribute__((aligned(16)));
static int inside(void* address) {
    return (char*)address >= other && (char*)address < other + sizeof other;
}

static void on_other(int number, siginfo_t* info, void* context) {
    stack_t now, wanted = {.ss_sp = other, .ss_size = sizeof other};
    char local;
    sigaltstack(0, &now);
    printf("inside %d flags %x", inside(&local), now.ss_flags);
    const int result = sigaltstack(&wanted, 0);
    printf(" change %d %d\n", result, result ? errno : 0);
    if (number == SIGSEGV) siglongjmp(escape, 1);
    if (number == SIGUSR1) raise(SIGUSR2);
}

static int deep(volatile char* before) {
    volatile char room[4096];
    room[0] = *before;
    return deep(room) + room[1];
}

static void stacks(void) {
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other},
            small = {.ss_sp = other, .ss_size = 2047},
            bad = {.ss_sp = other, .ss_size = sizeof other, .ss_flags = 16}, now;
    report("small", sigaltstack(&small, 0));
    report("bad", sigaltstack(&bad, 0));
    report("good", sigaltstack(&stack, 0));
    sigaltstack(0, &now);
    printf("now %d %d\n", now.ss_sp == other, now.ss_flags);
    handle(SIGSEGV, on_other, SA_ONSTACK);
    for (int n = 0; n < 3; ++n) {
        char start = 0;
        if (!sigsetjmp(escape, 1)) deep(&start);
    }
    handle(SIGUSR1, on_other, SA_ONSTACK);
    handle(SIGUSR2, on_other, SA_ONSTACK);
    raise(SIGUSR1);
    stack.ss_flags = AUTODISARM;
    printf("%d\n", sigaltstack(&stack, 0));
    handle(SIGUSR1, on_other, SA_ONSTACK);
    raise(SIGUSR2);
    sigaltstack(0, &now);
    printf("again %x %d\n", now.ss_flags, now.ss_sp == other);
    stack.ss_flags = SS_DISABLE;
    sigaltstack(&stack, 0);
    sigaltstack(0, &now);
    printf("off %x %zu\n", now.ss_flags, now.ss_size);
    raise(SIGUSR2);
}

// --- Handlers in handlers, masks -----------------------------------------------------------------

static int depth;
static void nests(int number, siginfo_t* info, void* context) {
    const int here = ++depth;
    printf("in %d depth %d blocked %d %d %d\n", number, here, blocked(SIGUSR1), blocked(SIGUSR2),
           blocked(SIGHUP));
    if (number == SIGUSR1 && ++count <= 3) raise(SIGUSR1);
    if (number == SIGUSR1 && count <= 3 && here == 1) raise(SIGUSR2);
    printf("out %d depth %d\n", number, here);
    --depth;
}

static void masks(void) {
    for (int flags = 0; flags < 2; ++flags) {
        struct sigaction action = {.sa_sigaction = nests, .sa_flags = SA_SIGINFO}, before;
        if (flags) action.sa_flags |= SA_NODEFER;
        sigaddset(&action.sa_mask, SIGHUP);
        sigaction(SIGUSR1, &action, 0);
        sigaction(SIGUSR2, &action, &before);
        raise(SIGUSR1);
        printf("after: %d %d %d\n", depth, blocked(SIGUSR1), blocked(SIGHUP));
        count = 0;
    }
    handle(SIGHUP, counts, SA_RESETHAND);
    raise(SIGHUP);
    struct sigaction now;
    sigaction(SIGHUP, 0, &now);
    printf("reset %d %d\n", now.sa_handler == SIG_DFL, count);
    // Blocked, then ignored meanwhile.
    handle(SIGUSR1, counts, 0);
    block(SIG_BLOCK, SIGUSR1);
    raise(SIGUSR1);
    raise(SIGUSR1);
    sigset_t pending;
    sigpending(&pending);
    printf("pending %d %d\n", sigismember(&pending, SIGUSR1), sigismember(&pending, SIGUSR2));
    signal(SIGUSR1, SIG_IGN);
    sigpending(&pending);
    printf("pending %d\n", sigismember(&pending, SIGUSR1));
    block(SIG_UNBLOCK, SIGUSR1);
    block(SIG_BLOCK, SIGKILL);
    block(SIG_BLOCK, SIGSTOP);
    printf("%d %d %d\n", count, blocked(SIGKILL), blocked(SIGSTOP));
}

// --- Waits ---------------------------------------------------------------------------------------

static int ends[2];
static void writes(int number, siginfo_t* info, void* context) {
    ++count;
    if (number == SIGUSR2 || count % 2 == 0) (void)!write(ends[1], "x", 1);
}

static void waits(void) {
    char byte;
    (void)!pipe(ends);
    handle(SIGALRM, writes, SA_RESTART);  // the second one makes the read end
    start_timer(ITIMER_REAL, 20000, 20000);
    report("restarted read", read(ends[0], &byte, 1));
    start_timer(ITIMER_REAL, 0, 0);
    handle(SIGALRM, counts, 0);
    start_timer(ITIMER_REAL, 20000, 0);
    report("read", read(ends[0], &byte, 1));
    handle(SIGALRM, counts, SA_RESTART);  // these never begin again
    start_timer(ITIMER_REAL, 20000, 0);
    report("pause", pause());
    start_timer(ITIMER_REAL, 20000, 0);
    report("poll", poll(0, 0, 5000));
    start_timer(ITIMER_REAL, 20000, 0);
    struct timespec wanted = {5, 0}, left = {0, 0};
    report("nanosleep", nanosleep(&wanted, &left));
    printf("left %d\n", left.tv_sec == 4 && left.tv_nsec > 0);
    start_timer(ITIMER_REAL, 20000, 0);
    left.tv_sec = 0;
    errno = clock_nanosleep(CLOCK_MONOTONIC, 0, &wanted, &left);
    printf("clock_nanosleep %d left %d\n", errno, left.tv_sec == 4);
    block(SIG_BLOCK, SIGALRM);
    sigset_t none, alarms;
    sigemptyset(&none);
    sigemptyset(&alarms);
    sigaddset(&alarms, SIGALRM);
    start_timer(ITIMER_REAL, 20000, 0);
    report("sigsuspend", sigsuspend(&none));
    printf("blocked %d\n", blocked(SIGALRM));
    start_timer(ITIMER_REAL, 20000, 0);
    report("ppoll", ppoll(0, 0, &wanted, &none));
    start_timer(ITIMER_REAL, 20000, 0);
    report("ppoll, ready", ppoll(&(struct pollfd){ends[1], POLLOUT}, 1, &wanted, &none));
    siginfo_t info;
    report("sigwaitinfo", sigwaitinfo(&alarms, &info));
    printf("code %d\n", info.si_code);
    wanted.tv_sec = 0;
    wanted.tv_nsec = 20000000;
    report("sigtimedwait", sigtimedwait(&alarms, &info, &wanted));
    // Signals that do nothing do not end a wait.
    handle(SIGUSR1, counts, 0);
    block(SIG_UNBLOCK, SIGALRM);
    signal(SIGALRM, SIG_IGN);
    start_timer(ITIMER_REAL, 10000, 10000);
    const double start = seconds();
    wanted.tv_nsec = 100000000;
    report("nanosleep", nanosleep(&wanted, 0));
    printf("slept %d\n", seconds() - start >= 0.1 && seconds() - start < 2);
}

// --- Queues --------------------------------------------------------------------------------------

static void values(int number, siginfo_t* info, void* context) {
    printf("%d code %d value %d\n", number - SIGRTMIN, info->si_code, info->si_value.sival_int);
}

static void queues(void) {
    const int first = SIGRTMIN;
    for (int n = 0; n < 3; ++n) {
        handle(first + n, values, 0);
        block(SIG_BLOCK, first + n);
    }
    for (int n = 0; n < 9; ++n)
        sigqueue(getpid(), first + 2 - n % 3, (union sigval){.sival_int = n});
    sigset_t set;
    siginfo_t info;
    sigemptyset(&set);
    sigaddset(&set, first + 1);
    printf("waited %d", sigwaitinfo(&set, &info) - first);
    printf(" value %d pid %d\n", info.si_value.sival_int, info.si_pid == getpid());
    // The last one that is pushed is the first to run.
    sigaddset(&set, first);
    sigaddset(&set, first + 2);
    sigprocmask(SIG_UNBLOCK, &set, 0);
    int sent = 0;
    sigprocmask(SIG_BLOCK, &set, 0);
    while (sent < 100000 && sigqueue(getpid(), first, (union sigval){.sival_int = 0}) == 0) ++sent;
    printf("limited %d\n", sent == 100000 || errno == EAGAIN);
    info.si_signo = first;
    info.si_code = SI_USER;
    printf("forged %ld", syscall(SYS_rt_sigqueueinfo, getppid(), first, &info));
    printf(" %d\n", errno);
}

// --- Timers --------------------------------------------------------------------------------------

static void timers(void) {
    struct itimerval value;
    handle(SIGALRM, counts, 0);
    printf("alarm %d", alarm(100));
    printf(" %d", alarm(0));
    printf(" %d\n", alarm(0));
    start_timer(ITIMER_REAL, 1500000, 250000);
    getitimer(ITIMER_REAL, &value);
    printf("left %ld %d every %ld %ld\n", (long)value.it_value.tv_sec, value.it_value.tv_usec > 0,
           (long)value.it_interval.tv_sec, (long)value.it_interval.tv_usec);
    start_timer(ITIMER_REAL, 0, 0);
    getitimer(ITIMER_REAL, &value);
    printf("off %ld %ld\n", (long)value.it_value.tv_sec, (long)value.it_value.tv_usec);

    timer_t timer, none;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    event.sigev_value.sival_int = 42;
    handle(SIGRTMIN, values, 0);
    printf("create %d\n", timer_create(CLOCK_MONOTONIC, &event, &timer));
    struct itimerspec wanted = {.it_value = {0, 10000000}, .it_interval = {0, 5000000}}, now;
    block(SIG_BLOCK, SIGRTMIN);
    printf("set %d\n", timer_settime(timer, 0, &wanted, 0));
    struct timespec rest = {0, 100000000};
    nanosleep(&rest, 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    siginfo_t info;
    sigwaitinfo(&set, &info);
    printf("code %d value %d overrun %d %d\n", info.si_code, info.si_value.sival_int,
           info.si_overrun >= 10, timer_getoverrun(timer) == info.si_overrun);
    timer_gettime(timer, &now);
    printf("now %d %ld\n", now.it_value.tv_nsec > 0, now.it_interval.tv_nsec);
    report("delete", syscall(SYS_timer_delete, timer));
    report("delete", syscall(SYS_timer_delete, timer));

    clock_gettime(CLOCK_REALTIME, &wanted.it_value);  // at a moment
    wanted.it_value.tv_sec += 2;
    wanted.it_interval.tv_nsec = 0;
    event.sigev_notify = SIGEV_NONE;
    timer_create(CLOCK_REALTIME, &event, &none);
    timer_settime(none, TIMER_ABSTIME, &wanted, 0);
    timer_gettime(none, &now);
    printf("absolute %ld %ld\n", now.it_value.tv_sec, now.it_interval.tv_nsec);
    wanted.it_value.tv_sec = 0;
    wanted.it_value.tv_nsec = 1;
    timer_settime(none, 0, &wanted, &now);
    printf("before %ld\n", now.it_value.tv_sec);
    nanosleep(&rest, 0);
    timer_gettime(none, &now);
    printf("over %ld %ld\n", now.it_value.tv_sec, now.it_value.tv_nsec);
    event.sigev_notify = SIGEV_THREAD_ID;
    event._sigev_un._tid = gettid();
    event.sigev_signo = SIGALRM;
    printf("thread %d\n", timer_create(CLOCK_PROCESS_CPUTIME_ID, &event, &timer));
    wanted.it_value.tv_nsec = 20000000;
    timer_settime(timer, 0, &wanted, 0);
    while (count == 0) {
    }
    printf("cpu %d\n", count);
    event._sigev_un._tid = 1;
    printf("stranger %d", timer_create(CLOCK_REALTIME, &event, &timer));
    printf(" %d\n", errno);
}

// --- Mistakes ------------------------------------------------------------------------------------

static void mistakes(void) {
    const long pid = getpid(), bad = 8;
    uint64_t set = 0, action[4] = {0};
    long timer[4] = {0, -1, 0, 0};
    const struct {
        const char* what;
        long number, a, b, c, d;
    } calls[] = {
        {"action 0", SYS_rt_sigaction, 0, 0, 0, 8},
        {"action 65", SYS_rt_sigaction, 65, 0, 0, 8},
        {"action kill", SYS_rt_sigaction, SIGKILL, (long)action, 0, 8},
        {"action kill, read", SYS_rt_sigaction, SIGKILL, 0, (long)action, 8},
        {"action size", SYS_rt_sigaction, SIGUSR1, 0, 0, 16},
        {"action pointer", SYS_rt_sigaction, SIGUSR1, bad, 0, 8},
        {"action pointer", SYS_rt_sigaction, SIGUSR1, 0, bad, 8},
        {"mask how", SYS_rt_sigprocmask, 3, (long)&set, 0, 8},
        {"mask size", SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, 4},
        {"mask pointer", SYS_rt_sigprocmask, SIG_BLOCK, bad, 0, 8},
        {"mask nothing", SYS_rt_sigprocmask, 77, 0, 0, 8},
        {"pending", SYS_rt_sigpending, bad, 8, 0, 0},
        {"pending size", SYS_rt_sigpending, (long)&set, 16, 0, 0},
        {"suspend size", SYS_rt_sigsuspend, (long)&set, 4, 0, 0},
        {"suspend pointer", SYS_rt_sigsuspend, bad, 8, 0, 0},
        {"timedwait size", SYS_rt_sigtimedwait, (long)&set, 0, 0, 4},
        {"timedwait time", SYS_rt_sigtimedwait, (long)&set, 0, (long)timer, 8},
        {"altstack", SYS_sigaltstack, bad, 0, 0, 0},
        {"altstack old", SYS_sigaltstack, 0, bad, 0, 0},
        {"kill signal", SYS_kill, pid, 65, 0, 0},
        {"kill signal", SYS_kill, pid, -1, 0, 0},
        {"kill probe", SYS_kill, pid, 0, 0, 0},
        {"kill nobody", SYS_kill, 99999999, 0, 0, 0},
        {"kill nobody", SYS_kill, -99999999, 9, 0, 0},
        {"kill int min", SYS_kill, (long)INT32_MIN, 9, 0, 0},
        {"tkill", SYS_tkill, 0, 0, 0, 0},
        {"tkill", SYS_tkill, -1, 0, 0, 0},
        {"tkill nobody", SYS_tkill, 99999999, 0, 0, 0},
        {"tgkill", SYS_tgkill, 0, pid, 0, 0},
        {"tgkill other", SYS_tgkill, 99999998, pid, 0, 0},
        {"tgkill self", SYS_tgkill, pid, pid, 0, 0},
        {"tgkill signal", SYS_tgkill, pid, pid, 66, 0},
        {"queue pointer", SYS_rt_sigqueueinfo, pid, SIGUSR1, bad, 0},
        {"itimer which", SYS_setitimer, 3, (long)timer, 0, 0},
        {"itimer time", SYS_setitimer, 0, (long)timer, 0, 0},
        {"itimer pointer", SYS_setitimer, 0, bad, 0, 0},
        {"itimer get", SYS_getitimer, -1, (long)timer, 0, 0},
        {"itimer get", SYS_getitimer, 0, bad, 0, 0},
        {"timer clock", SYS_timer_create, 99, 0, (long)timer, 0},
        {"timer pointer", SYS_timer_create, 0, bad, (long)timer, 0},
        {"timer result", SYS_timer_create, 0, 0, bad, 0},
        {"timer delete", SYS_timer_delete, 1234, 0, 0, 0},
        {"timer set", SYS_timer_settime, 1234, 0, (long)timer, 0},
        {"timer get", SYS_timer_gettime, 1234, (long)timer, 0, 0},
        {"timer overrun", SYS_timer_getoverrun, 1234, 0, 0, 0},
    };
    for (unsigned n = 0; n < sizeof calls / sizeof *calls; ++n) {
        const long result =
            syscall(calls[n].number, calls[n].a, calls[n].b, calls[n].c, calls[n].d);
        printf("%s: %ld %d\n", calls[n].what, result, result < 0 ? errno : 0);
    }
}

// --- Frames that no kernel made ------------------------------------------------------------------

static uint64_t state = 88172645463325252u;
static uint64_t random_word(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static void spoils(int number, siginfo_t* info, void* context) {
    uint64_t* words = (uint64_t*)context - 1;
    const uint64_t interesting[] = {0,
                                    ~(uint64_t)0,
                                    1,
                                    8,
                                    0x100,
                                    1ull << 47,
                                    1ull << 63,
                                    0xffffffff80000000,
                                    0xffffffff80003000,
                                    random_word()};
    for (int n = 1 + random_word() % 3; n > 0; --n) {
        words[1 + random_word() % 118] = interesting[random_word() % 10];
    }
    // (Where the signals go that this makes, they go.)
    ((ucontext_t*)context)->uc_sigmask.__val[0] = 0;
    ((ucontext_t*)context)->uc_stack = (stack_t){.ss_sp = other, .ss_size = sizeof other};
}
static void survives(int number, siginfo_t* info, void* context) {
    siglongjmp(escape, 1);
}

static void spoil(void) {
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
    handle(SIGUSR1, spoils, 0);
    const int numbers[] = {SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGBUS, SIGSYS};
    for (int n = 0; n < 6; ++n) handle(numbers[n], survives, SA_ONSTACK | SA_NODEFER);
    for (volatile int n = 0; n < 2000; ++n) {
        stack.ss_flags = 0;
        sigaltstack(&stack, 0);
        if (!sigsetjmp(escape, 1)) syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1);
    }
    printf("still here\n");
}

// --- Threads -------------------------------------------------------------------------------------

static __thread volatile int mine;
static volatile int hits[4], stage;
static void hit(int number, siginfo_t* info, void* context) {
    ++hits[mine];
}

static void* thread(void* argument) {
    mine = (int)(intptr_t)argument;
    __atomic_fetch_add(&stage, 1, __ATOMIC_SEQ_CST);
    while (stage != 9) {
        if (mine == 3) poll(0, 0, 10);
    }
    return 0;
}

static void threads(void) {
    pthread_t all[4];
    handle(SIGUSR1, hit, 0);
    handle(SIGUSR2, hit, 0);
    block(SIG_BLOCK, SIGUSR1);
    for (intptr_t n = 1; n < 4; ++n) pthread_create(&all[n], 0, thread, (void*)n);
    block(SIG_BLOCK, SIGUSR1);
    while (stage != 3) poll(0, 0, 1);
    for (int n = 1; n < 4; ++n) {
        pthread_kill(all[n], SIGUSR2);
        while (hits[n] == 0) poll(0, 0, 1);
    }
    printf("each %d %d %d %d\n", hits[0], hits[1], hits[2], hits[3]);
    pthread_kill(all[1], SIGUSR1);  // blocked there: it stays
    poll(0, 0, 20);
    printf("blocked %d %d\n", hits[1], hits[0]);
    stage = 9;
    for (int n = 1; n < 4; ++n) pthread_join(all[n], 0);
    printf("pending %d\n", ({
               sigset_t set;
               sigpending(&set);
               sigismember(&set, SIGUSR1);
           }));
}

static void* sleeper(void* argument) {
    block(SIG_UNBLOCK, SIGUSR1);
    stage = 1;
    printf("pause %d\n", pause());
    return 0;
}
static void choice(void) {  // a signal of the process finds the thread that takes it
    pthread_t other_thread;
    handle(SIGUSR1, hit, 0);
    block(SIG_BLOCK, SIGUSR1);
    pthread_create(&other_thread, 0, sleeper, 0);
    while (stage != 1) poll(0, 0, 1);
    poll(0, 0, 50);
    kill(getpid(), SIGUSR1);
    pthread_join(other_thread, 0);
    printf("%d\n", hits[0]);
}

// --- Children ------------------------------------------------------------------------------------

static void family(void) {
    int status = 0;
    handle(SIGUSR1, counts, 0);
    handle(SIGCHLD, values, 0);
    pid_t child = fork();
    if (child == 0) {
        raise(SIGUSR1);  // its handlers are its parent's
        printf("child %d\n", count);
        fflush(stdout);
        for (;;) pause();
    }
    poll(0, 0, 100);
    kill(child, SIGTERM);
    while (waitpid(child, &status, 0) < 0) {
    }
    printf("signalled %d %d\n", WIFSIGNALED(status), WTERMSIG(status));
    printf("gone %d", kill(child, 0));
    printf(" %d\n", errno);
    signal(SIGCHLD, SIG_DFL);
    child = fork();
    if (child == 0) {
        for (;;) pause();
    }
    kill(child, SIGSTOP);
    waitpid(child, &status, WUNTRACED);
    printf("stopped %d %d\n", WIFSTOPPED(status), WSTOPSIG(status));
    kill(child, SIGCONT);
    waitpid(child, &status, WCONTINUED);
    printf("continued %d\n", WIFCONTINUED(status));
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    printf("killed %d\n", WTERMSIG(status));
}

// --- Copies --------------------------------------------------------------------------------------

void __attribute__((noinline)) marked(void) {
    asm volatile("");
}

static void copied(void) {  // its timer and what waits for it are there afterwards
    sigset_t pending;
    handle(SIGALRM, counts, 0);
    block(SIG_BLOCK, SIGUSR1);
    kill(getpid(), SIGUSR1);
    start_timer(ITIMER_REAL, 20000, 20000);
    marked();
    while (count < 3) {
    }
    start_timer(ITIMER_REAL, 0, 0);
    sigpending(&pending);
    printf("three %d\n", sigismember(&pending, SIGUSR1));
}

// --- The end -------------------------------------------------------------------------------------

static void sends(const char* number) {
    setvbuf(stdout, 0, _IONBF, 0);
    const int result = kill(getpid(), atoi(number));
    printf("alive %d\n", result);
}

int main(int argc, char** argv) {
    static const struct {
        const char* name;
        void (*run)(void);
    } topics[] = {
        {"spin", spin},
        {"frame", frame},
        {"exceptions", exceptions},
        {"skip", skip},
        {"ends_blocked", ends_blocked},
        {"ends_ignored", ends_ignored},
        {"ends_without_stack", ends_without_stack},
        {"ends_nested", ends_nested},
        {"stacks", stacks},
        {"masks", masks},
        {"waits", waits},
        {"queues", queues},
        {"timers", timers},
        {"mistakes", mistakes},
        {"spoil", spoil},
        {"threads", threads},
        {"choice", choice},
        {"family", family},
        {"copied", copied},
    };
    setvbuf(stdout, 0, _IOFBF, 1 << 16);
    if (argc == 3) sends(argv[2]);
    for (unsigned n = 0; n < sizeof topics / sizeof *topics; ++n) {
        if (argc == 2 && strcmp(argv[1], topics[n].name) == 0) {
            topics[n].run();
            return 0;
        }
    }
    return argc == 3 ? 0 : 2;
}
