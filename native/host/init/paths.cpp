#include "host/init/paths.hpp"

#include <linux/openat2.h>

#include "host/init/sys.hpp"

namespace polyvisor::host::init {

namespace {

constexpr long kPathMax = 4096;

// What another process renames meanwhile makes openat2() give up (EAGAIN) rather than be wrong.
constexpr int kTries = 64;

}  // namespace

long open_in_root(int root, const char* path, u64 flags) {
    open_how how{};
    how.flags = flags | O_CLOEXEC;
    how.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
    long fd = -kEagain;
    for (int i = 0; i < kTries && (fd == -kEagain || fd == -kEintr); ++i) {
        fd = sys(kSysOpenat2, root, path, &how, sizeof how);
    }
    return fd;
}

long make_in_root(int root, const char* path, bool folder) {
    const long found = open_in_root(root, path, O_PATH);
    if (found != -kEnoent) return found;
    // Name by name: `parent` is the folder that the path leads to so far.
    long parent = open_in_root(root, "/", O_PATH | O_DIRECTORY);
    char prefix[kPathMax];
    for (long end = 0; parent >= 0;) {
        long begin = end;
        while (path[begin] == '/') ++begin;
        end = begin;
        while (path[end] != '\0' && path[end] != '/') ++end;
        if (end == begin) return parent;
        if (end >= kPathMax) {
            sys(__NR_close, parent);
            return -kEnametoolong;
        }
        for (long i = 0; i < end; ++i) prefix[i] = path[i];
        prefix[end] = '\0';
        long rest = end;
        while (path[rest] == '/') ++rest;
        const bool last = path[rest] == '\0';
        long next = open_in_root(root, prefix, O_PATH);
        if (next == -kEnoent) {
            // A name that is there and yet leads nowhere is a link: mkdirat() and O_EXCL do not
            // follow it.
            if (last && !folder) {
                const Fd made(sys(__NR_openat, parent, prefix + begin,
                                  O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_WRONLY, 0644));
                next = made ? 0 : -made.error();
            } else {
                next = sys(__NR_mkdirat, parent, prefix + begin, 0755);
            }
            if (next >= 0 || next == -kEexist) next = open_in_root(root, prefix, O_PATH);
            if (next == -kEnoent) next = -kEloop;
        }
        sys(__NR_close, parent);
        parent = next;
    }
    return parent;
}

}  // namespace polyvisor::host::init
