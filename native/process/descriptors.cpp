#include "process/descriptors.hpp"

#include <fcntl.h>
#include <sys/socket.h>

#include <cerrno>

#include "process/made_files.hpp"

namespace polyvisor::process {

std::shared_ptr<OpenFile> adopt_file(OwnedFd fd, std::string name) {
    auto file = std::make_shared<OpenFile>();
    file->path = std::move(name);
    struct stat about{};
    ::fstat(fd.get(), &about);
    file->may_block = !S_ISREG(about.st_mode) && !S_ISDIR(about.st_mode);
    if (file->may_block && !S_ISSOCK(about.st_mode)) {
        const std::string again = "/proc/self/fd/" + std::to_string(fd.get());
        const int mode = ::fcntl(fd.get(), F_GETFL) & (O_ACCMODE | O_APPEND);
        OwnedFd own(::open(again.c_str(), mode | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
        if (own) fd = std::move(own);
    }
    file->host_blocks = file->may_block && !(::fcntl(fd.get(), F_GETFL) & O_NONBLOCK);
    file->fd = std::move(fd);
    return file;
}

std::shared_ptr<OpenFile> make_stream(OwnedFd fd, std::string name, bool nonblocking) {
    auto file = std::make_shared<OpenFile>();
    file->fd = std::move(fd);
    file->path = std::move(name);
    file->may_block = true;
    file->nonblocking = nonblocking;
    return file;
}

void translate(struct stat& about) {
    if (about.st_uid == ::getuid()) about.st_uid = 0;
    if (about.st_gid == ::getgid()) about.st_gid = 0;
}

s64 stat_file(const OpenFile& file, struct stat& about) {
    if (file.made) {
        about = stat_made(*file.made, file.path);
        return 0;
    }
    if (::fstat(file.fd.get(), &about) != 0) return -errno;
    translate(about);
    return 0;
}

// --- Locks ---------------------------------------------------------------------------------------

int RecordLocks::owner(const OpenFile& file) {
    struct stat about{};
    if (::fstat(file.fd.get(), &about) != 0) return -errno;
    const Inode inode{about.st_dev, about.st_ino};
    if (owners_.size() >= kMost && owners_.count(inode) == 0) return -ENOLCK;
    OwnedFd& owner = owners_[inode];
    if (!owner) {
        const std::string again = "/proc/self/fd/" + std::to_string(file.fd.get());
        if (file.writable) owner = OwnedFd(::open(again.c_str(), O_RDWR | O_CLOEXEC));
        if (!owner) owner = OwnedFd(::open(again.c_str(), O_RDONLY | O_CLOEXEC));
    }
    return owner ? owner.get() : -errno;
}

void RecordLocks::closed(const OpenFile& file) {
    struct stat about{};
    if (owners_.empty() || ::fstat(file.fd.get(), &about) != 0) return;
    owners_.erase({about.st_dev, about.st_ino});
}

// --- Numbers -------------------------------------------------------------------------------------

s64 Descriptors::add(std::shared_ptr<OpenFile> file, bool close_on_exec, u64 lowest) {
    for (u64 number = lowest; number < most; ++number) {
        if (number < entries_.size() && entries_[number].file) continue;
        return place(number, std::move(file), close_on_exec);
    }
    return -EMFILE;
}

s64 Descriptors::place(u64 number, std::shared_ptr<OpenFile> file, bool close_on_exec) {
    if (number >= most) return -EBADF;
    if (number >= entries_.size()) entries_.resize(number + 1);
    drop(entries_[number]);
    entries_[number] = {std::move(file), close_on_exec};
    return static_cast<s64>(number);
}

s64 Descriptors::close(u64 number) {
    if (find(number) == nullptr) return -EBADF;
    drop(entries_[number]);
    return 0;
}

Descriptors::Entry* Descriptors::find(u64 number) {
    return number < entries_.size() && entries_[number].file ? &entries_[number] : nullptr;
}

void Descriptors::close_for_exec() {
    for (Entry& entry : entries_) {
        if (entry.close_on_exec) drop(entry);
    }
}

void Descriptors::drop(Entry& entry) {
    if (entry.file) locks.closed(*entry.file);
    entry = {};
}

}  // namespace polyvisor::process
