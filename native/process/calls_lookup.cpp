// What is behind a name of a file.
#include <fcntl.h>
#include <limits.h>
#include <linux/stat.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <climits>
#include <cstring>

#include "process/made_files.hpp"
#include "process/paths.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

s64 stat_place(const Tree::Place& place, struct stat& about) {
    if (place.open) return stat_file(*place.open, about);
    if (place.made) {
        about = stat_made(*place.made, place.path);
        return 0;
    }
    if (::fstat(place.file->get(), &about) != 0) return -errno;
    translate(about);
    return 0;
}

s64 stat_at(Thread& thread, u64 folder, u64 address, u64 into, u64 flags) {
    constexpr u64 kFlags = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | AT_NO_AUTOMOUNT;
    if (flags & ~kFlags) return -EINVAL;
    Tree::Place place;
    struct stat about{};
    if (int error = locate_or_open(thread, folder, address, flags, place)) return -error;
    if (s64 error = stat_place(place, about); error != 0) return error;
    return thread.space().store(into, about) ? 0 : -EFAULT;
}

s64 sys_stat(Thread& thread, const Arguments& a) {
    return stat_at(thread, static_cast<u64>(AT_FDCWD), a[0], a[1], 0);
}

s64 sys_lstat(Thread& thread, const Arguments& a) {
    return stat_at(thread, static_cast<u64>(AT_FDCWD), a[0], a[1], AT_SYMLINK_NOFOLLOW);
}

s64 sys_newfstatat(Thread& thread, const Arguments& a) {
    return stat_at(thread, a[0], a[1], a[2], a[3]);
}

statx_timestamp moment(const timespec& time) {
    statx_timestamp moment{};
    moment.tv_sec = time.tv_sec;
    moment.tv_nsec = static_cast<u32>(time.tv_nsec);
    return moment;
}

// What stat() says, in its newer form, and when the file was made.
s64 sys_statx(Thread& thread, const Arguments& a) {
    constexpr u64 kFlags = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | AT_NO_AUTOMOUNT |
                           AT_STATX_FORCE_SYNC | AT_STATX_DONT_SYNC;
    if ((a[2] & ~kFlags) || (a[3] & STATX__RESERVED)) return -EINVAL;
    Tree::Place place;
    struct stat from{};
    if (int error = locate_or_open(thread, a[0], a[1], a[2], place)) return -error;
    if (s64 error = stat_place(place, from); error != 0) return error;
    struct statx about{};
    if (place.file && !place.made && (a[3] & STATX_BTIME)) {
        ::syscall(SYS_statx, place.file->get(), "", AT_EMPTY_PATH, STATX_BTIME, &about);
    }
    const auto made_at = about.stx_btime;
    const u32 mask = about.stx_mask & STATX_BTIME;
    about = {};
    about.stx_btime = made_at;
    about.stx_mask = STATX_BASIC_STATS | mask;
    about.stx_blksize = static_cast<u32>(from.st_blksize);
    about.stx_nlink = static_cast<u32>(from.st_nlink);
    about.stx_uid = from.st_uid;
    about.stx_gid = from.st_gid;
    about.stx_mode = static_cast<u16>(from.st_mode);
    about.stx_ino = from.st_ino;
    about.stx_size = static_cast<u64>(from.st_size);
    about.stx_blocks = static_cast<u64>(from.st_blocks);
    about.stx_atime = moment(from.st_atim);
    about.stx_mtime = moment(from.st_mtim);
    about.stx_ctime = moment(from.st_ctim);
    about.stx_dev_major = major(from.st_dev);
    about.stx_dev_minor = minor(from.st_dev);
    about.stx_rdev_major = major(from.st_rdev);
    about.stx_rdev_minor = minor(from.st_rdev);
    return thread.space().store(a[4], about) ? 0 : -EFAULT;
}

// How much room there is, and no more of the host's file systems.
s64 store_statfs(Thread& thread, u64 into, int fd) {
    struct statfs host{}, about{};
    if (fd >= 0 && ::fstatfs(fd, &host) != 0) return -errno;
    constexpr long kTmpfs = 0x01021994, kProc = 0x9fa0;
    about.f_type = fd >= 0 ? kTmpfs : kProc;
    about.f_bsize = about.f_frsize = fd >= 0 ? host.f_bsize : 4096;
    about.f_blocks = host.f_blocks;
    about.f_bfree = host.f_bfree;
    about.f_bavail = host.f_bavail;
    about.f_files = host.f_files;
    about.f_ffree = host.f_ffree;
    about.f_namelen = NAME_MAX;
    return thread.space().store(into, about) ? 0 : -EFAULT;
}

s64 sys_statfs(Thread& thread, const Arguments& a) {
    Tree::Place place;
    if (int error = locate(thread, static_cast<u64>(AT_FDCWD), a[0], Tree::kFollow, place)) {
        return -error;
    }
    if (!place.exists()) return -ENOENT;
    return store_statfs(thread, a[1], place.made ? -1 : place.file->get());
}

s64 sys_fstatfs(Thread& thread, const Arguments& a) {
    const auto file = file_of(thread, a[0]);
    if (!file) return -EBADF;
    return store_statfs(thread, a[1], file->made ? -1 : file->fd.get());
}

// As root is asked: what is on a mount that cannot be written to, cannot.
s64 access_at(Thread& thread, u64 folder, u64 address, u64 mode, u64 flags) {
    if (mode & ~u64{R_OK | W_OK | X_OK}) return -EINVAL;
    if (flags & ~u64{AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | AT_EACCESS}) return -EINVAL;
    Tree::Place place;
    if (int error = locate_or_open(thread, folder, address, flags, place)) return -error;
    const bool node = S_ISCHR(place.mode) || S_ISFIFO(place.mode) || S_ISSOCK(place.mode);
    if ((mode & W_OK) && !place.writable && !node) return place.made ? -EACCES : -EROFS;
    if ((mode & X_OK) && !S_ISDIR(place.mode) && !(place.mode & 0111)) return -EACCES;
    return 0;
}

s64 sys_access(Thread& thread, const Arguments& a) {
    return access_at(thread, static_cast<u64>(AT_FDCWD), a[0], a[1], 0);
}

s64 sys_faccessat(Thread& thread, const Arguments& a) {
    return access_at(thread, a[0], a[1], a[2], 0);
}

s64 sys_faccessat2(Thread& thread, const Arguments& a) {
    return access_at(thread, a[0], a[1], a[2], a[3]);
}

s64 read_link(Thread& thread, u64 folder, u64 address, u64 into, u64 size) {
    std::string path, target;
    if (size == 0 || size > INT_MAX) return -EINVAL;
    if (int error = load_path(thread, address, path)) return -error;
    Tree::Place place;
    if (int error =
            locate_or_open(thread, folder, address, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH, place)) {
        return -error;
    }
    if (!S_ISLNK(place.mode)) return path.empty() ? -ENOENT : -EINVAL;
    if (place.made) {
        target = place.made->target;
    } else {
        char text[PATH_MAX];
        const ssize_t length = ::readlinkat(place.file->get(), "", text, sizeof text);
        if (length < 0) return -errno;
        target.assign(text, static_cast<std::size_t>(length));
    }
    target.resize(std::min<u64>(target.size(), size));
    std::span<const u8> bytes(reinterpret_cast<const u8*>(target.data()), target.size());
    return thread.space().copy_out(into, bytes) ? static_cast<s64>(target.size()) : -EFAULT;
}

s64 sys_readlink(Thread& thread, const Arguments& a) {
    return read_link(thread, static_cast<u64>(AT_FDCWD), a[0], a[1], a[2]);
}

s64 sys_readlinkat(Thread& thread, const Arguments& a) {
    return read_link(thread, a[0], a[1], a[2], a[3]);
}

s64 sys_getcwd(Thread& thread, const Arguments& a) {
    const std::string& path = thread.process().directory;
    Tree::Place place;
    if (int error = locate(thread, AT_FDCWD, ".", Tree::kFollow, place)) return -error;
    if (a[1] < path.size() + 1) return -ERANGE;
    std::span<const u8> bytes(reinterpret_cast<const u8*>(path.c_str()), path.size() + 1);
    return thread.space().copy_out(a[0], bytes) ? static_cast<s64>(bytes.size()) : -EFAULT;
}

s64 sys_chdir(Thread& thread, const Arguments& a) {
    Tree::Place place;
    if (int error = locate(thread, static_cast<u64>(AT_FDCWD), a[0], Tree::kFollow, place)) {
        return -error;
    }
    if (!place.exists()) return -ENOENT;
    if (!S_ISDIR(place.mode)) return -ENOTDIR;
    thread.process().directory = place.path;
    return 0;
}

s64 sys_fchdir(Thread& thread, const Arguments& a) {
    const auto file = file_of(thread, a[0]);
    struct stat about{};
    if (!file) return -EBADF;
    if (s64 error = stat_file(*file, about); error != 0) return error;
    if (!S_ISDIR(about.st_mode) || file->path.front() != '/') return -ENOTDIR;
    thread.process().directory = file->path;
    return 0;
}

constexpr Call kCalls[] = {
    {SYS_stat, sys_stat},
    {SYS_lstat, sys_lstat},
    {SYS_newfstatat, sys_newfstatat},
    {SYS_statx, sys_statx},
    {SYS_statfs, sys_statfs},
    {SYS_access, sys_access},
    {SYS_faccessat, sys_faccessat},
    {SYS_faccessat2, sys_faccessat2},
    {SYS_readlink, sys_readlink},
    {SYS_readlinkat, sys_readlinkat},
    {SYS_getcwd, sys_getcwd},
    {SYS_fstatfs, sys_fstatfs},
    {SYS_chdir, sys_chdir},
    {SYS_fchdir, sys_fchdir},
};

}  // namespace

std::span<const Call> lookup_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
