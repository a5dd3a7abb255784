// Who waits for which futex (futex(2)).
#pragma once

#include <chrono>
#include <list>
#include <map>
#include <optional>
#include <tuple>

#include "base/types.hpp"

namespace polyvisor::process {

class Thread;

/// Used under the kernel's lock.
class Futexes {
  public:
    /// A word of memory that processes may share: what it belongs to, and where it is in that.
    struct Key {
        const void* owner = nullptr;  ///< a machine, or
        u64 file = 0;                 ///< a file's inode
        u64 offset = 0;
        auto operator<=>(const Key&) const = default;
    };
    static constexpr u32 kAny = ~u32{0};

    /// 0: woken; -ETIMEDOUT, -EINTR.
    s64 wait(Thread& thread, Key key, u32 bits,
             std::optional<std::chrono::steady_clock::time_point> until);
    /// Wakes at most `most` of those whose bits meet these: how many, the longest waiting first.
    u32 wake(Key key, u32 most, u32 bits = kAny);
    /// Lets at most `most` of those who wait for one wait for another: how many.
    u32 move(Key from, Key to, u32 most);

  private:
    struct Waiter {
        Thread* thread;
        Key key;
        u32 bits;
        bool woken = false;
    };
    std::map<Key, std::list<Waiter*>> waiters_;
};

}  // namespace polyvisor::process
