#include "process/transfer.hpp"

#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <climits>

#include "process/sockets.hpp"

namespace polyvisor::process {

namespace {

// With more than that the host may be busy for a while.
constexpr u64 kLong = 256 << 10;

u64 bytes_of(const std::vector<iovec>& parts) {
    u64 bytes = 0;
    for (const iovec& part : parts) bytes += part.iov_len;
    return bytes;
}

void shorten(std::vector<iovec>& parts, u64 most) {
    for (iovec& part : parts) {
        part.iov_len = std::min<u64>(part.iov_len, most);
        most -= part.iov_len;
    }
}

// What the host does of it at once, or -EAGAIN.
s64 attempt(OpenFile& file, std::vector<iovec>& parts, s64 offset, int flags, bool write) {
    const int fd = file.fd.get();
    if (file.host_blocks) {
        pollfd ready{fd, static_cast<short>(write ? POLLOUT : POLLIN), 0};
        if (::poll(&ready, 1, 0) == 0) return -EAGAIN;
        if (write) shorten(parts, PIPE_BUF);  // as much as there is room for, for certain
    }
    if (file.needs_writer && !write) {
        pollfd ready{fd, POLLIN, 0};
        if (::poll(&ready, 1, 0) == 0) return -EAGAIN;
        file.needs_writer = false;
    }
    const int count = static_cast<int>(std::min<std::size_t>(parts.size(), Buffers::kMostParts));
    return result(write ? ::pwritev2(fd, parts.data(), count, offset, flags)
                        : ::preadv2(fd, parts.data(), count, offset, flags));
}

s64 attempt_unlocked(Thread& thread, OpenFile& file, std::vector<iovec>& parts, s64 offset,
                     int flags, bool write) {
    if (file.may_block || bytes_of(parts) < kLong) {
        return attempt(file, parts, offset, flags, write);
    }
    Thread::Unlocked unlocked(thread);
    return attempt(file, parts, offset, flags, write);
}

// One write, which counts as output when it is such.
s64 write_once(Thread& thread, OpenFile& file, std::vector<iovec>& parts, s64 offset, int flags) {
    if (file.stored) {
        return within_writes(thread, file, bytes_of(parts), [&](u64 most) {
            shorten(parts, most);
            return attempt_unlocked(thread, file, parts, offset, flags, true);
        });
    }
    if (!file.counted) return attempt_unlocked(thread, file, parts, offset, flags, true);
    // Others may write meanwhile: it is taken first, and given back.
    u64& left = thread.kernel().output_left;
    const u64 taken = std::min(left, bytes_of(parts));
    if (taken < bytes_of(parts)) thread.kernel().meet(Limit::kOutput);
    if (taken == 0) return -EFBIG;
    shorten(parts, taken);
    left -= taken;
    const s64 written = attempt_unlocked(thread, file, parts, offset, flags, true);
    left += taken - static_cast<u64>(std::max<s64>(written, 0));
    return written;
}

}  // namespace

// --- Buffers -------------------------------------------------------------------------------------

void Buffers::add(u64 address, u64 size) {
    size = std::min(size, kMostBytes - size_);
    parts_.push_back({address, size});
    size_ += size;
}

int Buffers::load(const AddressSpace& space, u64 address, u64 count) {
    if (count > kMostParts) return EINVAL;
    for (u64 n = 0; n < count; ++n) {
        u64 part[2];
        if (!space.load(address + 16 * n, part)) return EFAULT;
        if (static_cast<s64>(part[1]) < 0) return EINVAL;
        add(part[0], part[1]);
    }
    return 0;
}

int Buffers::host(AddressSpace& space, bool write, u64 skip, std::vector<iovec>& parts) const {
    parts.clear();
    for (const Part& part : parts_) {
        const u64 here = std::min(skip, part.size);
        skip -= here;
        if (!space.spans(part.address + here, part.size - here, write, parts)) {
            return parts.empty() ? EFAULT : 0;
        }
    }
    return 0;
}

s64 add_pair(Thread& thread, u64 address, std::shared_ptr<OpenFile> first,
             std::shared_ptr<OpenFile> second, bool close_on_exec) {
    Descriptors& descriptors = thread.descriptors();
    const s64 one = descriptors.add(std::move(first), close_on_exec);
    if (one < 0) return one;
    const s64 other = descriptors.add(std::move(second), close_on_exec);
    const s32 numbers[] = {static_cast<s32>(one), static_cast<s32>(other)};
    if (other >= 0 && thread.space().store(address, numbers)) return 0;
    descriptors.close(static_cast<u64>(one));
    if (other < 0) return other;
    descriptors.close(static_cast<u64>(other));
    return -EFAULT;
}

// --- What is kept --------------------------------------------------------------------------------

namespace {

u64 size_of(int fd) {
    struct stat about{};
    return ::fstat(fd, &about) == 0 ? static_cast<u64>(about.st_size) : 0;
}

}  // namespace

s64 within_writes(Thread& thread, const OpenFile& file, u64 wanted,
                  const std::function<s64(u64)>& step) {
    Kernel& kernel = thread.kernel();
    if (!file.stored || kernel.config().writes == ~u64{0}) return step(wanted);
    const u64 size = size_of(file.fd.get());
    // Others may write meanwhile: it is taken first, and given back.
    const u64 taken = std::min(kernel.writes_left, wanted);
    if (taken < wanted) kernel.meet(Limit::kWrites);
    if (taken == 0 && wanted != 0) return -EDQUOT;
    kernel.writes_left -= taken;
    const s64 written = step(taken);
    const u64 after = size_of(file.fd.get()), grown = after - std::min(size, after);
    const u64 used = std::max(grown, static_cast<u64>(std::max<s64>(written, 0)));
    kernel.writes_left += taken;
    if (kernel.take_writes(used)) return written;
    return ::ftruncate(file.fd.get(), static_cast<off_t>(size)) == 0 ? -EDQUOT : -errno;
}

bool may_grow(Thread& thread, int fd, u64 size) {
    const u64 before = size_of(fd);
    return thread.kernel().take_writes(size - std::min(size, before));
}

void became_shorter(Thread& thread) {
    if (!thread.vm().counts_instructions()) return;
    for (const auto& [pid, process] : thread.kernel().processes()) {
        if (process->vm) process->space().give_up_files();
    }
}

// --- Reading and writing -------------------------------------------------------------------------

s64 read_file(Thread& thread, OpenFile& file, const Source& into, s64 offset, int flags) {
    if (file.counted && offset >= 0) return -ESPIPE;
    if (s64 error = file.socket ? file.socket->check() : 0; error != 0) return error;
    std::vector<iovec> parts;
    return until_done(thread, file, POLLIN, file.nonblocking || !file.may_block, [&]() -> s64 {
        if (int error = into(0, parts)) return -error;
        return attempt_unlocked(thread, file, parts, offset, flags, false);
    });
}

// What may block takes all of it, unless a signal comes or something fails: then it is what it has
// taken so far.
s64 write_file(Thread& thread, OpenFile& file, const Source& from, s64 offset, int flags) {
    if (file.counted && offset >= 0) return -ESPIPE;
    if (s64 error = file.socket ? file.socket->check() : 0; error != 0) return error;
    std::vector<iovec> parts;
    u64 done = 0;
    bool nothing_left = false;
    while (!nothing_left) {
        u64 wanted = 0;
        const bool waits = file.may_block && !file.nonblocking;
        const s64 written = until_done(thread, file, POLLOUT, !waits, [&]() -> s64 {
            if (int error = from(done, parts)) return -error;
            wanted = bytes_of(parts);
            if (wanted == 0 && (done != 0 || file.counted)) return 0;
            return write_once(thread, file, parts, offset, flags);
        });
        if (written == -EPIPE) nobody_reads(thread);
        if (written < 0) return done != 0 ? static_cast<s64>(done) : written;
        done += static_cast<u64>(written);
        nothing_left = !waits || written == 0 || static_cast<u64>(written) == wanted;
    }
    return static_cast<s64>(done);
}

}  // namespace polyvisor::process
