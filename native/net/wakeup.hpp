// Work for the event loop's thread that any thread can ask for, with any lock held.
#pragma once

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <functional>
#include <utility>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "bus/event_loop.hpp"

namespace polyvisor::net {

class Wakeup {
  public:
    /// Calls `task` on the loop's thread after raise(). Throws HostError.
    Wakeup(EventLoop& loop, std::function<void()> task)
        : loop_(loop), fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (!fd_) throw_errno("cannot create an eventfd");
        loop_.watch(fd_.get(), EPOLLIN, [fd = fd_.get(), task = std::move(task)](u32) {
            eventfd_t count;
            ::eventfd_read(fd, &count);
            task();
        });
    }
    /// Waits for a task in progress.
    ~Wakeup() { loop_.unwatch(fd_.get()); }
    Wakeup(const Wakeup&) = delete;
    Wakeup& operator=(const Wakeup&) = delete;

    void raise() { ::eventfd_write(fd_.get(), 1); }

  private:
    EventLoop& loop_;
    OwnedFd fd_;
};

}  // namespace polyvisor::net
