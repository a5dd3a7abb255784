// What memory calls answer, and what is in the memory then, a line each: the same wherever it runs.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define MEGA (1ul << 20)

static sigjmp_buf back;
static volatile int fault_signal, fault_code, fault_here;
static char* volatile touched;
static volatile int expected;

static void on_fault(int number, siginfo_t* info, void* context) {
    (void)context;
    if (!expected) _exit(99);
    fault_signal = number;
    fault_code = info->si_code;
    fault_here = info->si_addr == touched;
    siglongjmp(back, 1);
}

// What reading (or writing) a byte does.
static void touch(const char* what, char* at, int write) {
    touched = at;
    expected = 1;
    if (sigsetjmp(back, 1) != 0) {
        expected = 0;
        printf("%s: signal %d code %d there %d\n", what, fault_signal, fault_code, fault_here);
        return;
    }
    if (write) *(volatile char*)at = 'w';
    const int byte = *(volatile char*)at;
    expected = 0;
    printf("%s: %d\n", what, byte);
}

static void answer(const char* what, long result) {
    printf("%s: %s\n", what, result == -1 ? strerrorname_np(errno) : "fine");
}

static char* map(size_t size, int rights, int flags) {
    char* at = mmap(NULL, size, rights, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (at == MAP_FAILED) printf("mmap: %s\n", strerrorname_np(errno));
    return at;
}

static int sum(const char* at, size_t size) {
    int total = 0;
    for (size_t n = 0; n < size; n++) total += at[n];
    return total;
}

static void errors(void) {
    char* at = map(8 * PAGE, PROT_READ | PROT_WRITE, 0);
    unsigned char pages[8];
    munmap(at + 4 * PAGE, PAGE);  // a hole
    answer("mmap none", (long)mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    answer("mmap neither", (long)mmap(NULL, PAGE, PROT_READ, MAP_ANONYMOUS, -1, 0));
    answer("mmap odd",
           (long)mmap(at + 1, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
    answer("mmap huge", (long)mmap(NULL, 1ul << 47, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    answer("mmap wraps", (long)mmap(NULL, ~0ul, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    answer("mmap no file", (long)mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, 99, 0));
    answer("mmap there", (long)mmap(at, PAGE, PROT_READ,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
    answer("munmap odd", munmap(at + 1, PAGE));
    answer("munmap none", munmap(at, 0));
    answer("munmap hole", munmap(at + 4 * PAGE, PAGE));
    answer("mprotect odd", mprotect(at + 1, PAGE, PROT_READ));
    answer("mprotect none", mprotect(at, 0, PROT_READ));
    answer("mprotect hole", mprotect(at + 4 * PAGE, PAGE, PROT_READ));
    answer("mprotect what", mprotect(at, PAGE, 0x40));
    answer("mremap odd", (long)mremap(at + 1, PAGE, PAGE, 0));
    answer("mremap to none", (long)mremap(at, PAGE, 0, 0));
    answer("mremap of none", (long)mremap(at, 0, PAGE, MREMAP_MAYMOVE));
    answer("mremap hole", (long)mremap(at + 4 * PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE));
    answer("mremap over",
           (long)mremap(at, 2 * PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at + PAGE));
    answer("mremap fixed", (long)mremap(at, PAGE, PAGE, MREMAP_FIXED, at + 16 * PAGE));
    answer("mremap flags", (long)mremap(at, PAGE, PAGE, 64));
    answer("mremap keep", (long)mremap(at, PAGE, 2 * PAGE, MREMAP_MAYMOVE | 4, NULL));
    answer("mremap no room", (long)mremap(at, PAGE, 3 * PAGE, 0));
    answer("madvise odd", madvise(at + 1, PAGE, MADV_DONTNEED));
    answer("madvise what", madvise(at, PAGE, 999));
    answer("madvise hole", madvise(at, 6 * PAGE, MADV_DONTNEED));
    answer("madvise none", madvise(at, 0, MADV_DONTNEED));
    answer("madvise wraps", madvise(at, ~0ul, MADV_DONTNEED));
    answer("madvise will", madvise(at, PAGE, MADV_WILLNEED));
    answer("madvise free", madvise(at, PAGE, MADV_FREE));
    answer("mincore odd", mincore(at + 1, PAGE, pages));
    answer("mincore hole", mincore(at, 6 * PAGE, pages));
    answer("mincore", mincore(at, 4 * PAGE, pages));
    answer("msync odd", msync(at + 1, PAGE, MS_SYNC));
    answer("msync both", msync(at, PAGE, MS_SYNC | MS_ASYNC));
    answer("msync hole", msync(at, 6 * PAGE, MS_SYNC));
    answer("msync", msync(at, PAGE, MS_SYNC));
    answer("mlockall none", mlockall(0));
    answer("munlock", munlock(at, PAGE));
    answer("munlock hole", munlock(at, 6 * PAGE));
}

static void anonymous(void) {
    char* at = map(16 * PAGE, PROT_NONE, MAP_NORESERVE);
    touch("reserved", at, 0);
    mprotect(at, PAGE, PROT_READ);
    touch("readable", at, 0);
    touch("only readable", at, 1);
    mprotect(at, 2 * PAGE, PROT_READ | PROT_WRITE);
    touch("writable", at + PAGE, 1);
    mprotect(at, 2 * PAGE, PROT_READ);
    touch("kept", at + PAGE, 0);
    touch("no more", at + PAGE, 1);
    munmap(at, 16 * PAGE);
    touch("gone", at, 0);

    at = map(4 * PAGE, PROT_READ | PROT_WRITE, 0);
    for (int n = 0; n < 4; n++) memset(at + n * PAGE, n + 1, PAGE);
    at = mremap(at, 4 * PAGE, 600 * PAGE, MREMAP_MAYMOVE);
    printf("grown: %d %d %d\n", at[0], at[4 * PAGE - 1], sum(at + 4 * PAGE, 596 * PAGE));
    char* place = map(8 * PAGE, PROT_READ, 0);
    char* moved =
        mremap(at + PAGE, 2 * PAGE, 3 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place + PAGE);
    printf("moved: %d %d %d %d\n", moved == place + PAGE, moved[0], moved[PAGE], moved[2 * PAGE]);
    touch("from there", at + PAGE, 0);
    touch("before it", moved - 1, 1);
    touch("its end", moved + 3 * PAGE - 1, 1);
    char* kept = mremap(moved, PAGE, PAGE, MREMAP_MAYMOVE | 4, NULL);
    printf("kept: %d %d\n", kept[0], moved[0]);
    printf("shrunk: %d\n", mremap(moved, 3 * PAGE, PAGE, 0) == moved);
    touch("beyond", moved + PAGE, 0);

    at = map(3 * MEGA, PROT_READ | PROT_WRITE, 0);
    memset(at, 1, 3 * MEGA);
    answer("discard", madvise(at + PAGE, 2 * MEGA, MADV_DONTNEED));
    printf("discarded: %d\n", sum(at, 3 * MEGA));
    answer("discard one", madvise(at, PAGE, MADV_DONTNEED));
    printf("discarded: %d\n", sum(at, 3 * MEGA));

    char* heap = sbrk(0);
    answer("heap", brk(heap + 3 * MEGA));
    memset(heap, 1, 3 * MEGA);
    answer("less", brk(heap + PAGE));
    answer("more", brk(heap + 3 * MEGA));
    printf("heap: %d\n", sum(heap, 3 * MEGA));
    brk(heap);

    // As runtimes do: a wide reservation, of which parts are used.
    char* wide = map(64ul << 30, PROT_NONE, MAP_NORESERVE);
    answer("a part", mprotect(wide + (32ul << 30), 8 * MEGA, PROT_READ | PROT_WRITE));
    touch("of it", wide + (32ul << 30) + 5 * MEGA, 1);
    char* part = mmap(wide + (1ul << 30), 64 * MEGA, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (size_t n = 0; n < 64; n += 7) part[n * MEGA] = (char)n;
    int total = 0;
    for (size_t n = 0; n < 64; n++) total += part[n * MEGA];
    printf("sparse: %d\n", total);

    // What system calls write to is given to them, too.
    char* large = map(8 * MEGA, PROT_READ | PROT_WRITE, 0);
    int fd = open("/proc/self/exe", O_RDONLY);
    if (fd < 0) fd = open("data", O_RDONLY);
    printf("read: %d\n", read(fd, large + 4 * MEGA, 2 * PAGE) > 0);
    printf("bytes: %d\n", sum(large, 4 * MEGA));
    close(fd);
}

static void deep(int depth) {
    volatile char room[16 * PAGE];
    room[0] = (char)depth;
    if (depth > 0) deep(depth - 1);
    if (room[0] != (char)depth) printf("lost\n");
}

static void* in_thread(void* argument) {
    deep(64);
    return argument;
}

static void stacks(void) {
    deep(100);
    pthread_t threads[8];
    for (int n = 0; n < 8; n++) pthread_create(&threads[n], NULL, in_thread, threads + 8 - n);
    int good = 0;
    for (int n = 0; n < 8; n++) {
        void* result = NULL;
        pthread_join(threads[n], &result);
        good += result == threads + 8 - n;
    }
    printf("stacks: %d\n", good);
}

// `data`: two pages and a half of "abc...".
static void files(void) {
    int fd = open("data", O_RDWR), other = open("data", O_RDONLY), only = open("data", O_WRONLY);
    int folder = open(".", O_RDONLY), ends[2];
    char byte = 0;
    if (pipe(ends) != 0) return;
#define MAP(size, rights, flags, from, offset) (long)mmap(NULL, size, rights, flags, from, offset)
    answer("write only", MAP(PAGE, PROT_READ, MAP_PRIVATE, only, 0));
    answer("read only", MAP(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0));
    answer("folder", MAP(PAGE, PROT_READ, MAP_PRIVATE, folder, 0));
    answer("pipe", MAP(PAGE, PROT_READ, MAP_PRIVATE, ends[0], 0));
    answer("odd", MAP(PAGE, PROT_READ, MAP_PRIVATE, fd, 1));
    answer("far", MAP(PAGE, PROT_READ, MAP_PRIVATE, fd, 0x7ffffffffffff000));
    char* at = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    printf("data: %d %d %d\n", at[0], at[2 * PAGE], at[3 * PAGE - 1]);
    touch("read only", at, 1);
    touch("beyond", at + 3 * PAGE, 0);
    answer("writable", mprotect(at, 3 * PAGE, PROT_READ | PROT_WRITE));
    touch("written", at + PAGE, 1);
    printf("file: %d %d\n", (int)pread(fd, &byte, 1, PAGE), byte);
    answer("discard", madvise(at, 2 * PAGE, MADV_DONTNEED));
    printf("again: %d\n", at[PAGE]);
    char* view = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, other, PAGE);
    printf("shared: %d\n", view[0]);
    answer("to write", mprotect(view, PAGE, PROT_READ | PROT_WRITE));
    char* mine = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    mine[0] = 'm';
    mine = mremap(mine, 2 * PAGE, 3 * PAGE, MREMAP_MAYMOVE);
    printf("grown: %d %d\n", mine[0], mine[2 * PAGE]);
    close(fd);
    close(other);
    printf("closed: %d\n", at[2 * PAGE + 1]);
}

static void shared(void) {
    char* at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    touch("shared", at, 1);
    answer("discard", madvise(at, PAGE, MADV_DONTNEED));
    printf("kept: %d\n", at[0]);
    at = mremap(at, 4 * PAGE, 2 * PAGE, 0);
    touch("less", at + 2 * PAGE, 0);
}

// A shared mapping of a file that is written to, and that shrinks.
static void written(void) {
    int fd = open("data", O_RDWR);
    char byte = 0;
    char* at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        printf("not here: %s\n", strerrorname_np(errno));
        return;
    }
    at[PAGE] = 'S';
    printf("file: %d %d\n", (int)pread(fd, &byte, 1, PAGE), byte);
    printf("write: %d\n", (int)pwrite(fd, "T", 1, 0));
    printf("memory: %d\n", at[0]);
    answer("msync", msync(at, 2 * PAGE, MS_SYNC));
    answer("shrink", ftruncate(fd, 1));
    expected = 1;
    if (sigsetjmp(back, 1) == 0)
        printf("lost: %d\n", *(volatile char*)(at + PAGE));
    else
        printf("lost: signal %d\n", fault_signal);
    expected = 0;
    int ends[2];
    answer("pipe", pipe(ends));
    answer("write from it", write(ends[1], at + PAGE, 1));
    answer("read to it", pread(open("data", O_RDONLY), at + PAGE, 1, 0));
}

static void forked(void) {
    char* both = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    char* mine = map(3 * PAGE, PROT_READ | PROT_WRITE, 0);
    memset(mine, 'm', 3 * PAGE);
    answer("wipe", madvise(mine + PAGE, PAGE, MADV_WIPEONFORK));
    answer("drop", madvise(mine + 2 * PAGE, PAGE, MADV_DONTFORK));
    fflush(stdout);
    for (int n = 0; n < 3; n++) {
        pid_t child = fork();
        if (child == 0) {
            printf("child: %d %d\n", mine[0], mine[PAGE]);
            touch("dropped", mine + 2 * PAGE, 0);
            mine[0] = 'c';
            both[0]++;
            fflush(stdout);
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
    printf("parent: %d %d %d\n", mine[0], mine[2 * PAGE], both[0]);
}

int main(int count, char** names) {
    setvbuf(stdout, NULL, _IONBF, 0);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    for (int n = 1; n < count; n++) {
        static const struct {
            const char* name;
            void (*run)(void);
        } parts[] = {{"errors", errors}, {"anonymous", anonymous}, {"stacks", stacks},
                     {"files", files},   {"shared", shared},       {"written", written},
                     {"forked", forked}};
        for (size_t part = 0; part < sizeof parts / sizeof *parts; part++) {
            if (strcmp(parts[part].name, names[n]) == 0) parts[part].run();
        }
    }
    return 0;
}
