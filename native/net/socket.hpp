// Unix sockets as cables, between two machines or to a switch of one's own: a stream in which a
// frame's length stands before it, in four bytes, the highest first, as QEMU's `-netdev stream` has
// it; or datagrams of one frame each (`-netdev dgram`).
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/log.hpp"
#include "bus/event_loop.hpp"
#include "net/end.hpp"
#include "net/fd_watch.hpp"
#include "net/wakeup.hpp"

namespace polyvisor::net {

class StreamSocket final : public End {
  public:
    /// `listen`: makes the socket and waits for a peer, and for the next one when it has gone. Else
    /// connects; a peer that goes is not looked for again. Without a peer the link is down. Throws
    /// HostError, ConfigError.
    StreamSocket(EventLoop& loop, Log* log, const std::string& path, bool listen);
    ~StreamSocket() override;

    std::string name() const override { return "stream " + path_; }
    void attach(Port* port) override;
    bool send(unsigned queue, const FrameHeader& header, std::span<u8> frame) override;
    void wake(unsigned) override { wakeup_->raise(); }

    /// Bytes that wait for the peer; frames beyond are dropped.
    static constexpr std::size_t kMostWaiting = 1 << 20;

  private:
    void accept();
    void serve(u32 events);
    bool read();
    bool deliver();
    bool write_waiting();
    void plug(OwnedFd peer);
    void unplug(const std::string& why);
    void set_events();

    Log* log_;
    const std::string path_;
    OwnedFd listener_;
    FdWatch listening_, reading_;
    Port* port_ = nullptr;

    // The event loop's thread only: what came, and has not been delivered.
    std::vector<u8> in_;
    std::size_t in_start_ = 0, in_end_ = 0;
    std::atomic<bool> no_room_{false};

    std::mutex mutex_;
    OwnedFd peer_;
    std::vector<u8> out_;  // what the peer has not taken

    std::unique_ptr<Wakeup> wakeup_;  // last: gone first
};

class DatagramSocket final : public End {
  public:
    /// Bound to `path`, sends to `peer`, which need not be there yet. Throws HostError,
    /// ConfigError.
    DatagramSocket(EventLoop& loop, Log* log, const std::string& path, const std::string& peer);
    ~DatagramSocket() override;

    std::string name() const override { return "dgram " + path_; }
    void attach(Port* port) override;
    bool send(unsigned queue, const FrameHeader& header, std::span<u8> frame) override;
    void wake(unsigned) override { wakeup_->raise(); }

  private:
    void read();

    const std::string path_, peer_;
    OwnedFd fd_;
    FdWatch reading_;
    Port* port_ = nullptr;
    std::vector<u8> buffer_;   // the event loop's thread only, as is:
    std::size_t waiting_ = 0;  // bytes of a frame that found no room
    std::unique_ptr<Wakeup> wakeup_;
};

}  // namespace polyvisor::net
