#include "root.h"

enum { kMsReadOnly = 1, kMsMove = 8192, kPatience = 10000 /* ms */ };

/// The words of /proc/cmdline, each ending in NUL.
static char line[4096];
static usize line_size;

static void say(const char* what, const char* which, long error) {
    char text[512];
    usize at = 0;
    const char* parts[] = {"<2>polyvisor: cannot ", what, " ", which, ": error "};
    for (usize i = 0; i < sizeof parts / sizeof *parts; i++) {
        usize size = length_of(parts[i]);
        if (size > sizeof text - 16 - at) size = sizeof text - 16 - at;
        memcpy(text + at, parts[i], size);
        at += size;
    }
    u32 number = (u32)-error;
    if (number >= 100) text[at++] = (char)('0' + number / 100 % 10);
    if (number >= 10) text[at++] = (char)('0' + number / 10 % 10);
    text[at++] = (char)('0' + number % 10);
    text[at++] = '\n';
    int fd = (int)SYS(open, "/dev/kmsg", O_WRONLY | O_CLOEXEC);
    SYS(write, fd, text, at);
    SYS(close, fd);
}

static void read_line(void) {
    int fd = (int)SYS(open, "/proc/cmdline", O_RDONLY | O_CLOEXEC);
    long got = SYS(read, fd, line, sizeof line - 1);
    SYS(close, fd);
    line_size = got > 0 ? (usize)got : 0;
    for (usize i = 0; i < line_size; i++)
        if (line[i] == ' ' || line[i] == '\n') line[i] = 0;
    line[line_size++] = 0;
}

/// What follows `prefix` in a word: the first one from `*at` on, behind which `*at` goes.
static char* next_word(usize* at, const char* prefix) {
    usize length = length_of(prefix);
    while (*at < line_size) {
        char* word = line + *at;
        *at += length_of(word) + 1;
        usize same = 0;
        while (same < length && word[same] == prefix[same]) same++;
        if (same == length) return word + length;
    }
    return 0;
}

/// The last word's value counts, as it does for the kernel.
static char* option(const char* prefix, char* otherwise) {
    char* found = otherwise;
    usize at = 0;
    for (char* value; (value = next_word(&at, prefix));) found = value;
    return found;
}

static int has_flag(const char* name) {
    for (usize at = 0; at < line_size; at += length_of(line + at) + 1)
        if (same_text(line + at, name)) return 1;
    return 0;
}

static void make_directories(char* path) {
    for (char* at = path + 1;; at++) {
        if (*at && *at != '/') continue;
        char kept = *at;
        *at = 0;
        SYS(mkdir, path, 0755);
        *at = kept;
        if (!kept) return;
    }
}

/// TAG:DIRECTORY[:ro], below `root`.
static void mount_share(const char* root, char* share) {
    static char path[4096];
    usize above = length_of(root);
    char* at = share;
    while (*at && *at != ':') at++;
    if (!*at || at[1] != '/') return;
    *at++ = 0;
    usize size = 0;
    while (at[size] && at[size] != ':') size++;
    if (above + size >= sizeof path) return;
    memcpy(path, root, above);
    memcpy(path + above, at, size);
    path[above + size] = 0;
    make_directories(path);
    int flags = kMsNosuid | kMsNodev | (same_text(at + size, ":ro") ? kMsReadOnly : 0);
    long error = SYS(mount, share, path, "virtiofs", flags, 0);
    if (error < 0) say("mount the shared folder", path + above, error);
}

void root_mount_shares(const char* root) {
    read_line();
    usize at = 0;
    for (char* share; (share = next_word(&at, "polyvisor.share="));) mount_share(root, share);
}

/// The driver may still be looking at the disk, and a file system module has nothing to wait for.
static long mount_root(const char* device, const char* type, int flags, const char* options) {
    for (int waited = 0;; waited += 10) {
        long error = SYS(mount, device, "/root", type, flags, options);
        if ((error != -ENOENT && error != -ENXIO) || waited >= kPatience) return error;
        SYS(poll, 0, 0, 10);
    }
}

void root_become(void) {
    static const char* const along[] = {"/dev", "/proc", "/sys"};
    static char* environment[] = {"HOME=/", "TERM=linux", 0};
    read_line();
    char* device = option("root=", "/dev/vda");
    int flags = has_flag("ro") ? kMsReadOnly : 0;
    SYS(mkdir, "/root", 0755);
    long error = mount_root(device, option("rootfstype=", "ext4"), flags, option("rootflags=", 0));
    if (error < 0) {
        say("mount the root file system", device, error);
        return;
    }
    root_mount_shares("/root");
    for (usize i = 0; i < sizeof along / sizeof *along; i++) {
        char to[16] = "/root";
        memcpy(to + 5, along[i], length_of(along[i]) + 1);
        SYS(mount, along[i], to, 0, kMsMove, 0);
    }
    SYS(chdir, "/root");
    SYS(mount, ".", "/", 0, kMsMove, 0);
    SYS(chroot, ".");
    int console = (int)SYS(open, "/dev/console", O_RDWR);
    for (int i = 0; console >= 0 && i < 3; i++) SYS(dup2, console, i);
    if (console > 2) SYS(close, console);
    char* program = option("init=", "/sbin/init");
    char* arguments[] = {program, 0};
    say("run", program, SYS(execve, program, arguments, environment));
}
