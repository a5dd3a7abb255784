// What a program can try at its CPU: every interrupt, gates and selectors of all numbers,
// instructions of a kernel's, and every byte of the pages that stand in for one. Each ends in a
// signal, or in nothing; never at another privilege level, nor with registers that were not the
// program's.
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile int caught;
static uint8_t* code;  // below 4 GB, so that far pointers of 32 bits reach it
static int tried, faulted;
static uint64_t left_in_rax;

static void on_signal(int number) {
    caught = number;
    siglongjmp(back, 1);
}

// It is still an ordinary program.
static void check(const char* what, unsigned detail) {
    uint64_t flags;
    uint16_t cs, ss;
    __asm__ volatile("pushfq; pop %0; mov %%cs, %1; mov %%ss, %2"
                     : "=r"(flags), "=r"(cs), "=r"(ss));
    if ((cs & 3) != 3 || (ss & 3) != 3 || (flags & 0x3000) != 0 || !(flags & 0x200)) {
        printf("%s %#x: cs %x, ss %x, flags %lx\n", what, detail, cs, ss, (unsigned long)flags);
    }
    if (syscall(SYS_getpid) != 1000) printf("%s %#x: getpid() is not served\n", what, detail);
    ++tried;
    faulted += caught != 0;
}

// Runs what is in `code`, as a function; all of its registers may change.
static void run(const char* what, unsigned detail) {
    caught = 0;
    if (sigsetjmp(back, 1) == 0) {
        uint8_t* at = code;
        left_in_rax = SYS_getpid;
        __asm__ volatile(
            "push %%rbp\n sub $256, %%rsp\n mov %%rsp, %%rbp\n call *%0\n"
            "mov %%rbp, %%rsp\n add $256, %%rsp\n pop %%rbp"
            : "+c"(at), "+a"(left_in_rax)
            : "d"(0ul)
            : "rbx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory",
              "cc");
    }
    check(what, detail);
}

static void run_bytes(const char* what, unsigned detail, const void* bytes, size_t size) {
    memset(code, 0xc3, 64);  // ret
    memcpy(code, bytes, size);
    run(what, detail);
}

static void interrupts(void) {
    for (unsigned n = 0; n < 256; ++n) {
        const uint8_t bytes[] = {0xcd, (uint8_t)n};
        run_bytes("int", n, bytes, sizeof bytes);
        // (A KVM that runs programs natively may have a use for one of its own.)
        if (caught == 0 && left_in_rax == 1000) printf("int %#x was served\n", n);
    }
}

// Far calls, jumps and returns by way of any selector, and what happens when segment registers hold
// them.
static void selectors(void) {
    for (unsigned selector = 0; selector < 0x120; ++selector) {
        // A far pointer at code + 128, to code + 64, where there is a far return.
        const uint32_t target = (uint32_t)(uintptr_t)(code + 64);
        memcpy(code + 128, &target, 4);
        memcpy(code + 132, &selector, 2);
        memset(code + 64, 0xc3, 64);
        memcpy(code + 64, "\xcb", 1);
        const uint32_t pointer = (uint32_t)(uintptr_t)(code + 128);
        uint8_t call[7] = {0xff, 0x1c, 0x25};  // lcall *pointer
        memcpy(call + 3, &pointer, 4);
        run_bytes("far call", selector, call, sizeof call);
        call[1] = 0x2c;  // ljmp *pointer
        code[64] = 0xc3;
        run_bytes("far jump", selector, call, sizeof call);
        uint8_t frame[] = {0x68, 0, 0, 0, 0, 0x68, 0, 0, 0, 0, 0x48, 0xcb};  // two pushes, lretq
        memcpy(frame + 1, &selector, 4);
        memcpy(frame + 6, &target, 4);
        run_bytes("far return", selector, frame, sizeof frame);
        const uint8_t loads[][5] = {
            {0x89, 0xd8, 0x8e, 0xd8}, {0x89, 0xd8, 0x8e, 0xc0}, {0x89, 0xd8, 0x8e, 0xe8}};
        for (unsigned n = 0; n < 3; ++n) {  // ds, es, gs; then back to none
            uint8_t bytes[] = {0xb8, 0, 0, 0, 0, 0x8e, loads[n][3], 0x31, 0xc0, 0x8e, loads[n][3]};
            memcpy(bytes + 1, &selector, 4);
            run_bytes("segment register", selector, bytes, sizeof bytes);
        }
        uint8_t stack[] = {0xb8, 0, 0, 0, 0, 0x8c, 0xd3, 0x8e, 0xd0, 0x8e, 0xd3};  // ss, and back
        memcpy(stack + 1, &selector, 4);
        run_bytes("stack segment", selector, stack, sizeof stack);
        for (unsigned n = 0; n < 4; ++n) {  // lar, lsl, verr, verw only tell of it
            static const uint8_t ask[][3] = {
                {0x0f, 0x02, 0xc8}, {0x0f, 0x03, 0xc8}, {0x0f, 0x00, 0xe0}, {0x0f, 0x00, 0xe8}};
            uint8_t bytes[] = {0xb8, 0, 0, 0, 0, ask[n][0], ask[n][1], ask[n][2]};
            memcpy(bytes + 1, &selector, 4);
            run_bytes("question", selector, bytes, sizeof bytes);
        }
    }
}

static void instructions(void) {
    static const struct {
        const char *what, *bytes;
        unsigned size, harmless;  // it may pass, without an effect
    } kAll[] = {
        {"sysenter", "\x0f\x34", 2, 0},
        {"sysexit", "\x0f\x35", 2, 0},
        {"sysexitq", "\x48\x0f\x35", 3, 0},
        {"sysret", "\x0f\x07", 2, 0},
        {"sysretq", "\x48\x0f\x07", 3, 0},
        {"iret", "\xcf", 1, 0},
        {"hlt", "\xf4", 1, 0},
        {"cli", "\xfa", 1, 0},
        {"sti", "\xfb", 1, 0},
        {"clts", "\x0f\x06", 2, 0},
        {"swapgs", "\x0f\x01\xf8", 3, 0},
        {"lgdt", "\x0f\x01\x14\x24", 4, 0},
        {"lidt", "\x0f\x01\x1c\x24", 4, 0},
        {"lldt", "\x0f\x00\xd0", 3, 0},
        {"ltr", "\x0f\x00\xd8", 3, 0},
        {"lmsw", "\x0f\x01\xf0", 3, 0},
        {"invlpg", "\x0f\x01\x3c\x24", 4, 0},
        {"invd", "\x0f\x08", 2, 0},
        {"wbinvd", "\x0f\x09", 2, 0},
        {"rdmsr", "\x0f\x32", 2, 0},
        {"wrmsr", "\x0f\x30", 2, 0},
        {"rdpmc", "\x0f\x33", 2, 1},
        {"xsetbv", "\x0f\x01\xd1", 3, 0},
        {"mov to cr0", "\x0f\x22\xc0", 3, 0},
        {"mov to cr3", "\x0f\x22\xd8", 3, 0},
        {"mov to cr4", "\x0f\x22\xe0", 3, 0},
        {"mov to cr8", "\x44\x0f\x22\xc0", 4, 0},
        {"mov from cr0", "\x0f\x20\xc0", 3, 0},
        {"mov to dr7", "\x0f\x23\xf8", 3, 0},
        {"mov from dr6", "\x0f\x21\xf0", 3, 0},
        {"in", "\xec", 1, 0},
        {"inl", "\xed", 1, 0},
        {"out", "\xee", 1, 0},
        {"outl", "\xef", 1, 0},
        {"rep outsb", "\xf3\x6e", 2, 0},
        {"rep insb", "\xf3\x6c", 2, 0},
        {"out to the port of system calls", "\xe6\x80", 2, 0},
        {"vmcall", "\x0f\x01\xc1", 3, 1},
        {"vmmcall", "\x0f\x01\xd9", 3, 1},
        {"vmlaunch", "\x0f\x01\xc2", 3, 0},
        {"vmrun", "\x0f\x01\xd8", 3, 0},
        {"stgi", "\x0f\x01\xdc", 3, 0},
        {"skinit", "\x0f\x01\xde", 3, 0},
        {"monitor", "\x0f\x01\xc8", 3, 0},
        {"mwait", "\x0f\x01\xc9", 3, 0},
        {"rsm", "\x0f\xaa", 2, 0},
        {"getsec", "\x0f\x37", 2, 0},
        {"into", "\xce", 1, 0},
        {"popf with everything", "\x68\xff\x7e\x24\x00\x9d\x9c\x58\x6a\x02\x9d\xfb", 12, 0},
        {"cpuid", "\x53\x0f\xa2\x5b", 4, 1},
        {"sgdt", "\x0f\x01\x44\x24\xc0", 5, 1},
        {"sidt", "\x0f\x01\x4c\x24\xc0", 5, 1},
        {"str", "\x0f\x00\xc8", 3, 1},
        {"sldt", "\x0f\x00\xc0", 3, 1},
        {"smsw", "\x0f\x01\xe0", 3, 1},
    };
    for (unsigned n = 0; n < sizeof kAll / sizeof *kAll; ++n) {
        run_bytes(kAll[n].what, n, kAll[n].bytes, kAll[n].size);
        if (caught == 0 && !kAll[n].harmless) printf("%s went through\n", kAll[n].what);
    }
}

// What lies in the upper half, from each byte on: a system call, or a signal.
static void stand_in(void) {
    for (uint64_t at = 0xffffffff80000000; at < 0xffffffff80008000;) {
        // mov $back, %ecx; mov $at, %rbx; jmp *%rbx; back: ret
        uint8_t bytes[] = {0xb9, 0, 0, 0, 0, 0x48, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe3, 0xc3};
        const uint32_t returns = (uint32_t)(uintptr_t)(code + 17);
        memcpy(bytes + 1, &returns, 4);
        memcpy(bytes + 7, &at, 8);
        run_bytes("upper half", (unsigned)at, bytes, sizeof bytes);
        // (And reading and writing.)
        const uint8_t look[] = {0x48, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0x88, 0x03};
        memcpy(bytes, look, sizeof look);
        memcpy(bytes + 2, &at, 8);
        bytes[sizeof look] = 0xc3;
        run_bytes("upper half, written", (unsigned)at, bytes, sizeof bytes);
        if (caught == 0) printf("%lx can be written to\n", (unsigned long)at);
        at += at % 4096 < 48 ? 1 : 509;
    }
}

int main(void) {
    static char stack[65536];
    const stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK | SA_NODEFER};
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    sigaltstack(&other, NULL);
    for (unsigned n = 0; n < 5; ++n) sigaction(signals[n], &action, NULL);
    code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (code == MAP_FAILED) return 1;
    interrupts();
    instructions();
    selectors();
    stand_in();
    fprintf(stderr, "%d tried, %d ended in a signal\n", tried, faulted);
    printf("still here\n");
    return 0;
}
