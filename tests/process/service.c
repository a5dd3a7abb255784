// A service that is made ready once, and then called from outside.
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int counter = 40;
char* heap;
static int file = -1;

void ready(void) {
    __asm__ volatile("");
}

// Says how often it was called, and changes memory of all kinds.
long handle(const char* text, long number, char* out) {
    ++counter;
    heap[number] += 1;
    memset(out, 'a' + counter % 26, 8);
    return (long)strlen(text) * 1000 + number + heap[number];
}

long next_byte(void) {
    unsigned char byte = 0;
    return read(file, &byte, 1) == 1 ? byte : -1;
}

long say(const char* text) {
    puts(text);
    return fflush(stdout);
}

long write_file(const char* name) {
    const int made = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (made < 0) return -1;
    return write(made, "text", 4) + close(made);
}

double halve(double value) {
    return value / 2;
}
long half_of_seven(void) {
    return (long)(halve(7.0) * 10);
}

long map_page(long address) {
    char* at = mmap((void*)address, 4096, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    *at = 1;
    return (long)at;
}
long peek(const volatile char* at) {
    return *at;
}

// --- A window of pages with different rights, which calls mix up ---------------------------------

enum { kPages = 96, kPage = 4096 };
static char* const windows[] = {(char*)0x200000000000, (char*)0x210000000000};
static sigjmp_buf refused;

static void refuse(int number) {
    siglongjmp(refused, number);
}

// Of each page: 0 nothing, 1 readable, 3 writable, and its first byte.
long survey(unsigned char* out) {
    struct sigaction action = {.sa_handler = refuse, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    for (int n = 0; n < 2 * kPages; ++n) {
        volatile char* page = windows[n / kPages] + (n % kPages) * kPage;
        out[2 * n] = out[2 * n + 1] = 0;
        if (sigsetjmp(refused, 0) != 0) continue;
        out[2 * n + 1] = *page;
        out[2 * n] = 1;
        *page = *page;
        out[2 * n] = 3;
    }
    return kPages;
}

long mix(unsigned seed, int times) {
    static const int rights[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
    for (int n = 0; n < times; ++n) {
        const int count = 1 + rand_r(&seed) % 12, first = rand_r(&seed) % (kPages - count);
        char* at = windows[rand_r(&seed) % 2] + first * kPage;
        const int right = rights[rand_r(&seed) % 3], what = rand_r(&seed) % 4;
        const int fill = rand_r(&seed) % 2;
        if (what == 0) {
            munmap(at, count * kPage);
        } else if (what == 1) {
            mprotect(at, count * kPage, right);
        } else {
            mmap(at, count * kPage, right, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            if (fill && right == (PROT_READ | PROT_WRITE)) memset(at, 1 + n % 250, count * kPage);
        }
    }
    return times;
}

void crash(void) {
    *(volatile int*)16 = 1;
}
void leave(int status) {
    exit(status);
}
void spin(void) {
    for (volatile long n = 0;; ++n) {
    }
}

int main(int count, char** arguments) {
    heap = malloc(64 << 20);
    memset(heap, 1, 4 << 20);
    mix(1, 60);
    if (count > 1) file = open(arguments[1], O_RDONLY);
    next_byte();
    puts("starting");
    fflush(stdout);
    ready();
    puts("done");
    return counter;
}
