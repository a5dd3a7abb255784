// Copying from one open file to another.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kMostCopied = 64 << 10;  // at a time, by way of the monitor

// A position that the call takes from the program, and gives back; or the file's own.
class Position {
  public:
    Position(Thread& thread, u64 address) : thread_(thread), address_(address) {}
    s64 load() {
        if (address_ == 0) return 0;
        if (!thread_.space().load(address_, value_)) return -EFAULT;
        return value_ < 0 ? -EINVAL : 0;
    }
    bool given() const { return address_ != 0; }
    s64 value() const { return value_; }
    s64* host() { return address_ == 0 ? nullptr : &value_; }
    bool store() { return address_ == 0 || thread_.space().store(address_, value_); }
    void advance(s64 bytes) { value_ += bytes; }

  private:
    Thread& thread_;
    u64 address_;
    s64 value_ = 0;
};

s64 sys_sendfile(Thread& thread, const Arguments& a) {
    const auto to = opened_file_of(thread, a[0]), from = opened_file_of(thread, a[1]);
    Position position(thread, a[2]);
    if (!to || !from) return -EBADF;
    const int from_mode = ::fcntl(from->fd.get(), F_GETFL);
    const int to_mode = ::fcntl(to->fd.get(), F_GETFL);
    struct stat about{};
    if ((from_mode & O_ACCMODE) == O_WRONLY) return -EBADF;
    if (::fstat(from->fd.get(), &about) != 0 || S_ISDIR(about.st_mode)) return -EINVAL;
    if ((to_mode & O_ACCMODE) == O_RDONLY) return -EBADF;
    if (from->may_block || from->counted || (to_mode & O_APPEND)) return -EINVAL;
    if (s64 error = position.load(); error != 0) return error;
    const u64 wanted = std::min(a[3], Buffers::kMostBytes);
    std::vector<u8> bytes(std::min(wanted, kMostCopied));
    s64 total = 0;
    while (static_cast<u64>(total) < wanted) {
        const s64 at = position.given() ? position.value() : ::lseek(from->fd.get(), 0, SEEK_CUR);
        if (at < 0) return -errno;
        const u64 here = std::min<u64>(bytes.size(), wanted - static_cast<u64>(total));
        s64 got;
        {
            Thread::Unlocked unlocked(thread);  // it may be a lot
            got = result(::pread(from->fd.get(), bytes.data(), here, at));
        }
        if (got <= 0) {
            if (total == 0) return got;
            break;
        }
        const Source source = [&](u64 skip, std::vector<iovec>& parts) {
            parts = {{bytes.data() + skip, static_cast<u64>(got) - skip}};
            return 0;
        };
        const s64 written = write_file(thread, *to, source, -1);
        if (written <= 0) {
            if (total == 0) return written;
            break;
        }
        total += written;
        position.advance(written);
        if (!position.given()) ::lseek(from->fd.get(), at + written, SEEK_SET);
        if (written < got || thread.interrupted()) break;
    }
    return position.store() ? total : -EFAULT;
}

s64 sys_copy_file_range(Thread& thread, const Arguments& a) {
    const auto from = opened_file_of(thread, a[0]), to = opened_file_of(thread, a[2]);
    Position source(thread, a[1]), target(thread, a[3]);
    if (!to || !from) return -EBADF;
    if (a[5] != 0 || from->may_block || to->may_block || to->counted) return -EINVAL;
    if (s64 error = source.load(); error != 0) return error;
    if (s64 error = target.load(); error != 0) return error;
    const u64 wanted = std::min(a[4], Buffers::kMostBytes);
    const s64 copied = within_writes(thread, *to, wanted, [&](u64 most) {
        Thread::Unlocked unlocked(thread);
        return result(
            ::copy_file_range(from->fd.get(), source.host(), to->fd.get(), target.host(), most, 0));
    });
    return source.store() && target.store() ? copied : -EFAULT;
}

constexpr Call kCalls[] = {
    {SYS_sendfile, sys_sendfile},
    {SYS_copy_file_range, sys_copy_file_range},
};

}  // namespace

std::span<const Call> copy_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
