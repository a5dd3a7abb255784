// What guests do to a disk in tests and benchmarks. Built static, with the host's compiler.
//
//   disk_load read PATH DEPTH BLOCK COUNT [random]   COUNT reads of BLOCK bytes, DEPTH at a time;
//                                                    prints "COUNT reads in NANOSECONDS ns"
//   disk_load write PATH SLOTS SEED FIRST            random writes for ever; after each flush
//                                                    prints "flushed NUMBER": all up to that write
//                                                    are on the disk
//   disk_load zero PATH OFFSET SIZE                  BLKZEROOUT
//
// The writes: number n (from FIRST on) goes to slot random() % SLOTS, of 16 KiB. Each of its
// sectors begins with n and the slot. disk_check.py knows the same random().
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

enum { SLOT = 16384, SECTOR = 512, MOST_DEPTH = 64, WRITE_DEPTH = 8 };

static uint64_t state;

static uint64_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 16;
}

static void die(const char* what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static aio_context_t context;

static void submit(struct iocb** requests, long count) {
    while (count != 0) {
        const long taken = syscall(SYS_io_submit, context, count, requests);
        if (taken <= 0) die("io_submit");
        requests += taken;
        count -= taken;
    }
}

// Waits for one or more; each must have done `size` bytes.
static long collect(struct io_event* events, long size) {
    long count = syscall(SYS_io_getevents, context, 1, MOST_DEPTH, events, NULL);
    if (count <= 0) die("io_getevents");
    for (long i = 0; i < count; ++i) {
        if (events[i].res != size) {
            fprintf(stderr, "a transfer gave %lld\n", (long long)events[i].res);
            exit(1);
        }
    }
    return count;
}

static void prepare(struct iocb* request, int fd, int opcode, void* buffer, uint64_t size,
                    uint64_t offset) {
    memset(request, 0, sizeof *request);
    request->aio_fildes = (uint32_t)fd;
    request->aio_lio_opcode = (uint16_t)opcode;
    request->aio_buf = (uint64_t)buffer;
    request->aio_nbytes = size;
    request->aio_offset = (int64_t)offset;
    request->aio_data = (uint64_t)request;
}

static void read_disk(int fd, unsigned depth, uint64_t block, uint64_t count, int random) {
    uint64_t size = 0;
    if (ioctl(fd, BLKGETSIZE64, &size) != 0) die("size");
    const uint64_t blocks = size / block;
    char* buffers = aligned_alloc(4096, depth * block);
    static struct iocb requests[MOST_DEPTH];
    static struct io_event events[MOST_DEPTH];
    uint64_t begun = 0, done = 0;
    const uint64_t start = now();
    if (depth == 1) {
        for (; done < count; ++done) {
            const uint64_t at = random ? next_random() % blocks : done % blocks;
            if (pread(fd, buffers, block, (off_t)(at * block)) != (ssize_t)block) die("pread");
        }
    } else {
        struct iocb* wanted[MOST_DEPTH];
        long room = 0;
        for (; room < depth; ++room) {
            prepare(wanted[room] = &requests[room], fd, IOCB_CMD_PREAD, buffers + room * block,
                    block, 0);
        }
        while (done < count) {
            if ((uint64_t)room > count - begun) room = (long)(count - begun);
            for (long i = 0; i < room; ++i, ++begun) {
                const uint64_t at = random ? next_random() % blocks : begun % blocks;
                wanted[i]->aio_offset = (int64_t)(at * block);
            }
            submit(wanted, room);
            room = collect(events, (long)block);
            done += (uint64_t)room;
            for (long i = 0; i < room; ++i) wanted[i] = (struct iocb*)events[i].data;
        }
    }
    printf("%llu reads in %llu ns\n", (unsigned long long)done,
           (unsigned long long)(now() - start));
}

static void write_disk(int fd, uint64_t slots, uint64_t number) {
    static struct iocb requests[WRITE_DEPTH];
    static struct io_event events[MOST_DEPTH];
    char* buffers = aligned_alloc(4096, WRITE_DEPTH * SLOT);
    memset(buffers, 0x5a, WRITE_DEPTH * SLOT);
    while (1) {
        // Slots of one batch differ, so that the order of writes to each is known.
        uint64_t used[WRITE_DEPTH];
        for (unsigned i = 0; i < WRITE_DEPTH; ++i, ++number) {
            uint64_t slot = next_random() % slots;
            for (unsigned k = 0; k < i; ++k) {
                if (used[k] == slot) {
                    slot = next_random() % slots;
                    k = (unsigned)-1;
                }
            }
            used[i] = slot;
            char* buffer = buffers + i * SLOT;
            for (unsigned at = 0; at < SLOT; at += SECTOR) {
                memcpy(buffer + at, &number, 8);
                memcpy(buffer + at + 8, &slot, 8);
            }
            struct iocb* request = &requests[i];
            prepare(request, fd, IOCB_CMD_PWRITE, buffer, SLOT, slot * SLOT);
            submit(&request, 1);
        }
        for (long done = 0; done < WRITE_DEPTH;) done += collect(events, SLOT);
        if (next_random() % 4 != 0) continue;
        if (fdatasync(fd) != 0) die("fdatasync");
        printf("flushed %llu\n", (unsigned long long)number - 1);
        fflush(stdout);
    }
}

int main(int argc, char** argv) {
    if (argc == 5 && strcmp(argv[1], "zero") == 0) {
        const uint64_t range[2] = {strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0)};
        if (ioctl(open(argv[2], O_RDWR), BLKZEROOUT, range) != 0) die("BLKZEROOUT");
        return 0;
    }
    if (argc < 6) return 2;
    const int write = strcmp(argv[1], "write") == 0;
    const int fd = open(argv[2], (write ? O_RDWR : O_RDONLY) | O_DIRECT);
    if (fd < 0) die(argv[2]);
    if (syscall(SYS_io_setup, MOST_DEPTH, &context) != 0) die("io_setup");
    const uint64_t a = strtoull(argv[3], NULL, 0), b = strtoull(argv[4], NULL, 0);
    const uint64_t c = strtoull(argv[5], NULL, 0);
    state = 0x9e3779b97f4a7c15;
    if (write) {
        state ^= b << 1;
        write_disk(fd, a, c);
    }
    if (a < 1 || a > MOST_DEPTH) return 2;
    read_disk(fd, (unsigned)a, b, c, argc > 6);
    return 0;
}
