// Programs that mean harm with more than one thread or process, one for each word given:
//   race      calls whose arguments another thread changes meanwhile
//   truncate  a mapped file that is shortened under the mapping
//   exhaust   descriptors, memory, threads and processes until there are no more
//   edges     signals that arrive with the stack at every edge of the address space
//   spread    processes that make processes, until nobody gets another one
//   strings   more arguments than a program can have
// Each ends by saying so.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile int done;
static char* shared;  // one page, which both threads use, and a hole behind it

static void* change(void* unused) {
    (void)unused;
    static const char* const paths[] = {"/tmp/x", "/etc/../../../etc/passwd", "/", "/tmp/../tmp/y"};
    uint64_t* words = (uint64_t*)shared;
    for (unsigned n = 0; !done; ++n) {
        strcpy(shared + 2048, paths[n % 4]);
        words[0] = n % 3   ? (uint64_t)shared + 1024
                   : n % 7 ? 0xffffffff80000000
                           : (uint64_t)shared + 4000;
        words[1] = n % 2 ? 64 : n % 5 ? ~(uint64_t)0 : 0x7fffffff;
        words[2] = n % 3 ? (uint64_t)shared + 4090 : 0x10;
        words[3] = n % 2 ? 6 : 4096;
        if (n % 64 == 0) mprotect(shared, 4096, PROT_READ);
        if (n % 64 == 0) mprotect(shared, 4096, PROT_READ | PROT_WRITE);
        if (n % 512 == 0) {
            mmap(shared, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                 0);
        }
    }
    return NULL;
}

static void race(void) {
    shared = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(shared + 4096, 4096);
    const int file = open("/tmp/file", O_RDWR | O_CREAT, 0644);
    if (ftruncate(file, 8192)) return;
    pthread_t other;
    pthread_create(&other, NULL, change, NULL);
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        for (int n = 0; n < 20; ++n) {
            const int opened = open(shared + 2048, O_RDWR | O_CREAT, 0644);
            if (opened > 2) close(opened);
            preadv(file, (struct iovec*)shared, 2, 0);
            pwritev(file, (struct iovec*)shared, 2, 0);
            read(file, shared + 1024, 4096);
            stat(shared + 2048, (struct stat*)(shared + 3968));
            syscall(SYS_getcwd, shared + 2048, 2048);  // (glibc touches the memory itself)
            poll((struct pollfd*)shared, 4, 0);
            readlink(shared + 2048, shared + 1024, 2048);
            syscall(SYS_rt_sigaction, SIGUSR2, NULL, shared + 512, 8);
            syscall(SYS_getdents64, file, shared, 4096);
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - start.tv_sec < 2);
    done = 1;
    pthread_join(other, NULL);
}

static void truncate_mapped(void) {
    const int file = open("/tmp/mapped", O_RDWR | O_CREAT, 0644);
    if (ftruncate(file, 8192)) return;
    for (int shared_too = 0; shared_too < 2; ++shared_too) {
        char* at = mmap(NULL, 8192, PROT_READ, shared_too ? MAP_SHARED : MAP_PRIVATE, file, 0);
        if (at == MAP_FAILED) continue;
        if (ftruncate(file, 0)) return;
        char copy[100];
        const int other = open("/dev/null", O_WRONLY);
        // By the monitor, for the program; whether there is still something is its business.
        if (write(other, at, 100) < 0 && errno != EFAULT) printf("write: %s\n", strerror(errno));
        if (open(at, O_RDONLY) >= 0) printf("what was opened?\n");
        const pid_t child = fork();
        if (child == 0) {
            memcpy(copy, at + 4096, sizeof copy);
            _exit(copy[0] == 0 ? 0 : 1);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (!(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS) && status != 0) {
            printf("a page that is gone: %x\n", status);
        }
        if (ftruncate(file, 8192)) return;
    }
}

static void* stay(void* unused) {
    (void)unused;
    while (!done) usleep(1000);
    return NULL;
}

static void exhaust(void) {
    int files = 0, ends[2];
    while (open("/dev/null", O_RDONLY) >= 0) ++files;
    if (errno != EMFILE) printf("open: %s\n", strerror(errno));
    for (int fd = 3; fd < 100000; ++fd) {
        if (close(fd) && errno == EBADF && fd > files + 2) break;
    }
    while (pipe(ends) == 0) ++files;
    if (errno != EMFILE && errno != ENFILE) printf("pipe: %s\n", strerror(errno));
    for (int fd = 3; fd < 100000; ++fd) {
        if (close(fd) && fd > files + 2) break;
    }
    void *last = NULL, *next;
    for (int maps = 0; maps < 1000000; ++maps, last = next) {
        next = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (next == MAP_FAILED) break;
    }
    if (errno != ENOMEM) printf("mmap: %s\n", strerror(errno));
    munmap(last, 1 << 20);  // the rest of this takes some, and touching too much is the end
    pthread_t thread;
    pthread_attr_t small;
    pthread_attr_init(&small);
    static char stacks[400][16384];
    int threads = 0;
    for (; threads < 400; ++threads) {
        pthread_attr_setstack(&small, stacks[threads], sizeof stacks[threads]);
        if (pthread_create(&thread, &small, stay, NULL)) break;
    }
    if (threads < 4 || threads == 400) printf("%d threads\n", threads);
    if (fork() >= 0) printf("a process beyond the limit\n");
    done = 1;
}

static void handle(int number) {
    (void)number;
}

static void edges(void) {
    const uint64_t places[] = {
        0,
        8,
        4096,
        0x10000,
        0x7ffffffff000,
        0x7fffffffeff8,
        0x800000000000,
        0xffff800000000000,
        0xffffffff80000000,
        0xffffffff80003000,
        0xffffffff80004008,
        0xffffffff80006000,
        0xffffffff80007000,
        0xfffffffffffffff8,
        (uint64_t)race,
    };
    signal(SIGUSR1, handle);
    for (unsigned n = 0; n < sizeof places / sizeof *places; ++n) {
        const pid_t child = fork();
        if (child == 0) {
            const long self = getpid();
            // kill(self, SIGUSR1), with the stack there; then the end, without one.
            __asm__ volatile(
                "mov %0, %%rsp\n mov $62, %%eax\n syscall\n"
                "mov $231, %%eax\n mov $77, %%edi\n syscall"
                :
                : "r"(places[n]), "D"(self), "S"((long)SIGUSR1)
                : "rax", "rcx", "r11", "memory");
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (!(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV)) {
            printf("stack at %lx: %x\n", places[n], status);
        }
    }
}

static void spread(void) {
    const pid_t first = getpid();
    for (int n = 0; n < 12; ++n) fork();
    if (getpid() != first) {
        for (;;) pause();
    }
}

static void strings(char* self) {
    static char* many[70000];
    for (int n = 0; n < 69999; ++n) many[n] = self;
    execv(self, many);
    if (errno != E2BIG) printf("many: %s\n", strerror(errno));
    char* const long_one = malloc(3 << 20);
    memset(long_one, 'a', 3 << 20);
    long_one[(3 << 20) - 1] = 0;
    char* const one[] = {self, long_one, NULL};
    execv(self, one);
    if (errno != E2BIG && errno != EFAULT) printf("long: %s\n", strerror(errno));
    execv(self, (char**)8);
    if (errno != EFAULT) printf("nowhere: %s\n", strerror(errno));
}

int main(int argc, char** argv) {
    const char* what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "race")) race();
    if (!strcmp(what, "truncate")) truncate_mapped();
    if (!strcmp(what, "exhaust")) exhaust();
    if (!strcmp(what, "edges")) edges();
    if (!strcmp(what, "spread")) spread();
    if (!strcmp(what, "strings")) strings(argv[0]);
    printf("still here\n");
    fflush(stdout);
    _exit(0);
}
