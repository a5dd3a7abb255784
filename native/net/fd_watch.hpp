// A descriptor that the event loop watches, for as long as somebody wants that: unlike the loop's
// own modify(), set() may race with the end of it.
#pragma once

#include <mutex>
#include <utility>

#include "bus/event_loop.hpp"

namespace polyvisor::net {

class FdWatch {
  public:
    explicit FdWatch(EventLoop& loop) : loop_(loop) {}
    ~FdWatch() { stop(); }
    FdWatch(const FdWatch&) = delete;
    FdWatch& operator=(const FdWatch&) = delete;

    /// Throws HostError.
    void start(int fd, u32 events, EventLoop::Callback callback) {
        std::lock_guard lock(mutex_);
        loop_.watch(fd, events, std::move(callback));
        fd_ = fd;
        events_ = events;
    }
    /// Nothing when it is not watched.
    void set(u32 events) {
        std::lock_guard lock(mutex_);
        if (fd_ >= 0 && events != events_) loop_.modify(fd_, events_ = events);
    }
    /// Waits for a callback in progress, which may take no lock that the caller holds; not on the
    /// loop's own thread.
    void stop() {
        std::unique_lock lock(mutex_);
        const int fd = std::exchange(fd_, -1);
        lock.unlock();
        if (fd >= 0) loop_.unwatch(fd);
    }

  private:
    EventLoop& loop_;
    std::mutex mutex_;  // before the loop's
    int fd_ = -1;
    u32 events_ = 0;
};

}  // namespace polyvisor::net
