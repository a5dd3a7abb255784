// The machine's one thread for backends and timers: epoll over file descriptors, a timerfd for the
// Clock's next deadline, an eventfd to wake it. A deterministic clock's timers are not its
// business: the vCPU runs them.
#pragma once

#include <functional>
#include <memory>

#include "bus/clock.hpp"

namespace polyvisor {

class EventLoop {
  public:
    /// Takes the clock's rearm callback when the clock is free-running. Throws HostError.
    explicit EventLoop(Clock& clock);
    ~EventLoop();  // stops and joins
    EventLoop(const EventLoop&) = delete;
    EventLoop& operator=(const EventLoop&) = delete;

    /// Starts the thread, which takes no signals. Throws HostError. Also again after stop().
    void start();
    /// Stops and joins it; bounded by the longest callback. From the loop's own thread: asks it to
    /// end after the present callback.
    void stop();
    bool in_loop_thread() const;

    using Callback = std::function<void(u32 epoll_events)>;
    /// Watches `fd` (not owned) for epoll `events`. Callbacks run on the loop's thread. Throws
    /// HostError (EPERM for a regular file, which cannot be waited for). Safe from any thread, also
    /// from a callback; also before start(). Callbacks must not throw. With events 0, only errors
    /// and hang-up are reported.
    void watch(int fd, u32 events, Callback callback);
    void modify(int fd, u32 events);
    /// After it returns, the callback does not run (unless called from that callback itself).
    void unwatch(int fd);
    /// Runs `task` on the loop's thread soon, in order of posting. Tasks posted while the loop is
    /// stopped run when it starts, if it does.
    void post(std::function<void()> task);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace polyvisor
