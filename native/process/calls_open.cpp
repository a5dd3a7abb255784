// Opening files by their names.
#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "process/paths.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

// The content is made now, and is the host's from then on.
s64 open_made(Thread& thread, const Tree::Place& place, u64 flags) {
    if ((flags & O_ACCMODE) != O_RDONLY || S_ISLNK(place.mode)) {
        return S_ISLNK(place.mode) ? -ELOOP : S_ISDIR(place.mode) ? -EISDIR : -EACCES;
    }
    if (S_ISREG(place.mode) && !place.made->text) return -EACCES;
    OwnedFd writing(::memfd_create("made", MFD_CLOEXEC));
    if (!writing) return -errno;
    if (S_ISREG(place.mode)) {
        const std::string text = place.made->text();
        for (std::size_t done = 0; done < text.size();) {
            const ssize_t n = ::write(writing.get(), text.data() + done, text.size() - done);
            if (n <= 0) return -ENOMEM;
            done += static_cast<std::size_t>(n);
        }
    }
    const std::string again = "/proc/self/fd/" + std::to_string(writing.get());
    OwnedFd reading(::open(again.c_str(), O_RDONLY | O_CLOEXEC));
    if (!reading) return -errno;
    auto file = std::make_shared<OpenFile>();
    file->fd = std::move(reading);
    file->path = place.path;
    file->made = place.made;
    return thread.descriptors().add(std::move(file), flags & O_CLOEXEC);
}

// A FIFO for writing has to have a reader. One for reading waits for its writer when it is read.
s64 open_place(Thread& thread, const Tree::Place& place, u64 flags, mode_t mode) {
    const bool waits = S_ISFIFO(place.mode) && !(flags & (O_NONBLOCK | O_PATH));
    return until_granted(thread, [&]() -> s64 {
        const int fd = thread.kernel().tree().open(place, static_cast<int>(flags), mode);
        return fd == -ENXIO && waits ? -EAGAIN : fd;
    });
}

s64 open_at(Thread& thread, u64 folder, u64 address, u64 flags, u64 mode) {
    std::string path;
    if (int error = load_path(thread, address, path)) return -error;
    if ((flags & O_TMPFILE) == O_TMPFILE) return -EOPNOTSUPP;
    if (flags & O_PATH) flags &= O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    const bool stay = (flags & O_NOFOLLOW) || (flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL);
    const auto follow = flags & O_CREAT && path.ends_with('/') ? Tree::kEntry
                        : stay                                 ? Tree::kStay
                                                               : Tree::kFollow;
    const mode_t wanted = static_cast<mode_t>(mode) & ~thread.process().umask;
    Tree::Place place;
    s64 fd = -EAGAIN;
    // Another program may make or remove the file between looking and opening.
    for (int attempt = 0; attempt < 8; ++attempt) {
        if (int error = locate(thread, static_cast<s32>(folder), path, follow, place)) {
            return -error;
        }
        if ((flags & O_CREAT) && place.folder_wanted) return -EISDIR;
        if ((flags & O_DIRECTORY) && place.exists() && !S_ISDIR(place.mode)) return -ENOTDIR;
        if (place.made && !(place.exists() && (flags & O_CREAT) && (flags & O_EXCL))) {
            return open_made(thread, place, flags);
        }
        if (place.open && !(flags & O_PATH) && !S_ISREG(place.mode) && !S_ISDIR(place.mode) &&
            !(S_ISFIFO(place.mode) && !place.open->host_blocks && !place.open->counted)) {
            // It cannot be opened once more: what is there is shared.
            if (S_ISSOCK(place.mode)) return -ENXIO;
            return thread.descriptors().add(place.open, flags & O_CLOEXEC);
        }
        if (place.open && place.open->counted) {
            return thread.descriptors().add(place.open, flags & O_CLOEXEC);
        }
        const bool makes = !place.exists() && (flags & O_CREAT) && place.writable;
        if (makes && !thread.kernel().take_writes(kNameBytes)) return -EDQUOT;
        fd = open_place(thread, place, flags, wanted);
        const bool raced = !place.exists() && (flags & O_CREAT) && fd == -EEXIST;
        if (!raced || (flags & O_EXCL)) break;
    }
    if (fd < 0) return fd;
    if (flags & O_TRUNC) became_shorter(thread);
    auto file = std::make_shared<OpenFile>();
    file->fd = OwnedFd(static_cast<int>(fd));
    file->path = place.path;
    file->writable = place.writable;
    file->stored = place.writable && (S_ISREG(place.mode) || !place.exists());
    file->only_place = flags & O_PATH;
    if (S_ISFIFO(place.mode) && !(flags & O_PATH)) {
        file->may_block = true;
        file->nonblocking = flags & O_NONBLOCK;
        file->needs_writer = !place.open && !file->nonblocking;
    }
    return thread.descriptors().add(std::move(file), flags & O_CLOEXEC);
}

s64 sys_open(Thread& thread, const Arguments& a) {
    return open_at(thread, static_cast<u64>(AT_FDCWD), a[0], a[1], a[2]);
}

s64 sys_openat(Thread& thread, const Arguments& a) {
    return open_at(thread, a[0], a[1], a[2], a[3]);
}

s64 sys_creat(Thread& thread, const Arguments& a) {
    constexpr u64 kFlags = O_CREAT | O_WRONLY | O_TRUNC;
    return open_at(thread, static_cast<u64>(AT_FDCWD), a[0], kFlags, a[1]);
}

constexpr Call kCalls[] = {
    {SYS_open, sys_open},
    {SYS_creat, sys_creat},
    {SYS_openat, sys_openat},
};

}  // namespace

std::span<const Call> open_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
