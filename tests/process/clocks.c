// The time as the vDSO tells it and as the system call does: `clocks N` compares them N times, with
// the vDSO's functions found as C libraries find them. Prints what it found.
#include <elf.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static uint64_t ns(struct timespec time) {
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint32_t gnu_hash(const char* name) {
    uint32_t hash = 5381;
    for (; *name; ++name) hash = hash * 33 + (unsigned char)*name;
    return hash;
}

static uint32_t sysv_hash(const char* name) {
    uint32_t hash = 0;
    for (; *name; ++name) {
        hash = (hash << 4) + (unsigned char)*name;
        hash ^= hash >> 24 & 0xf0;
    }
    return hash & 0xfffffff;
}

// By either hash table, and only with version LINUX_2.6, as the Go runtime looks.
static void* find(const char* name, int by_gnu_hash) {
    const char* image = (const char*)getauxval(AT_SYSINFO_EHDR);
    if (!image) return NULL;
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    const Elf64_Phdr* parts = (const Elf64_Phdr*)(image + header->e_phoff);
    const Elf64_Dyn* dynamic = NULL;
    uint64_t bias = 0;
    for (int n = 0; n < header->e_phnum; ++n) {
        if (parts[n].p_type == PT_LOAD)
            bias = (uint64_t)image + parts[n].p_offset - parts[n].p_vaddr;
        if (parts[n].p_type == PT_DYNAMIC) dynamic = (const Elf64_Dyn*)(image + parts[n].p_offset);
    }
    const Elf64_Sym* symbols = NULL;
    const char* strings = NULL;
    const uint32_t *hash = NULL, *gnu = NULL;
    const uint16_t* versions = NULL;
    const Elf64_Verdef* definition = NULL;
    for (; dynamic->d_tag != DT_NULL; ++dynamic) {
        const void* at = (const void*)(bias + dynamic->d_un.d_ptr);
        if (dynamic->d_tag == DT_SYMTAB) symbols = at;
        if (dynamic->d_tag == DT_STRTAB) strings = at;
        if (dynamic->d_tag == DT_HASH) hash = at;
        if (dynamic->d_tag == DT_GNU_HASH) gnu = at;
        if (dynamic->d_tag == DT_VERSYM) versions = at;
        if (dynamic->d_tag == DT_VERDEF) definition = at;
    }
    int version = -1;
    for (;; definition = (const void*)((const char*)definition + definition->vd_next)) {
        const Elf64_Verdaux* aux = (const void*)((const char*)definition + definition->vd_aux);
        if (!(definition->vd_flags & VER_FLG_BASE) && definition->vd_hash == 0x3ae75f6 &&
            !strcmp(strings + aux->vda_name, "LINUX_2.6")) {
            version = definition->vd_ndx;
        }
        if (definition->vd_next == 0) break;
    }
    uint32_t index;
    if (by_gnu_hash) {
        const uint32_t wanted = gnu_hash(name), buckets = gnu[0], first = gnu[1], bloom = gnu[2];
        const uint32_t* bucket = gnu + 4 + 2 * bloom;
        const uint32_t* chain = bucket + buckets;
        for (index = bucket[wanted % buckets]; index; ++index) {
            const uint32_t here = chain[index - first];
            if ((here | 1) == (wanted | 1) && !strcmp(strings + symbols[index].st_name, name))
                break;
            if (here & 1) return NULL;
        }
    } else {
        const uint32_t* bucket = hash + 2;
        for (index = bucket[sysv_hash(name) % hash[0]]; index; index = bucket[hash[0] + index]) {
            if (!strcmp(strings + symbols[index].st_name, name)) break;
        }
    }
    if (index == 0 || versions[index] != version) return NULL;
    return (void*)(bias + symbols[index].st_value);
}

int main(int argc, char** argv) {
    const long times = argc > 1 ? atol(argv[1]) : 1000;
    const char* const names[] = {"clock_gettime", "gettimeofday", "time", "getcpu", "clock_getres"};
    for (unsigned n = 0; n < 5; ++n) {
        char name[40];
        snprintf(name, sizeof name, "__vdso_%s", names[n]);
        if (!find(name, 0) || find(name, 0) != find(name, 1)) printf("no %s\n", name);
    }
    int (*get)(clockid_t, struct timespec*) = find("__vdso_clock_gettime", 1);
    if (!get) return 1;
    const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME, CLOCK_TAI,
                                CLOCK_MONOTONIC_RAW};
    uint64_t back[2] = {0, 0}, worst[2] = {0, 0};
    for (long n = 0; n < times; ++n) {
        const clockid_t clock = clocks[n % 5];
        struct timespec first, second, third, fourth;
        get(clock, &first);
        syscall(SYS_clock_gettime, clock, &second, 0);
        get(clock, &third);
        get(clock, &fourth);
        // What each is behind the one before it.
        const int64_t steps[] = {(int64_t)(ns(first) - ns(second)),
                                 (int64_t)(ns(second) - ns(third)),
                                 (int64_t)(ns(third) - ns(fourth))};
        for (int i = 0; i < 3; ++i) {
            const int which = i == 2;
            if (steps[i] > 0) {
                ++back[which];
                if ((uint64_t)steps[i] > worst[which]) worst[which] = (uint64_t)steps[i];
            }
        }
    }
    printf("against the system call: back %lu times, by %lu ns; alone: %lu times\n", back[0],
           worst[0], back[1]);
    // Without a system call: what the test counts.
    struct timeval now;
    for (long n = 0; n < 200000; ++n) {
        struct timespec time_now;
        clock_gettime(n % 2 ? CLOCK_REALTIME_COARSE : CLOCK_MONOTONIC, &time_now);
        gettimeofday(&now, NULL);
    }
    const int64_t off = (int64_t)time(NULL) - now.tv_sec;
    printf("%ld\n", off == 0 || off == 1 ? 0 : (long)off);
    return 0;
}
