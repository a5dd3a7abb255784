// What files are like, and who may change that.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "process/paths.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

s64 sys_truncate(Thread& thread, const Arguments& a) {
    Tree::Place place;
    if (static_cast<s64>(a[1]) < 0) return -EINVAL;
    if (int error = locate(thread, static_cast<u64>(AT_FDCWD), a[0], Tree::kFollow, place)) {
        return -error;
    }
    if (!place.exists()) return -ENOENT;
    if (!S_ISREG(place.mode)) return S_ISDIR(place.mode) ? -EISDIR : -EINVAL;
    const int fd = thread.kernel().tree().open(place, O_WRONLY, 0);
    const OwnedFd file(fd);
    if (fd < 0) return fd;
    if (!may_grow(thread, fd, a[1])) return -EDQUOT;
    const s64 done = result(::ftruncate(fd, static_cast<off_t>(a[1])));
    became_shorter(thread);
    return done;
}

// A place that may be changed: 0 or an errno.
int locate_writable(Thread& thread, u64 folder, u64 address, u64 flags, Tree::Place& place) {
    if (int error = locate_or_open(thread, folder, address, flags, place)) return error;
    if (place.made) return EPERM;
    return place.writable ? 0 : EROFS;
}

s64 change_mode_at(Thread& thread, u64 folder, u64 address, u64 mode) {
    Tree::Place place;
    if (int error = locate_writable(thread, folder, address, 0, place)) return -error;
    return change_mode(place.file->get(), static_cast<mode_t>(mode));
}

s64 sys_chmod(Thread& thread, const Arguments& a) {
    return change_mode_at(thread, static_cast<u64>(AT_FDCWD), a[0], a[1]);
}

s64 sys_fchmodat(Thread& thread, const Arguments& a) {
    return change_mode_at(thread, a[0], a[1], a[2]);
}

s64 sys_fchmod(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    if (!file->writable) return -EROFS;
    return change_mode(file->fd.get(), static_cast<mode_t>(a[1]));
}

// Everything is root's, and stays so.
s64 change_owner(Thread& thread, u64 folder, u64 address, u64 flags) {
    if (flags & ~u64{AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH}) return -EINVAL;
    Tree::Place place;
    return -locate_writable(thread, folder, address, flags, place);
}

s64 sys_chown(Thread& thread, const Arguments& a) {
    return change_owner(thread, static_cast<u64>(AT_FDCWD), a[0], 0);
}

s64 sys_lchown(Thread& thread, const Arguments& a) {
    return change_owner(thread, static_cast<u64>(AT_FDCWD), a[0], AT_SYMLINK_NOFOLLOW);
}

s64 sys_fchownat(Thread& thread, const Arguments& a) {
    return change_owner(thread, a[0], a[1], a[4]);
}

s64 sys_fchown(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    return file->writable || file->may_block ? 0 : -EROFS;
}

// `file` is not followed, if it is a link: it is what the name led to.
s64 set_times(const OwnedFd& file, const timespec* times) {
    const std::string again = "/proc/self/fd/" + std::to_string(file.get());
    return result(::utimensat(AT_FDCWD, again.c_str(), times, 0));
}

s64 sys_utimensat(Thread& thread, const Arguments& a) {
    timespec times[2];
    if (a[2] != 0 && !thread.space().load(a[2], times)) return -EFAULT;
    const timespec* wanted = a[2] != 0 ? times : nullptr;
    if (wanted && times[0].tv_nsec == UTIME_OMIT && times[1].tv_nsec == UTIME_OMIT) return 0;
    if (a[3] & ~u64{AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH}) return -EINVAL;
    if (a[1] == 0) {
        const auto file = opened_file_of(thread, a[0]);
        if (!file) return -EBADF;
        return file->writable ? set_times(file->fd, wanted) : -EROFS;
    }
    Tree::Place place;
    if (int error = locate_writable(thread, a[0], a[1], a[3], place)) return -error;
    return set_times(*place.file, wanted);
}

s64 set_times_at(Thread& thread, u64 folder, u64 path, u64 address) {
    timeval given[2];
    timespec times[2];
    if (address != 0 && !thread.space().load(address, given)) return -EFAULT;
    for (int n = 0; address != 0 && n < 2; ++n) {
        if (given[n].tv_usec < 0 || given[n].tv_usec >= 1'000'000) return -EINVAL;
        times[n] = {given[n].tv_sec, given[n].tv_usec * 1000};
    }
    Tree::Place place;
    if (int error = locate_writable(thread, folder, path, 0, place)) return -error;
    return set_times(*place.file, address != 0 ? times : nullptr);
}

s64 sys_utimes(Thread& thread, const Arguments& a) {
    return set_times_at(thread, static_cast<u64>(AT_FDCWD), a[0], a[1]);
}

s64 sys_futimesat(Thread& thread, const Arguments& a) {
    return set_times_at(thread, a[0], a[1], a[2]);
}

// There are no extended attributes; programs that look for them take this for "none".
s64 sys_no_attributes(Thread&, const Arguments&) {
    return -EOPNOTSUPP;
}

constexpr Call kCalls[] = {
    {SYS_truncate, sys_truncate},
    {SYS_chmod, sys_chmod},
    {SYS_fchmod, sys_fchmod},
    {SYS_fchmodat, sys_fchmodat},
    {SYS_chown, sys_chown},
    {SYS_lchown, sys_lchown},
    {SYS_fchown, sys_fchown},
    {SYS_fchownat, sys_fchownat},
    {SYS_utimensat, sys_utimensat},
    {SYS_utimes, sys_utimes},
    {SYS_futimesat, sys_futimesat},
    {SYS_getxattr, sys_no_attributes},
    {SYS_lgetxattr, sys_no_attributes},
    {SYS_fgetxattr, sys_no_attributes},
    {SYS_listxattr, sys_no_attributes},
    {SYS_llistxattr, sys_no_attributes},
    {SYS_flistxattr, sys_no_attributes},
    {SYS_setxattr, sys_no_attributes},
    {SYS_lsetxattr, sys_no_attributes},
    {SYS_fsetxattr, sys_no_attributes},
    {SYS_removexattr, sys_no_attributes},
    {SYS_lremovexattr, sys_no_attributes},
    {SYS_fremovexattr, sys_no_attributes},
};

}  // namespace

std::span<const Call> attribute_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
