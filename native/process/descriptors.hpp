// A program's file descriptors, and what they lead to.
#pragma once

#include <sys/stat.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/fd.hpp"
#include "base/types.hpp"

namespace polyvisor::process {

struct MadeFile;
struct Socket;

/// What open() makes, and dup() shares. A system call that waits, or gives the lock up, holds a
/// share of it meanwhile: another thread may close its descriptor.
struct OpenFile {
    OwnedFd fd;
    std::string path;       ///< in the program's tree; "pipe:", "stdin" for what has none
    bool writable = false;  ///< its mount is: for fchmod() and its likes
    bool counted = false;   ///< what is written to it counts as output
    bool stored = false;    ///< what is written to it is kept, and counts as such
    /// Reading and writing may have to wait, which the monitor does: the host's file says EAGAIN.
    bool may_block = false;
    bool nonblocking = false;  ///< O_NONBLOCK, as the program has set it for what may block
    bool host_blocks = false;  ///< the host's file does not say EAGAIN, and is not ours to change
    std::shared_ptr<const MadeFile> made{};  ///< there is nothing of the host behind it
    std::size_t listed = 0;                  ///< entries of a made folder that have been read
    std::shared_ptr<Socket> socket{};
    bool needs_writer = false;  ///< a FIFO that has had none: nothing there is not yet its end
    bool is_epoll = false, is_timer = false;
    bool only_place = false;  ///< O_PATH: what a name led to, which nothing is done with
};

/// A file that came from outside, as standard input does. Others may use the same file of the host,
/// so that its mode is not ours to change: where that can be, it is opened once more.
std::shared_ptr<OpenFile> adopt_file(OwnedFd fd, std::string name);
/// Something that may block, whose descriptor of the host is O_NONBLOCK and nobody else's.
std::shared_ptr<OpenFile> make_stream(OwnedFd fd, std::string name, bool nonblocking);

/// As fstat() in the program's eyes: 0 or -errno.
s64 stat_file(const OpenFile& file, struct stat& about);
/// What the host says of a file, made what the program is to see: whoever runs the process VM is
/// its root.
void translate(struct stat& about);

/// The record locks that a process holds with F_SETLK. The host has one owner of them for each
/// process and file, a description of its own with locks of the kind F_OFD_SETLK, so that it sees
/// conflicts within the process VM and with everybody outside. fork() does not copy them.
class RecordLocks {
  public:
    RecordLocks() = default;
    RecordLocks(const RecordLocks&) {}
    RecordLocks& operator=(const RecordLocks&) {
        owners_.clear();
        return *this;
    }

    /// The owner for a file, or -errno.
    int owner(const OpenFile& file);
    /// The process has closed one of the descriptors that it had of a file.
    void closed(const OpenFile& file);

  private:
    static constexpr std::size_t kMost = 1024;
    using Inode = std::pair<dev_t, ino_t>;
    std::map<Inode, OwnedFd> owners_;
};

class Descriptors {
  public:
    struct Entry {
        std::shared_ptr<OpenFile> file;
        bool close_on_exec = false;
    };

    /// The lowest free number from `lowest` on, or -EMFILE.
    s64 add(std::shared_ptr<OpenFile> file, bool close_on_exec, u64 lowest = 0);
    /// The number, or -EBADF.
    s64 place(u64 number, std::shared_ptr<OpenFile> file, bool close_on_exec);
    s64 close(u64 number);
    /// nullptr: it is not open.
    Entry* find(u64 number);
    void close_for_exec();
    void clear() {
        entries_.clear();
        locks = {};
    }
    /// Numbers from here on are not open.
    std::size_t size() const { return entries_.size(); }

    static constexpr std::size_t kMost = 1024;
    std::size_t most = kMost;  ///< numbers are below it
    RecordLocks locks;

  private:
    void drop(Entry& entry);

    std::vector<Entry> entries_;
};

}  // namespace polyvisor::process
