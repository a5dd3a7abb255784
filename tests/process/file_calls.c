// Calls on files, at random but the same for each seed, and what came of each: the host's answers
// are what a process VM's are held against.
//
//     file_calls SEED CALLS [SHARED] [FOLDER]     SHARED 1: with shared mappings that are written
//     to;
//                                                 FOLDER: the root that it is to live in (the host)
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static uint64_t state;
static int number, with_shared;
static char line[8192];  // of the call that is made

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}
static uint64_t below(uint64_t limit) {
    return (next() >> 11) % limit;
}
static int one_in(uint64_t n) {
    return below(n) == 0;
}
#define PICK(...)                                         \
    ({                                                    \
        const long choices[] = {__VA_ARGS__};             \
        choices[below(sizeof choices / sizeof *choices)]; \
    })

// --- What is told --------------------------------------------------------------------------------

#define TELL(...) snprintf(line + strlen(line), sizeof line - strlen(line), __VA_ARGS__)

static uint64_t hash(const void* bytes, size_t size) {
    uint64_t value = 14695981039346656037u;
    for (size_t n = 0; n < size; ++n) {
        value = (value ^ ((const uint8_t*)bytes)[n]) * 1099511628211u;
    }
    return value;
}

static void tell_stat(const struct stat* about) {
    TELL(" mode %o links %lu", about->st_mode, (unsigned long)about->st_nlink);
    if (!S_ISDIR(about->st_mode)) TELL(" size %lld", (long long)about->st_size);
    // (What was set is the same everywhere; the time of a change is not.)
    if (about->st_mtime < 1200000000) {
        TELL(" modified %lld.%09ld", (long long)about->st_mtime, about->st_mtim.tv_nsec);
    }
}

// --- What is made up -----------------------------------------------------------------------------

static int entries;  // of two names that do not fit, which one is told of is nobody's business

static const char* path(void) {
    static char texts[4][8192];
    static int turn;
    char* text = texts[turn++ % 4];
    *text = 0;
    if (one_in(200)) return text;
    if (!entries && one_in(200)) return memset(text, 'n', 256), text[256] = 0, text;
    if (one_in(300)) {
        for (int n = 0; n < 2100; ++n) strcat(text, "a/");
        return text;
    }
    if (one_in(4)) strcat(text, one_in(6) ? "//" : "/");
    for (int left = 1 + (int)below(3); left > 0; --left) {
        static const char* const names[] = {"a", "b", "c", "d", "e", "a", "b", "c", ".", ".."};
        strcat(text, names[below(one_in(4) ? 10 : 8)]);
        if (left > 1) strcat(text, one_in(12) ? "//" : "/");
    }
    if (one_in(12)) strcat(text, one_in(3) ? "/." : "/");
    return text;
}

static int descriptor(void) {
    return one_in(40) ? (int)PICK(-1, 99, 1 << 20) : 3 + (int)below(10);
}
static int folder(void) {
    return one_in(3) ? descriptor() : AT_FDCWD;
}
static mode_t mode(void) {
    // The owner may do what root may, so that it does not matter who it is.
    return 0600 | (one_in(3) ? 0111 : 0) | (mode_t)below(8) * 8 * (one_in(2) ? 6 & 6 : 0) |
           (one_in(4) ? 044 : 0);
}
static long offset(void) {
    return one_in(30) ? PICK(-1, -4096, INT64_MIN) : (long)below(one_in(4) ? 200000 : 9000);
}
static size_t length(void) {
    return below(one_in(8) ? 20000 : 600);
}
static char buffer[65536];
static char* filled(size_t size) {
    const uint64_t seed = next();
    for (size_t n = 0; n < size; ++n) buffer[n] = (char)(seed >> n % 8 * 8) + (char)n;
    return buffer;
}

// --- Calls ---------------------------------------------------------------------------------------

static void call_open(void) {
    const int at = folder();
    const char* name = path();
    int flags = (int)PICK(O_RDONLY, O_RDWR, O_RDWR, O_WRONLY);
    static const int more[] = {O_CREAT,     O_CREAT,    O_EXCL, O_TRUNC,    O_APPEND,
                               O_DIRECTORY, O_NOFOLLOW, O_PATH, O_NONBLOCK, O_CLOEXEC};
    for (int n = (int)below(4); n > 0; --n) flags |= more[below(10)];
    // (Linux changed its mind about O_CREAT with O_DIRECTORY.)
    if (flags & O_CREAT) flags &= ~O_DIRECTORY;
    const mode_t wanted = mode();
    const int fd = (int)syscall(SYS_openat, at, name, flags, wanted);
    TELL("openat(%d, %s, %#x, %o) = %d", at, name, flags, wanted, fd);
    if (fd > 12) close(fd);
}

static void call_transfer(void) {
    const int fd = descriptor(), kind = (int)below(8);
    const long at = offset();
    const size_t size = length();
    struct iovec parts[3] = {{buffer, size / 2}, {buffer + 40000, size / 3}, {buffer + size, 7}};
    long done;
    memset(buffer, 0, sizeof buffer);
    if (kind % 2) filled(size + 7);
    switch (kind) {
        case 0:
            done = syscall(SYS_read, fd, buffer, size);
            break;
        case 1:
            done = syscall(SYS_write, fd, buffer, size);
            break;
        case 2:
            done = syscall(SYS_pread64, fd, buffer, size, at);
            break;
        case 3:
            done = syscall(SYS_pwrite64, fd, buffer, size, at);
            break;
        case 4:
            done = syscall(SYS_readv, fd, parts, PICK(0, 1, 2, 3));
            break;
        case 5:
            done = syscall(SYS_writev, fd, parts, PICK(0, 1, 2, 3));
            break;
        case 6:
            done = syscall(SYS_preadv2, fd, parts, 2, one_in(3) ? -1 : at, 0, 0);
            break;
        default:
            done = syscall(SYS_pwritev2, fd, parts, 2, one_in(3) ? -1 : at, 0, 0);
    }
    TELL("transfer %d of %d, %zu at %ld = %ld, %lx", kind, fd, size, at, done,
         kind % 2 ? 0 : hash(buffer, sizeof buffer));
}

static void call_position(void) {
    const int fd = descriptor(), whence = (int)PICK(SEEK_SET, SEEK_CUR, SEEK_END, 9);
    const long at = one_in(4) ? -offset() : offset();
    TELL("lseek(%d, %ld, %d) = %ld", fd, at, whence, syscall(SYS_lseek, fd, at, whence));
}

static void call_size(void) {
    const int fd = descriptor();
    const long size = offset(), from = offset();
    const char* name = path();
    switch (below(4)) {
        case 0:
            TELL("truncate(%s, %ld) = %ld", name, size, syscall(SYS_truncate, name, size));
            break;
        case 1:
            // (Only what a disk has room for.)
            if (size > 1 << 20 || from > 1 << 20) break;
            const long kind = PICK(0, 0, FALLOC_FL_KEEP_SIZE, 3, 2, 1 << 20);
            TELL("fallocate(%d, %ld, %ld, %ld) = %ld", fd, kind, from, size,
                 syscall(SYS_fallocate, fd, kind, from, size));
            break;
        default:
            TELL("ftruncate(%d, %ld) = %ld", fd, size, syscall(SYS_ftruncate, fd, size));
    }
}

static void call_names(void) {
    const int one = folder(), other = folder();
    entries = 1;
    const char *first = path(), *second = path();
    entries = 0;
    char target[8192];  // (a slash at its end has its own rules for O_CREAT)
    strcpy(target, first);
    while (strlen(target) > 1 && target[strlen(target) - 1] == '/') {
        target[strlen(target) - 1] = 0;
    }
    long flags;
    switch (below(12)) {
        case 0:
        case 1:
            TELL("rename(%s, %s) = %ld", first, second, syscall(SYS_rename, first, second));
            break;
        case 2:
            flags = PICK(0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, 3, 1 << 9);
            TELL("renameat2(%d, %s, %d, %s, %ld) = %ld", one, first, other, second, flags,
                 syscall(SYS_renameat2, one, first, other, second, flags));
            break;
        case 3:
            TELL("link(%s, %s) = %ld", first, second, syscall(SYS_link, first, second));
            break;
        case 4:
            flags = PICK(0, AT_SYMLINK_FOLLOW, 1);
            TELL("linkat(%d, %s, %d, %s, %ld) = %ld", one, first, other, second, flags,
                 syscall(SYS_linkat, one, first, other, second, flags));
            break;
        case 5:
            TELL("symlink(%s, %s) = %ld", target, second, syscall(SYS_symlink, target, second));
            break;
        case 6:
            TELL("symlinkat(%s, %d, %s) = %ld", target, one, second,
                 syscall(SYS_symlinkat, target, one, second));
            break;
        case 7:
            TELL("unlink(%s) = %ld", first, syscall(SYS_unlink, first));
            break;
        case 8:
            flags = PICK(0, AT_REMOVEDIR, 1);
            TELL("unlinkat(%d, %s, %ld) = %ld", one, first, flags,
                 syscall(SYS_unlinkat, one, first, flags));
            break;
        case 9:
            TELL("rmdir(%s) = %ld", first, syscall(SYS_rmdir, first));
            break;
        default:
            flags = (long)(0700 | mode());
            TELL("mkdirat(%d, %s, %lo) = %ld", one, first, flags,
                 syscall(SYS_mkdirat, one, first, flags));
    }
}

static int by_name(const void* one, const void* other) {
    return strcmp(*(char* const*)one, *(char* const*)other);
}

static void call_list(void) {
    const int fd = descriptor();
    char *names[512], *at;
    int count = 0;
    long size = 0;
    uint64_t sum = 0;
    lseek(fd, 0, SEEK_SET);
    for (at = buffer; (size = syscall(SYS_getdents64, fd, at, 4096)) > 0; at += size) {
        for (long n = 0; n < size; n += ((struct dirent64*)(at + n))->d_reclen) {
            struct dirent64* entry = (struct dirent64*)(at + n);
            names[count++] = entry->d_name;
            sum += entry->d_type;
        }
    }
    qsort(names, (size_t)count, sizeof *names, by_name);
    TELL("getdents64(%d) = %ld, types %lu:", fd, size, sum);
    for (int n = 0; n < count; ++n) TELL(" %s", names[n]);
}

static void call_look(void) {
    const int at = folder(), fd = descriptor();
    const char* name = path();
    struct stat about;
    struct statx more;
    long done;
    switch (below(9)) {
        case 0:
            TELL("stat(%s) = %ld", name, done = syscall(SYS_stat, name, &about));
            if (done == 0) tell_stat(&about);
            break;
        case 1:
            TELL("lstat(%s) = %ld", name, done = syscall(SYS_lstat, name, &about));
            if (done == 0) tell_stat(&about);
            break;
        case 2:
            TELL("fstat(%d) = %ld", fd, done = syscall(SYS_fstat, fd, &about));
            if (done == 0) tell_stat(&about);
            break;
        case 3: {
            const long flags = PICK(0, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH, 0x1100, 1);
            if (flags & AT_EMPTY_PATH && one_in(2)) name = "";
            done = syscall(SYS_newfstatat, at, name, &about, flags);
            TELL("newfstatat(%d, %s, %lx) = %ld", at, name, flags, done);
            if (done == 0) tell_stat(&about);
            break;
        }
        case 4:
            done = syscall(SYS_statx, at, name, 0, STATX_BASIC_STATS, &more);
            TELL("statx(%d, %s) = %ld", at, name, done);
            if (done == 0) TELL(" mode %o links %u", more.stx_mode, more.stx_nlink);
            break;
        case 5:
            memset(buffer, 0, 300);
            done = syscall(SYS_readlinkat, at, name, buffer, PICK(0, 3, 300, -1));
            TELL("readlinkat(%d, %s) = %ld %s", at, name, done, buffer);
            break;
        case 6: {
            const long wanted = PICK(F_OK, R_OK, W_OK, X_OK, R_OK | X_OK, 8);
            TELL("access(%s, %ld) = %ld", name, wanted, syscall(SYS_access, name, wanted));
            break;
        }
        case 7:
            memset(buffer, 0, 300);
            TELL("getcwd = %ld", syscall(SYS_getcwd, buffer, PICK(0, 1, 300)));
            TELL(" %s", buffer);
            break;
        default:
            if (one_in(3)) {
                TELL("fchdir(%d) = %ld", fd, syscall(SYS_fchdir, fd));
            } else {
                TELL("chdir(%s) = %ld", name, syscall(SYS_chdir, name));
            }
    }
}

static void call_change(void) {
    const int at = folder(), fd = descriptor();
    const char* name = path();
    const mode_t wanted = mode() | 0700 | (one_in(4) ? 01000 : 0);
    switch (below(6)) {
        case 0:
            TELL("chmod(%s, %o) = %ld", name, wanted, syscall(SYS_chmod, name, wanted));
            break;
        case 1:
            TELL("fchmod(%d, %o) = %ld", fd, wanted, syscall(SYS_fchmod, fd, wanted));
            break;
        case 2:
            TELL("fchmodat(%d, %s, %o) = %ld", at, name, wanted,
                 syscall(SYS_fchmodat, at, name, wanted));
            break;
        case 3: {
            const long mask = PICK(0, 022, 077, 02);
            TELL("umask(%lo) = %ld", mask, syscall(SYS_umask, mask));
            break;
        }
        default: {
            struct timespec times[2] = {{0, UTIME_OMIT},
                                        {1000000000 + (long)below(1000), (long)below(999999999)}};
            if (one_in(10)) times[1].tv_nsec = PICK(UTIME_OMIT, -1, 1000000000);
            if (one_in(4)) times[0].tv_nsec = UTIME_NOW;
            const long flags = PICK(0, 0, AT_SYMLINK_NOFOLLOW, 1);
            const long done = one_in(4) ? syscall(SYS_utimensat, fd, NULL, times, 0)
                                        : syscall(SYS_utimensat, at, name, times, flags);
            TELL("utimensat(%d/%d, %s, %ld.%09ld, %lx) = %ld", fd, at, name, times[1].tv_sec,
                 times[1].tv_nsec, flags, done);
        }
    }
}

static void call_descriptors(void) {
    const int fd = descriptor(), other = descriptor();
    long done, wanted;
    switch (below(10)) {
        case 0:
            TELL("dup(%d) = %ld", fd, done = syscall(SYS_dup, fd));
            if (done > 12) close((int)done);
            break;
        case 1:
            TELL("dup2(%d, %d) = %ld", fd, other, syscall(SYS_dup2, fd, other));
            break;
        case 2:
            wanted = PICK(F_GETFD, F_GETFL, F_GETFD, 9999);
            done = syscall(SYS_fcntl, fd, wanted, 0);
            // (How a name was followed is nothing that an open file is asked for.)
            if (wanted == F_GETFL && done >= 0) done &= ~(O_NOFOLLOW | O_DIRECTORY);
            TELL("fcntl(%d, %ld) = %ld", fd, wanted, done);
            break;
        case 3:
            wanted = PICK(0, FD_CLOEXEC, O_APPEND, O_NONBLOCK, O_APPEND | O_NONBLOCK);
            done = PICK(F_SETFD, F_SETFL);
            TELL("fcntl(%d, %ld, %lx) = %ld", fd, done, wanted,
                 syscall(SYS_fcntl, fd, done, wanted));
            break;
        case 4: {
            struct flock lock = {.l_type = (short)PICK(F_RDLCK, F_WRLCK, F_UNLCK, 7),
                                 .l_whence = SEEK_SET,
                                 .l_start = (long)below(100),
                                 .l_len = (long)below(50)};
            wanted = PICK(F_SETLK, F_GETLK, F_OFD_SETLK);
            done = syscall(SYS_fcntl, fd, wanted, &lock);
            TELL("fcntl(%d, %ld, type %d) = %ld", fd, wanted, lock.l_type, done);
            break;
        }
        case 5:
            done = syscall(SYS_copy_file_range, fd, NULL, other, NULL, length(), 0);
            TELL("copy_file_range(%d, %d) = %ld", fd, other, done);
            break;
        case 6: {
            off_t from = offset();
            struct stat one = {0}, two = {0};
            fstat(fd, &one);
            fstat(other, &two);
            if (one.st_ino == two.st_ino) break;  // in which pieces it is copied shows
            done = syscall(SYS_sendfile, other, fd, one_in(2) ? &from : NULL, 1 + length());
            if (done < 0) errno = 0;  // which of several errors comes first has changed in Linux
            TELL("sendfile(%d, %d) = %ld at %ld", other, fd, done, from);
            break;
        }
        case 7:
            TELL("fsync(%d) = %ld", fd, syscall(one_in(2) ? SYS_fsync : SYS_fdatasync, fd));
            break;
        default:
            TELL("close(%d) = %ld", fd, syscall(SYS_close, fd));
    }
}

static void call_map(void) {
    const int fd = descriptor(), shared = one_in(2), writes = one_in(2) && (!shared || with_shared);
    const size_t size = 1 + below(3 * 4096);
    const long at = (long)below(3) * 4096;
    const int rights = PROT_READ | (writes ? PROT_WRITE : 0);
    struct stat about = {0};
    fstat(fd, &about);
    char* memory = mmap(NULL, size, rights, shared ? MAP_SHARED : MAP_PRIVATE, fd, at);
    TELL("mmap(%d, %zu at %ld, %d, %s) = %d", fd, size, at, rights, shared ? "shared" : "private",
         memory == MAP_FAILED ? -1 : 0);
    if (memory == MAP_FAILED) return;
    // What is behind the end of a page that a file ends in is another's business.
    const size_t there = about.st_size > at ? (size_t)(about.st_size - at) : 0;
    const size_t used = there < size ? there : size;
    TELL(" %lx", hash(memory, used));
    if (writes && used != 0) {
        memory[used - 1] ^= 0x55;
        char one = 0;
        const long got = pread(fd, &one, 1, at + (long)used - 1);
        TELL(" then %ld %d", got, one == memory[used - 1]);
    }
    munmap(memory, size);
}

// What a folder that is gone still is to those who are in it, or have it open, is Linux's own.
static void leave_what_is_gone(void) {
    struct stat about;
    if (syscall(SYS_getcwd, buffer, sizeof buffer) < 0 && chdir("/") != 0) _exit(78);
    for (int fd = 3; fd <= 12; ++fd) {
        if (fstat(fd, &about) == 0 && S_ISDIR(about.st_mode) && about.st_nlink == 0) close(fd);
    }
}

int main(int argc, char** argv) {
    const int calls = argc > 2 ? atoi(argv[2]) : 1000;
    static void (*const kinds[])(void) = {
        call_open,     call_open,     call_open, call_open,   call_transfer,    call_transfer,
        call_transfer, call_position, call_size, call_names,  call_names,       call_names,
        call_list,     call_look,     call_look, call_change, call_descriptors, call_map,
    };
    static char output[1 << 16];
    setvbuf(stdout, output, _IOFBF, sizeof output);
    state = 88172645463325252u + (uint64_t)atoi(argv[1]) * 0x9e3779b97f4a7c15u;
    with_shared = argc > 3 && atoi(argv[3]);
    umask(022);
    if (argc > 4) {
        if (geteuid() != 0 && unshare(CLONE_NEWUSER) != 0) return 77;
        if (chroot(argv[4]) != 0) return 77;
    }
    if (chdir("/") != 0) return 78;
    for (number = 0; number < calls; ++number) {
        *line = 0;
        errno = 0;
        kinds[below(sizeof kinds / sizeof *kinds)]();
        // (A path may be longer than anybody wants to read.)
        printf("%d %.3000s", number, line);
        const int error = errno;
        leave_what_is_gone();
        errno = error;
        printf(errno != 0 ? " (%s)\n" : "\n", strerror(errno));
    }
    printf("done\n");
    return 0;
}
