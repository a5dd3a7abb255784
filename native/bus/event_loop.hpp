// The machine's one thread for backends and timers: epoll over file descriptors, a timerfd for the
// Clock's next deadline, an eventfd to wake it.
#pragma once

#include <functional>
#include <memory>

#include "bus/clock.hpp"

namespace polyvisor {

class EventLoop {
  public:
    explicit EventLoop(Clock& clock);
    ~EventLoop();  // stops and joins

    /// Starts the thread. Throws HostError.
    void start();
    /// Stops and joins it; bounded by the longest callback.
    void stop();

    using Callback = std::function<void(u32 epoll_events)>;
    /// Watches `fd` (not owned) for epoll `events`. Callbacks run on the loop's thread. Throws
    /// HostError. Safe from any thread, also from a callback.
    void watch(int fd, u32 events, Callback callback);
    void modify(int fd, u32 events);
    /// After it returns, the callback does not run (unless called from that callback itself).
    void unwatch(int fd);
    /// Runs `task` on the loop's thread soon.
    void post(std::function<void()> task);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace polyvisor
