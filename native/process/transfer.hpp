// What system calls on open files have in common: whose descriptor it is, where the program's
// buffers are, and reading and writing that waits as Linux does, without the lock.
#pragma once

#include <poll.h>

#include <cerrno>
#include <functional>

#include "process/calls.hpp"

namespace polyvisor::process {

/// As a system call of the host ended.
inline s64 result(s64 value) {
    return value < 0 ? -errno : value;
}

/// A share of what a descriptor leads to; nullptr: it is not open.
inline std::shared_ptr<OpenFile> file_of(Thread& thread, u64 number) {
    auto* entry = thread.descriptors().find(number);
    return entry == nullptr ? nullptr : entry->file;
}

/// The same, but nullptr also for O_PATH.
inline std::shared_ptr<OpenFile> opened_file_of(Thread& thread, u64 number) {
    auto file = file_of(thread, number);
    return file == nullptr || file->only_place ? nullptr : file;
}

/// Repeats what says -EAGAIN when it would have to wait until the file has one of `events`.
template <class Step>
s64 until_done(Thread& thread, const OpenFile& file, short events, bool nonblocking, Step step) {
    while (true) {
        const s64 done = step();
        if (done != -EAGAIN || nonblocking) return done;
        if (!thread.wait(file.fd.get(), events, Thread::kForever)) return -EINTR;
    }
}

/// Repeats what says -EAGAIN, and which no descriptor tells the end of.
template <class Step>
s64 until_granted(Thread& thread, Step step) {
    constexpr s64 kFirst = 500'000, kLongest = 20'000'000;
    for (s64 pause = kFirst;; pause = std::min(2 * pause, kLongest)) {
        const s64 done = step();
        if (done != -EAGAIN) return done;
        if (!thread.wait(-1, 0, pause)) return -EINTR;
    }
}

/// The program's buffers of one system call. Where they are is copied once; what is there in the
/// memory is looked up again after each wait.
class Buffers {
  public:
    static constexpr u64 kMostParts = 1024, kMostBytes = 0x7fff'f000;

    Buffers() = default;
    Buffers(u64 address, u64 size) { add(address, size); }
    /// As readv() has them: an errno.
    int load(const AddressSpace& space, u64 address, u64 count);
    u64 size() const { return size_; }
    /// Host memory from byte `skip` on, up to the first that the program cannot use: an errno when
    /// that is none.
    int host(AddressSpace& space, bool write, u64 skip, std::vector<iovec>& parts) const;

  private:
    void add(u64 address, u64 size);

    struct Part {
        u64 address, size;
    };
    std::vector<Part> parts_;
    u64 size_ = 0;
};

/// Gives what is to be transferred from byte `skip` on: an errno.
using Source = std::function<int(u64 skip, std::vector<iovec>& parts)>;

/// Bytes, or -errno. `offset` -1: at the file's own position. `flags`: RWF_*.
s64 read_file(Thread& thread, OpenFile& file, const Source& into, s64 offset, int flags = 0);
s64 write_file(Thread& thread, OpenFile& file, const Source& from, s64 offset, int flags = 0);

/// The thread has written to what nobody reads: SIGPIPE.
inline void nobody_reads(Thread& thread) {
    raise(thread, sent_signal(SIGPIPE, SI_USER, thread.process().pid));
}

/// step(bytes) writes at most so many of `wanted` bytes to a file, and returns how many: that
/// counts against what the program may write to files. A gap that it leaves in the file counts,
/// too: who maps the file can fill it. -EDQUOT: nothing is left.
s64 within_writes(Thread& thread, const OpenFile& file, u64 wanted,
                  const std::function<s64(u64)>& step);
/// Before a file gets another size: false, that is too much.
bool may_grow(Thread& thread, int fd, u64 size);
/// After a file may have got shorter: who has mapped it is told by a SIGBUS. (An engine that
/// touches memory itself would be told so late, or with a zero.)
void became_shorter(Thread& thread);
/// What a new name of a file counts as, however little is in the file.
inline constexpr u64 kNameBytes = 4096;

/// Two descriptors, whose numbers go to `address`, as pipe() gives them: 0 or -errno.
s64 add_pair(Thread& thread, u64 address, std::shared_ptr<OpenFile> first,
             std::shared_ptr<OpenFile> second, bool close_on_exec);

}  // namespace polyvisor::process
