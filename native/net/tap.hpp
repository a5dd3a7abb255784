// A tap: an interface of the host's kernel whose other side is the guest's network card. Checksums
// and segmentation are the kernel's (IFF_VNET_HDR), each pair of queues has a descriptor of its
// own.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/log.hpp"
#include "bus/event_loop.hpp"
#include "net/end.hpp"
#include "net/fd_watch.hpp"
#include "net/wakeup.hpp"

namespace polyvisor::net {

class Tap final : public End {
  public:
    /// The interface `name`, which is made if there is none (and goes with it); "" or one with %d:
    /// the kernel chooses. Throws HostError (EPERM, ENOENT without /dev/net/tun, EBUSY: somebody
    /// has it), ConfigError for a name that cannot be.
    Tap(EventLoop& loop, Log* log, const std::string& name, unsigned queues);
    ~Tap() override;

    std::string name() const override { return "tap " + name_; }
    const std::string& interface() const { return name_; }
    u32 takes() const override { return kChecksum | kTso4 | kTso6 | kEcnTso; }
    u32 gives() const override { return kChecksum | kTso4 | kTso6 | kEcnTso; }
    unsigned queues() const override { return static_cast<unsigned>(queues_.size()); }
    void attach(Port* port) override;
    void start(u32 offloads) override;
    void stop() override;
    bool send(unsigned queue, const FrameHeader& header, std::span<u8> frame) override;
    void wake(unsigned queue) override;

  private:
    struct Queue {
        explicit Queue(EventLoop& loop) : watch(loop) {}
        OwnedFd fd;
        FdWatch watch;
        // The event loop's thread only:
        std::vector<u8> buffer;
        std::size_t waiting = 0;  // bytes of a frame that found no room
        std::unique_ptr<Wakeup> wakeup;
    };

    void read(unsigned index);
    bool give(unsigned index, std::size_t size);
    void unplugged(int error);

    Log* log_;
    std::string name_;
    Port* port_ = nullptr;
    bool started_ = false;
    std::atomic<bool> gone_{false};
    std::vector<std::unique_ptr<Queue>> queues_;
};

}  // namespace polyvisor::net
