// A channel on io_uring(7): what was submitted goes out with one system call, and what the page
// cache answers at once is there when that returns. The ring's eventfd is silent while somebody
// looks at the ring anyway.
//
// What the kernel did not do completely (a short transfer, a request that it gave back when the
// thread that submitted it ended), and what the ring has no operation for, is done by threads.
#pragma once

#include <liburing.h>

#include "base/fd.hpp"
#include "block/file_store.hpp"
#include "block/thread_channel.hpp"

namespace polyvisor::block {

class UringChannel final : public Channel {
  public:
    /// Throws HostError: the kernel has no io_uring, or does not let us use it.
    UringChannel(FileStore& store, std::shared_ptr<Wakeup> wakeup);
    ~UringChannel() override;

    void submit(Request& request) override;
    void commit() override;
    Request* next_done() override;
    void wait() override;
    const char* kind() const override { return "io_uring"; }

  private:
    static constexpr unsigned kEntries = 256;

    Request* finish(Request& request, int result);

    FileStore& store_;
    const std::shared_ptr<Wakeup> wakeup_;
    ThreadChannel threads_;
    io_uring ring_{};
    unsigned prepared_ = 0;  // not yet with the kernel
    unsigned in_ring_ = 0;   // prepared ones included
    bool armed_ = true;      // the eventfd tells of what completes
};

}  // namespace polyvisor::block
