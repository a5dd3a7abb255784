// What is done with open files.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "process/made_files.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

// --- Reading and writing -------------------------------------------------------------------------

s64 transfer(Thread& thread, u64 number, const Buffers& buffers, s64 offset, bool write,
             int flags = 0) {
    const auto file = opened_file_of(thread, number);
    if (!file) return -EBADF;
    const Source parts = [&](u64 skip, std::vector<iovec>& into) {
        return buffers.host(thread.space(), !write, skip, into);
    };
    return write ? write_file(thread, *file, parts, offset, flags)
                 : read_file(thread, *file, parts, offset, flags);
}

template <bool write, bool positioned>
s64 sys_transfer(Thread& thread, const Arguments& a) {
    if (positioned && static_cast<s64>(a[3]) < 0) return -EINVAL;
    return transfer(thread, a[0], Buffers(a[1], a[2]), positioned ? static_cast<s64>(a[3]) : -1,
                    write);
}

template <bool write, bool positioned>
s64 sys_transfer_vector(Thread& thread, const Arguments& a) {
    if (positioned && static_cast<s64>(a[3]) < 0) return -EINVAL;
    Buffers buffers;
    if (!opened_file_of(thread, a[0])) return -EBADF;
    if (int error = buffers.load(thread.space(), a[1], a[2])) return -error;
    return transfer(thread, a[0], buffers, positioned ? static_cast<s64>(a[3]) : -1, write);
}

template <bool write>
s64 sys_transfer_with_flags(Thread& thread, const Arguments& a) {
    constexpr u64 kFlags = RWF_HIPRI | RWF_DSYNC | RWF_SYNC;
    const s64 offset = static_cast<s64>(a[3]);
    if (offset < -1) return -EINVAL;
    if (a[5] & ~kFlags) return -EOPNOTSUPP;
    Buffers buffers;
    if (int error = buffers.load(thread.space(), a[1], a[2])) return -error;
    return transfer(thread, a[0], buffers, offset, write, static_cast<int>(a[5]));
}

s64 sys_lseek(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    if (file->counted) return -ESPIPE;
    if (file->made && file->made->entries) {
        if (a[1] != 0 || a[2] != SEEK_SET) return -EINVAL;
        file->listed = 0;
    }
    return result(::lseek(file->fd.get(), static_cast<off_t>(a[1]), static_cast<int>(a[2])));
}

// --- What a file is ------------------------------------------------------------------------------

s64 sys_fstat(Thread& thread, const Arguments& a) {
    const auto file = file_of(thread, a[0]);
    struct stat about{};
    if (!file) return -EBADF;
    if (s64 error = stat_file(*file, about); error != 0) return error;
    return thread.space().store(a[1], about) ? 0 : -EFAULT;
}

// The kernel's struct linux_dirent64 for one entry.
void put_entry(std::vector<u8>& into, const MadeFile::Entry& entry, const std::string& path,
               u64 number) {
    constexpr std::size_t kName = 19;
    const u64 inode = made_inode(path + "/" + entry.name);
    const auto size = static_cast<u16>(align_up(kName + entry.name.size() + 1, 8));
    const std::size_t start = into.size();
    into.resize(start + size);
    std::memcpy(&into[start], &inode, 8);
    std::memcpy(&into[start + 8], &number, 8);
    std::memcpy(&into[start + 16], &size, 2);
    into[start + 18] = entry.type;
    std::memcpy(&into[start + kName], entry.name.c_str(), entry.name.size() + 1);
}

s64 list_made(Thread& thread, OpenFile& file, u64 address, u64 size) {
    std::vector<u8> bytes, one;
    auto entries = file.made->entries();
    entries.insert(entries.begin(), {{".", DT_DIR}, {"..", DT_DIR}});
    std::size_t next = file.listed;
    for (; next < entries.size(); ++next) {
        one.clear();
        put_entry(one, entries[next], file.path, next + 1);
        if (bytes.size() + one.size() > size) break;
        bytes.insert(bytes.end(), one.begin(), one.end());
    }
    if (bytes.empty()) return next < entries.size() ? -EINVAL : 0;
    if (!thread.space().copy_out(address, bytes)) return -EFAULT;
    file.listed = next;
    return static_cast<s64>(bytes.size());
}

s64 sys_getdents64(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    if (file->made && file->made->entries) return list_made(thread, *file, a[1], a[2]);
    const u64 room = std::min<u64>(a[2], 64 << 10);
    std::vector<u8> entries(std::max<u64>(room, 1));  // (somewhere, even for nothing)
    const ssize_t size = ::getdents64(file->fd.get(), entries.data(), room);
    if (size < 0) return -errno;
    return thread.space().copy_out(a[1], std::span(entries).first(static_cast<std::size_t>(size)))
               ? size
               : -EFAULT;
}

// --- On disk -------------------------------------------------------------------------------------

s64 sys_fsync(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    Thread::Unlocked unlocked(thread);
    return result(::fsync(file->fd.get()));
}

s64 sys_fdatasync(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    Thread::Unlocked unlocked(thread);
    return result(::fdatasync(file->fd.get()));
}

// What is not the program's is not its to have written out.
s64 sys_nothing(Thread&, const Arguments&) {
    return 0;
}

s64 sys_on_file_nothing(Thread& thread, const Arguments& a) {
    return opened_file_of(thread, a[0]) ? 0 : -EBADF;
}

s64 sys_ftruncate(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (static_cast<s64>(a[1]) < 0) return -EINVAL;
    if (!file) return -EBADF;
    if (!file->writable) return -EINVAL;
    if (!may_grow(thread, file->fd.get(), a[1])) return -EDQUOT;
    const s64 done = result(::ftruncate(file->fd.get(), static_cast<off_t>(a[1])));
    became_shorter(thread);
    return done;
}

s64 sys_fallocate(Thread& thread, const Arguments& a) {
    const auto file = opened_file_of(thread, a[0]);
    if (!file) return -EBADF;
    if (file->may_block) return -ESPIPE;
    if (!file->writable) return -EBADF;
    if (static_cast<s64>(a[2]) < 0 || static_cast<s64>(a[3]) <= 0) return -EINVAL;
    constexpr u64 kFrees = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_COLLAPSE_RANGE;
    if (!(a[1] & kFrees) && !thread.kernel().take_writes(a[3])) return -EDQUOT;
    if (!(a[1] & kFrees) && !may_grow(thread, file->fd.get(), a[2])) return -EDQUOT;
    Thread::Unlocked unlocked(thread);
    return result(::fallocate(file->fd.get(), static_cast<int>(a[1]), static_cast<off_t>(a[2]),
                              static_cast<off_t>(a[3])));
}

s64 sys_memfd_create(Thread& thread, const Arguments& a) {
    constexpr u64 kLongest = 250;
    if (a[1] & ~u64{MFD_CLOEXEC | MFD_ALLOW_SEALING}) return -EINVAL;
    const auto name = thread.space().string(a[0], kLongest);
    if (!name) return -EINVAL;
    OwnedFd fd(::memfd_create(name->c_str(), static_cast<unsigned>(a[1]) | MFD_CLOEXEC));
    if (!fd) return -errno;
    auto file = std::make_shared<OpenFile>();
    file->fd = std::move(fd);
    file->path = "memfd:" + *name;
    file->writable = file->stored = true;
    return thread.descriptors().add(std::move(file), a[1] & MFD_CLOEXEC);
}

constexpr Call kCalls[] = {
    {SYS_read, sys_transfer<false, false>},
    {SYS_write, sys_transfer<true, false>},
    {SYS_pread64, sys_transfer<false, true>},
    {SYS_pwrite64, sys_transfer<true, true>},
    {SYS_readv, sys_transfer_vector<false, false>},
    {SYS_writev, sys_transfer_vector<true, false>},
    {SYS_preadv, sys_transfer_vector<false, true>},
    {SYS_pwritev, sys_transfer_vector<true, true>},
    {SYS_preadv2, sys_transfer_with_flags<false>},
    {SYS_pwritev2, sys_transfer_with_flags<true>},
    {SYS_lseek, sys_lseek},
    {SYS_fstat, sys_fstat},
    {SYS_getdents64, sys_getdents64},
    {SYS_fsync, sys_fsync},
    {SYS_fdatasync, sys_fdatasync},
    {SYS_sync, sys_nothing},
    {SYS_syncfs, sys_on_file_nothing},
    {SYS_sync_file_range, sys_on_file_nothing},
    {SYS_fadvise64, sys_on_file_nothing},
    {SYS_readahead, sys_on_file_nothing},
    {SYS_ftruncate, sys_ftruncate},
    {SYS_fallocate, sys_fallocate},
    {SYS_memfd_create, sys_memfd_create},
};

}  // namespace

std::span<const Call> file_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
