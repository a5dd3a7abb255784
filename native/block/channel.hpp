// Asynchronous requests to a store, in a queue's order of submission and in any order of
// completion.
//
//     channel->submit(request);  ...            // collected
//     channel->commit();                        // they go out together
//     while (Request* done = channel->next_done()) ...
//
// After next_done() has given nullptr, `notify` is called on the event loop's thread when there is
// more. Everything else is for one thread at a time (a virtio device has the
// queue's mutex).
#pragma once

#include <functional>
#include <memory>

#include "base/fd.hpp"
#include "block/store.hpp"
#include "bus/event_loop.hpp"

namespace polyvisor::block {

enum class Io : u8 { kAuto, kUring, kThreads };
/// "auto", "io_uring", "threads". Throws ConfigError.
Io parse_io(const std::string& name);

class Channel {
  public:
    using Notify = std::function<void()>;

    virtual ~Channel() = default;  ///< no request is in flight
    virtual void submit(Request& request) = 0;
    virtual void commit() = 0;
    /// A request that is done, or nullptr: there is none now.
    virtual Request* next_done() = 0;
    /// Blocks until next_done() gives something. Some request must be in flight.
    virtual void wait() = 0;
    /// "io_uring" or "threads".
    virtual const char* kind() const = 0;
};

/// An eventfd that has `notify` called on the loop's thread.
class Wakeup {
  public:
    /// Throws HostError.
    Wakeup(EventLoop& loop, Channel::Notify notify);
    ~Wakeup();
    Wakeup(const Wakeup&) = delete;
    Wakeup& operator=(const Wakeup&) = delete;

    int fd() const { return fd_.get(); }
    /// Any thread; never blocks.
    void signal();

  private:
    EventLoop& loop_;
    OwnedFd fd_;
};

/// kAuto takes io_uring where the store is a file and the kernel lets us, threads otherwise. Throws
/// HostError when kUring is impossible.
std::unique_ptr<Channel> make_channel(Store& store, EventLoop& loop, Io io, Channel::Notify notify);

}  // namespace polyvisor::block
