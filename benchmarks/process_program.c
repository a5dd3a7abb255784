/* What the benchmarks of process VMs run, here and in one, statically linked.
 *
 *     process_program true                     does nothing
 *     process_program sha256|sort|float COUNT  computes, and prints what came out
 *     process_program calls COUNT              makes COUNT system calls that do nothing, and prints
 *                                              the nanoseconds that took
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t state = 88172645463325252u;

static uint64_t next(void) { /* Marsaglia's xorshift */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* --- SHA-256 (FIPS 180-4) over 64 KiB, again and again --------------------------------------- */

static const uint32_t k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

static void block(uint32_t h[8], const uint8_t *data) {
    uint32_t w[64], v[8];
    for (int t = 0; t < 16; ++t) {
        memcpy(&w[t], data + 4 * t, 4);
        w[t] = __builtin_bswap32(w[t]);
    }
    for (int t = 16; t < 64; ++t) {
        uint32_t a = w[t - 15], b = w[t - 2];
        w[t] = w[t - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[t - 7] +
               (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    memcpy(v, h, sizeof v);
    for (int t = 0; t < 64; ++t) {
        uint32_t e = v[4], a = v[0];
        uint32_t one = v[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +
                       ((e & v[5]) ^ (~e & v[6])) + k[t] + w[t];
        uint32_t two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) +
                       ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int n = 0; n < 8; ++n) h[n] += v[n];
}

static uint64_t sha256(long count) {
    static uint8_t data[64 << 10];
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    for (size_t n = 0; n < sizeof data; ++n) data[n] = (uint8_t)next();
    while (count-- > 0) {
        for (size_t n = 0; n < sizeof data; n += 64) block(h, data + n);
    }
    return (uint64_t)h[0] << 32 | h[7];
}

/* --- Sorting 4 MB, anew each time ------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint64_t sort(long count) {
    enum { kItems = 1 << 20 };
    uint32_t *items = malloc(kItems * sizeof *items);
    uint64_t sum = 0;
    while (count-- > 0) {
        for (int n = 0; n < kItems; ++n) items[n] = (uint32_t)next();
        qsort(items, kItems, sizeof *items, compare);
        sum += items[kItems / 2];
    }
    free(items);
    return sum;
}

/* --- Products of matrices ---------------------------------------------------------------------- */

static uint64_t product(long count) {
    enum { kSide = 160 };
    static double a[kSide][kSide], b[kSide][kSide], c[kSide][kSide];
    for (int i = 0; i < kSide; ++i) {
        for (int j = 0; j < kSide; ++j) {
            a[i][j] = (double)(next() >> 40) / (1 << 24);
            b[i][j] = i == j ? 0.999 : 1e-6 * (double)(i - j);
        }
    }
    while (count-- > 0) {
        for (int i = 0; i < kSide; ++i) {
            for (int j = 0; j < kSide; ++j) {
                double sum = 0;
                for (int n = 0; n < kSide; ++n) sum += a[i][n] * b[n][j];
                c[i][j] = sum;
            }
        }
        memcpy(a, c, sizeof a);
    }
    double trace = 0;
    for (int i = 0; i < kSide; ++i) trace += a[i][i];
    uint64_t bits;
    memcpy(&bits, &trace, sizeof bits);
    return bits;
}

/* ---------------------------------------------------------------------------------------------- */

static uint64_t calls(long count) {
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    for (long n = 0; n < count; ++n) syscall(SYS_getppid);
    clock_gettime(CLOCK_MONOTONIC, &after);
    return (uint64_t)(after.tv_sec - before.tv_sec) * 1000000000u +
           (uint64_t)(after.tv_nsec - before.tv_nsec);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        uint64_t (*run)(long);
    } modes[] = {{"sha256", sha256}, {"sort", sort}, {"float", product}, {"calls", calls}};
    if (argc == 2 && strcmp(argv[1], "true") == 0) return 0;
    for (size_t n = 0; argc == 3 && n < sizeof modes / sizeof *modes; ++n) {
        if (strcmp(argv[1], modes[n].name) != 0) continue;
        printf("%llu\n", (unsigned long long)modes[n].run(atol(argv[2])));
        return 0;
    }
    return 64;
}
