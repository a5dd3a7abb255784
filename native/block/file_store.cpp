#include "block/file_store.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::block {

namespace {

constexpr u64 kZeroesSize = 64 << 10, kBounceSize = 1 << 20;

// statx() tells it since Linux 6.1; older headers do not have it.
#ifdef STATX_DIOALIGN
bool direct_alignment(int fd, u32& memory, u32& place) {
    struct statx status{};
    if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) != 0) return false;
    if (!(status.stx_mask & STATX_DIOALIGN) || status.stx_dio_offset_align == 0) return false;
    memory = status.stx_dio_mem_align;
    place = status.stx_dio_offset_align;
    return true;
}
#else
bool direct_alignment(int, u32&, u32&) {
    return false;
}
#endif

}  // namespace

Cache parse_cache(const std::string& name) {
    if (name == "writeback") return Cache::kWriteback;
    if (name == "none") return Cache::kNone;
    if (name == "unsafe") return Cache::kUnsafe;
    throw ConfigError("cache", "there is no cache mode '" + name +
                                   "'; choose \"writeback\", \"none\" or \"unsafe\"");
}

FileStore::FileStore(const std::string& path, const Options& options)
    : path_(path), cache_(options.cache), read_only_(options.read_only) {
    const int access = (read_only_ ? O_RDONLY : O_RDWR) | O_CLOEXEC;
    fd_ = OwnedFd(::open(path.c_str(), access | (cache_ == Cache::kNone ? O_DIRECT : 0)));
    if (!fd_) {
        if (errno == EINVAL && cache_ == Cache::kNone) {
            throw HostError(EINVAL, path,
                            "the file system of disk image '" + path +
                                "' has no O_DIRECT; use cache=\"writeback\"");
        }
        throw_errno("cannot open disk image '" + path + "'" + (read_only_ ? "" : " for writing"),
                    path);
    }
    if (options.lock) lock_image();
    if (cache_ == Cache::kNone) {
        cached_ = OwnedFd(::open(path.c_str(), access));
        if (!cached_) throw_errno("cannot open disk image '" + path + "'", path);
    }
    probe();
}

FileStore::FileStore(OwnedFd fd, std::string name, Cache cache)
    : path_(std::move(name)), fd_(std::move(fd)), cache_(cache) {
    probe();
}

// OFD locks belong to the open file, not to the process: two disks of one process exclude each
// other too, and closing some other descriptor of the file does not lose the lock. QEMU's are of
// the same kind.
void FileStore::lock_image() {
    struct flock lock{};
    lock.l_type = static_cast<short>(read_only_ ? F_RDLCK : F_WRLCK);
    lock.l_whence = SEEK_SET;
    if (::fcntl(fd_.get(), F_OFD_SETLK, &lock) == 0) return;
    if (errno != EAGAIN && errno != EACCES) return;  // a file system without locks
    throw HostError(EBUSY, path_,
                    "disk image '" + path_ + "' is in use by another machine or program" +
                        (read_only_ ? ", which writes to it" : "") +
                        "; stop that first, or open it in both with read_only=True");
}

void FileStore::probe() {
    struct stat status{};
    if (::fstat(fd_.get(), &status) != 0) throw_errno("cannot examine '" + path_ + "'", path_);
    block_device_ = S_ISBLK(status.st_mode);
    if (!block_device_ && !S_ISREG(status.st_mode)) {
        throw HostError(EINVAL, path_,
                        "'" + path_ + "' is neither a file nor a block device: no disk image");
    }
    physical_block_size_ = static_cast<u32>(status.st_blksize);
    if (block_device_) {
        int logical = 0;
        unsigned physical = 0;
        if (::ioctl(fd_.get(), BLKSSZGET, &logical) == 0) block_size_ = static_cast<u32>(logical);
        if (::ioctl(fd_.get(), BLKPBSZGET, &physical) == 0) physical_block_size_ = physical;
    }
    if (cache_ == Cache::kNone) {
        place_alignment_ = block_device_ ? block_size_ : static_cast<u32>(kPageSize);
        memory_alignment_ = place_alignment_;
        direct_alignment(fd_.get(), memory_alignment_, place_alignment_);
        block_size_ = std::max(block_size_, place_alignment_);
    }
    // Others than powers of two up to a page would be of no use to a guest.
    auto sound = [](u32 size) { return std::has_single_bit(size) && size <= kPageSize; };
    if (!sound(block_size_) || block_size_ < kSectorSize) block_size_ = kSectorSize;
    if (!sound(physical_block_size_)) physical_block_size_ = kPageSize;
    physical_block_size_ = std::max(physical_block_size_, block_size_);
}

Store::Info FileStore::info() const {
    const off_t end = ::lseek(fd_.get(), 0, SEEK_END);  // works for block devices too
    return {.size = end < 0 ? 0 : align_down(static_cast<u64>(end), kSectorSize),
            .read_only = read_only_,
            .block_size = block_size_,
            .physical_block_size = physical_block_size_};
}

bool FileStore::place_aligned(const Request& request) const {
    return ((request.offset | request.size) & (place_alignment_ - 1)) == 0;
}

bool FileStore::buffers_aligned(const Request& request) const {
    return std::all_of(request.buffers.begin(), request.buffers.end(), [&](const iovec& part) {
        return (reinterpret_cast<std::uintptr_t>(part.iov_base) & (memory_alignment_ - 1)) == 0 &&
               (part.iov_len & (place_alignment_ - 1)) == 0;
    });
}

int FileStore::ring_fd(const Request& request) const {
    switch (request.operation) {
        case Operation::kRead:
        case Operation::kWrite:
            if (cache_ != Cache::kNone) return fd_.get();
            if (!place_aligned(request)) return cached_.get();
            return buffers_aligned(request) ? fd_.get() : -1;
        case Operation::kFlush:
            return fd_.get();
        default:
            return -1;
    }
}

bool FileStore::try_now(Request& request) {
    if (request.operation == Operation::kFlush) return ignores_flush();
    if (request.operation != Operation::kRead) return false;
    if (cache_ == Cache::kNone || !no_wait_.load(std::memory_order_relaxed)) return false;
    const ssize_t done =
        ::preadv2(fd_.get(), request.buffers.data(), static_cast<int>(request.buffers.size()),
                  static_cast<off_t>(request.offset), RWF_NOWAIT);
    if (done < 0) {
        if (errno == EOPNOTSUPP) no_wait_.store(false, std::memory_order_relaxed);
        return false;
    }
    if (static_cast<u64>(done) == request.size) return true;
    request.advance(static_cast<u64>(done));
    return false;
}

int FileStore::perform(Request& request) {
    int error = 0;
    switch (request.operation) {
        case Operation::kRead:
        case Operation::kWrite:
            if (cache_ != Cache::kNone) return transfer(fd_.get(), request);
            if (!place_aligned(request)) return transfer(cached_.get(), request);
            return buffers_aligned(request) ? transfer(fd_.get(), request)
                                            : transfer_bounced(request);
        case Operation::kFlush:
            return flush();
        case Operation::kDiscard:
            error = discard(request);
            break;
        case Operation::kWriteZeroes:
            error = write_zeroes(request);
            break;
    }
    if (error == 0 && request.durable) error = flush();
    return error;
}

int FileStore::transfer(int fd, Request& request) const {
    const bool read = request.operation == Operation::kRead;
    while (request.size != 0) {
        const int count = static_cast<int>(request.buffers.size());
        const off_t offset = static_cast<off_t>(request.offset);
        const ssize_t done = read ? ::preadv(fd, request.buffers.data(), count, offset)
                                  : ::pwritev2(fd, request.buffers.data(), count, offset,
                                               request.durable && !ignores_flush() ? RWF_DSYNC : 0);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        if (done == 0) return EIO;  // the file has become shorter
        request.advance(static_cast<u64>(done));
        // O_DIRECT stops at the end of a page that it could not take: the rest is not aligned now.
        if (request.size != 0 && fd == fd_.get() && cache_ == Cache::kNone &&
            !(place_aligned(request) && buffers_aligned(request))) {
            fd = cached_.get();
        }
    }
    return 0;
}

// In pieces, for a guest says how large a request is.
int FileStore::transfer_bounced(Request& request) const {
    const u64 room = align_up(std::min(request.size, kBounceSize), kPageSize);
    std::unique_ptr<u8, decltype(&std::free)> copy(
        static_cast<u8*>(std::aligned_alloc(kPageSize, room)), &std::free);
    if (!copy) return ENOMEM;
    const bool read = request.operation == Operation::kRead;
    while (request.size != 0) {
        const u64 size = std::min(request.size, room);
        if (!read) gather(request.buffers, {copy.get(), size});
        iovec whole{copy.get(), size};
        Request piece{.operation = request.operation,
                      .durable = request.durable,
                      .offset = request.offset,
                      .size = size,
                      .buffers = {&whole, 1}};
        if (const int error = transfer(fd_.get(), piece)) return error;
        if (read) scatter(request.buffers, {copy.get(), size});
        request.advance(size);
    }
    return 0;
}

// Advice: where the host cannot do it, nothing is done.
int FileStore::discard(const Request& request) const {
    int result;
    if (block_device_) {
        u64 range[2] = {request.offset, request.size};
        result = ::ioctl(fd_.get(), BLKDISCARD, range);
    } else {
        result = ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                             static_cast<off_t>(request.offset), static_cast<off_t>(request.size));
    }
    return result == 0 || errno == EOPNOTSUPP || errno == ENOTTY ? 0 : errno;
}

int FileStore::write_zeroes(const Request& request) const {
    const off_t offset = static_cast<off_t>(request.offset),
                size = static_cast<off_t>(request.size);
    if (block_device_) {
        u64 range[2] = {request.offset, request.size};
        if (::ioctl(fd_.get(), BLKZEROOUT, range) == 0) return 0;
    } else {
        if (request.may_unmap &&
            ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size) == 0) {
            return 0;
        }
        if (::fallocate(fd_.get(), FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size) == 0) {
            return 0;
        }
    }
    if (errno != EOPNOTSUPP && errno != ENOTTY) return errno;
    alignas(kPageSize) static const u8 zeroes[kZeroesSize] = {};
    for (u64 at = request.offset, end = at + request.size; at < end;) {
        iovec part{const_cast<u8*>(zeroes), std::min<u64>(end - at, kZeroesSize)};
        Request write{.operation = Operation::kWrite,
                      .offset = at,
                      .size = part.iov_len,
                      .buffers = {&part, 1}};
        at += part.iov_len;
        const int fd = cached_ && !place_aligned(write) ? cached_.get() : fd_.get();
        if (const int error = transfer(fd, write)) return error;
    }
    return 0;
}

int FileStore::flush() const {
    if (ignores_flush()) return 0;
    return ::fdatasync(fd_.get()) == 0 ? 0 : errno;
}

void FileStore::resize(u64 size) {
    if (block_device_) Store::resize(size);
    if (read_only_) throw StateMismatch("disk '" + path_ + "' is read-only; it keeps its size");
    if (size == 0 || size % kSectorSize != 0) {
        throw ConfigError("size",
                          "a disk has a multiple of 512 bytes, not " + std::to_string(size));
    }
    if (::ftruncate(fd_.get(), static_cast<off_t>(size)) != 0) {
        throw_errno("cannot give disk image '" + path_ + "' " + std::to_string(size) + " bytes",
                    path_);
    }
}

}  // namespace polyvisor::block
