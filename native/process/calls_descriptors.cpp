// Descriptors: what leads to open files, and what is done with that.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include <climits>

#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

s64 sys_close(Thread& thread, const Arguments& a) {
    return thread.descriptors().close(static_cast<u32>(a[0]));
}

s64 sys_close_range(Thread& thread, const Arguments& a) {
    const u32 first = static_cast<u32>(a[0]), last = static_cast<u32>(a[1]);
    if (first > last || (a[2] & ~u64{CLOSE_RANGE_CLOEXEC | CLOSE_RANGE_UNSHARE})) return -EINVAL;
    Descriptors& descriptors = thread.descriptors();
    for (u64 number = first; number <= last && number < descriptors.size(); ++number) {
        auto* entry = descriptors.find(number);
        if (entry == nullptr) continue;
        if (a[2] & CLOSE_RANGE_CLOEXEC) {
            entry->close_on_exec = true;
        } else {
            descriptors.close(number);
        }
    }
    return 0;
}

s64 duplicate(Thread& thread, u64 number, u64 lowest, bool close_on_exec) {
    auto file = file_of(thread, number);
    if (!file) return -EBADF;
    return thread.descriptors().add(std::move(file), close_on_exec, lowest);
}

s64 sys_dup(Thread& thread, const Arguments& a) {
    return duplicate(thread, a[0], 0, false);
}

s64 sys_dup2(Thread& thread, const Arguments& a) {
    auto file = file_of(thread, a[0]);
    if (!file) return -EBADF;
    if (a[0] == a[1]) return static_cast<s64>(a[1]);
    return thread.descriptors().place(static_cast<u32>(a[1]), std::move(file), false);
}

s64 sys_dup3(Thread& thread, const Arguments& a) {
    auto file = file_of(thread, a[0]);
    if (a[0] == a[1] || (a[2] & ~u64{O_CLOEXEC})) return -EINVAL;
    if (!file) return -EBADF;
    return thread.descriptors().place(static_cast<u32>(a[1]), std::move(file), a[2] & O_CLOEXEC);
}

// --- Pipes ---------------------------------------------------------------------------------------

s64 make_pipe(Thread& thread, u64 address, u64 flags) {
    if (flags & ~u64{O_CLOEXEC | O_NONBLOCK}) return -EINVAL;
    int ends[2];
    if (::pipe2(ends, O_NONBLOCK | O_CLOEXEC) != 0) return -errno;
    OwnedFd reading(ends[0]), writing(ends[1]);
    return add_pair(thread, address, make_stream(std::move(reading), "pipe:", flags & O_NONBLOCK),
                    make_stream(std::move(writing), "pipe:", flags & O_NONBLOCK),
                    flags & O_CLOEXEC);
}

s64 sys_pipe(Thread& thread, const Arguments& a) {
    return make_pipe(thread, a[0], 0);
}

s64 sys_pipe2(Thread& thread, const Arguments& a) {
    return make_pipe(thread, a[0], a[1]);
}

// --- Locks ---------------------------------------------------------------------------------------

s64 sys_flock(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    const int wanted = static_cast<int>(a[1]);
    auto attempt = [&] { return result(::flock(file->fd.get(), wanted | LOCK_NB)); };
    return wanted & LOCK_NB ? attempt() : until_granted(thread, attempt);
}

// F_SETLK and its likes: `kind` as for the open file, who is the owner either for the descriptions
// of open files that the program asked with, or for the whole process.
s64 record_lock(Thread& thread, OpenFile& file, u64 command, u64 address) {
    const bool of_process = command == F_SETLK || command == F_SETLKW || command == F_GETLK;
    if (file.only_place) return -EBADF;
    const bool asks = command == F_GETLK || command == F_OFD_GETLK;
    const bool waits = command == F_SETLKW || command == F_OFD_SETLKW;
    struct flock lock{};
    if (!thread.space().load(address, lock)) return -EFAULT;
    if (lock.l_type != F_RDLCK && lock.l_type != F_WRLCK && lock.l_type != F_UNLCK) return -EINVAL;
    if (!of_process && lock.l_pid != 0) return -EINVAL;
    if (command == F_GETLK && lock.l_type == F_UNLCK) return -EINVAL;
    const int mode = ::fcntl(file.fd.get(), F_GETFL) & O_ACCMODE;
    if (!asks && ((lock.l_type == F_RDLCK && mode == O_WRONLY) ||
                  (lock.l_type == F_WRLCK && mode == O_RDONLY))) {
        return -EBADF;
    }
    int fd = file.fd.get();
    if (of_process) {
        fd = thread.descriptors().locks.owner(file);
        if (fd < 0) return fd;
        if (lock.l_whence == SEEK_CUR) {
            // The owner has a position of its own.
            const off_t at = ::lseek(file.fd.get(), 0, SEEK_CUR);
            if (at < 0) return -errno;
            lock.l_start += at;
            lock.l_whence = SEEK_SET;
        }
    }
    lock.l_pid = 0;
    if (asks) {
        if (::fcntl(fd, F_OFD_GETLK, &lock) != 0) return -errno;
        return thread.space().store(address, lock) ? 0 : -EFAULT;
    }
    auto attempt = [&] { return result(::fcntl(fd, F_OFD_SETLK, &lock)); };
    if (!waits) return attempt();
    return until_granted(thread, [&]() -> s64 {
        if (of_process) {  // it may have gone meanwhile, with a descriptor that was closed
            fd = thread.descriptors().locks.owner(file);
            if (fd < 0) return fd;
        }
        return attempt();
    });
}

// --- What is set of them -------------------------------------------------------------------------

s64 sys_fcntl(Thread& thread, const Arguments& a) {
    auto* entry = thread.descriptors().find(a[0]);
    if (entry == nullptr) return -EBADF;
    const auto file = entry->file;
    const int fd = file->fd.get();
    switch (a[1]) {
        case F_DUPFD:
        case F_DUPFD_CLOEXEC:
            if (a[2] >= thread.descriptors().most) return -EINVAL;
            return duplicate(thread, a[0], a[2], a[1] == F_DUPFD_CLOEXEC);
        case F_GETFD:
            return entry->close_on_exec ? FD_CLOEXEC : 0;
        case F_SETFD:
            entry->close_on_exec = a[2] & FD_CLOEXEC;
            return 0;
        case F_GETFL: {
            const s64 flags = result(::fcntl(fd, F_GETFL));
            if (flags < 0 || !file->may_block) return flags;
            return (flags & ~s64{O_NONBLOCK}) | (file->nonblocking ? O_NONBLOCK : 0);
        }
        case F_SETFL:
            if (file->may_block) {
                file->nonblocking = a[2] & O_NONBLOCK;
                return 0;
            }
            // What came from outside is others', too.
            if (file->path.empty() || file->path.front() != '/') return 0;
            return result(::fcntl(fd, F_SETFL, a[2] & (O_APPEND | O_NONBLOCK)));
        case F_SETLK:
        case F_SETLKW:
        case F_GETLK:
        case F_OFD_SETLK:
        case F_OFD_SETLKW:
        case F_OFD_GETLK:
            return record_lock(thread, *file, a[1], a[2]);
        case F_GETPIPE_SZ:
        case F_GET_SEALS:
            return result(::fcntl(fd, static_cast<int>(a[1])));
        case F_SETPIPE_SZ:  // up to what a pipe has anyway
            return std::min<s64>(result(::fcntl(fd, F_GETPIPE_SZ)), 64 << 10);
        case F_ADD_SEALS:
            return file->writable ? result(::fcntl(fd, F_ADD_SEALS, a[2])) : -EPERM;
        case F_GETOWN:
        case F_SETOWN:
            return 0;
        default:
            return file->only_place ? -EBADF : -EINVAL;
    }
}

// Terminals are told from files by these, and sized by them; nothing else is passed on.
s64 sys_ioctl(Thread& thread, const Arguments& a) {
    const auto file = file_of(thread, a[0]);
    if (!file) return -EBADF;
    const int fd = file->fd.get();
    switch (static_cast<u32>(a[1])) {
        case TCGETS: {
            u8 settings[36]{};  // the kernel's struct termios
            if (::ioctl(fd, TCGETS, settings) != 0) return -errno;
            return thread.space().store(a[2], settings) ? 0 : -EFAULT;
        }
        case TIOCGWINSZ: {
            winsize size{};
            if (::ioctl(fd, TIOCGWINSZ, &size) != 0) return -errno;
            return thread.space().store(a[2], size) ? 0 : -EFAULT;
        }
        case FIONREAD: {
            int count = 0;
            if (::ioctl(fd, FIONREAD, &count) != 0) return -errno;
            return thread.space().store(a[2], count) ? 0 : -EFAULT;
        }
        case FIONBIO: {
            s32 wanted = 0;
            if (!thread.space().load(a[2], wanted)) return -EFAULT;
            return sys_fcntl(thread, {a[0], F_SETFL, wanted != 0 ? u64{O_NONBLOCK} : 0});
        }
        case FIOCLEX:
        case FIONCLEX:
            thread.descriptors().find(a[0])->close_on_exec = static_cast<u32>(a[1]) == FIOCLEX;
            return 0;
        default:
            return -ENOTTY;
    }
}

constexpr Call kCalls[] = {
    {SYS_close, sys_close}, {SYS_close_range, sys_close_range},
    {SYS_dup, sys_dup},     {SYS_dup2, sys_dup2},
    {SYS_dup3, sys_dup3},   {SYS_pipe, sys_pipe},
    {SYS_pipe2, sys_pipe2}, {SYS_flock, sys_flock},
    {SYS_fcntl, sys_fcntl}, {SYS_ioctl, sys_ioctl},
};

}  // namespace

std::span<const Call> descriptor_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
