// A transport's notification registers as event file descriptors, for engines that serve doorbells
// without an exit: the event loop then kicks the device.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/fd.hpp"
#include "bus/device.hpp"
#include "bus/event_loop.hpp"
#include "virtio/device.hpp"

namespace polyvisor::virtio {

class Doorbells {
  public:
    Doorbells(Device& device, EventLoop& loop) : device_(device), loop_(loop) {}
    ~Doorbells();
    Doorbells(const Doorbells&) = delete;
    Doorbells& operator=(const Doorbells&) = delete;

    /// One for each queue, `describe`d by the transport; made when an engine first asks. Empty when
    /// the host has no more file descriptors: writes are served then.
    template <class Describe>
    std::vector<Doorbell> get(Describe describe) {
        std::lock_guard lock(mutex_);
        std::vector<Doorbell> bells;
        if (!make()) return bells;
        for (unsigned i = 0; i < fds_.size(); ++i) {
            Doorbell bell = describe(i);
            bell.event_fd = fds_[i].get();
            bells.push_back(bell);
        }
        return bells;
    }

  private:
    bool make();

    Device& device_;
    EventLoop& loop_;
    std::mutex mutex_;
    std::vector<OwnedFd> fds_;
};

}  // namespace polyvisor::virtio
