// An event file descriptor whose rings become an MSI: what a backend in another thread or process
// (vhost, vhost-user) is handed as its interrupt. Where the engine has the local APICs, the kernel
// raises the interrupt itself (irqfd); otherwise the machine's event loop waits for the rings.
#pragma once

#include <mutex>

#include "base/fd.hpp"
#include "bus/device.hpp"
#include "bus/event_loop.hpp"
#include "bus/interrupt_chips.hpp"

namespace polyvisor {

class MsiEventfd {
  public:
    /// `chips`: the engine's, or nullptr; the references outlive it. Throws HostError.
    MsiEventfd(MsiSink& sink, InterruptChips* chips, EventLoop& loop);
    ~MsiEventfd();
    MsiEventfd(const MsiEventfd&) = delete;
    MsiEventfd& operator=(const MsiEventfd&) = delete;

    /// To be written by whoever interrupts. Valid as long as this object.
    int fd() const { return fd_.get(); }

    // The calls below by one thread at a time; not by a callback of the event loop.

    /// Rings raise this message from now on, one that already waits at once. A guest that gives an
    /// address of no local APIC gets no interrupt. Throws HostError.
    void connect(u64 address, u32 data);
    /// Rings wait for the next connect(), as behind the mask bit of an MSI-X table entry.
    void disconnect();
    bool connected() const { return connected_; }
    /// A ring waits (the pending bit of a masked MSI-X entry).
    bool pending() const;

  private:
    void rung();

    MsiSink& sink_;
    InterruptChips* chips_;
    EventLoop& loop_;
    OwnedFd fd_;
    bool connected_ = false;
    std::mutex mutex_;  // a leaf; not held while the message is sent
    u64 address_ = 0;
    u32 data_ = 0;
};

}  // namespace polyvisor
