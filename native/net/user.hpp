// User networking: a whole network behind one NAT, in this process, without privileges (libslirp).
// The guest finds a router (10.0.2.2, which is also the host), a DHCP server that gives it
// 10.0.2.15, and a name server (10.0.2.3); what it connects to is connected to by this process.
// The host reaches the guest through forwarded ports.
//
// One mutex is around libslirp. The transmit queue calls into it where the guest notified, without
// a change of threads; its sockets and timers are served by the event loop. All of them are behind
// one epoll descriptor, so that the set of sockets can change on any thread without the loop.
//
// TCP towards the guest comes in segments of up to 64 KiB when the guest's driver takes them (TSO):
// the maximum segment size that the guest announces is raised on the way. There is no wire between
// the two that could not carry it, and the guest has a packet where there would be 45.
#pragma once

#include <netinet/in.h>
#include <poll.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/log.hpp"
#include "bus/event_loop.hpp"
#include "net/end.hpp"
#include "net/slirp_library.hpp"
#include "net/wakeup.hpp"

namespace polyvisor::net {

/// A port of the host's whose connections (or datagrams) go to a port of the guest's.
struct Forward {
    bool udp = false;
    std::string host_address = "127.0.0.1";  ///< IPv4; "0.0.0.0": of all interfaces
    u16 host_port = 0;                       ///< 0: any that is free
    std::string guest_address = "10.0.2.15";
    u16 guest_port = 0;

    bool operator==(const Forward&) const = default;
};

struct UserConfig {
    /// The guest reaches nothing but this network; forwarded ports work.
    bool restricted = false;
    u32 mtu = 1500;  ///< the guest's
    bool ipv6 = true;
    std::string hostname = "guest";  ///< that DHCP gives
    std::vector<Forward> forwards;
};

class User final : public End {
  public:
    /// Throws ConfigError for a forward that cannot be, HostError without libslirp.
    User(EventLoop& loop, Log* log, const UserConfig& config);
    ~User() override;

    std::string name() const override { return "user"; }
    u32 takes() const override { return kAnySize; }
    u32 gives() const override { return kChecksum | kTso4 | kTso6; }
    void attach(Port* port) override;
    void start(u32 offloads) override;
    void stop() override;
    bool send(unsigned queue, const FrameHeader& header, std::span<u8> frame) override;
    void flush(unsigned queue) override;
    void wake(unsigned queue) override;

    /// The forward with the port that was chosen. Throws ConfigError (field "forward") for an
    /// address that is none and a port that is taken.
    Forward add_forward(const Forward& forward);
    /// By its host's side. Throws ConfigError when there is none.
    void remove_forward(const Forward& forward);
    std::vector<Forward> forwards() const;
    /// Frames that found the guest without buffers, and more than kMostWaiting before them.
    u64 dropped() const { return dropped_.load(std::memory_order_relaxed); }

    /// Bytes of frames that wait for the guest's buffers.
    static constexpr std::size_t kMostWaiting = 4 << 20;

  private:
    struct SlirpTimer;

    // libslirp's callbacks
    static SlirpCb callbacks();
    static ssize_t on_frame(const void* frame, size_t size, void* self);
    static void forget(int fd, void* self);

    void receive(std::span<const u8> frame);
    void give(const FrameHeader& header, std::span<const u8> frame);
    bool give_now(const FrameHeader& header, std::span<const u8> frame);
    void give_waiting();
    void on_events();
    void run_timers();
    void refresh();
    void arm(s64 milliseconds);
    void watch(int fd, u32 events);
    Forward add_forward_locked(const Forward& forward);

    EventLoop& loop_;
    Log* log_;
    const SlirpLibrary& library_;
    UserConfig config_;
    const SlirpCb callbacks_;
    OwnedFd epoll_, timer_;
    std::atomic<u64> dropped_{0};
    std::atomic<u32> offloads_{0};

    mutable std::mutex mutex_;
    Slirp* slirp_ = nullptr;
    Port* port_ = nullptr;
    std::vector<pollfd> polls_;   // what libslirp waits for, as it was last asked
    std::map<int, u32> watched_;  // epoll's events, by descriptor
    std::vector<std::unique_ptr<SlirpTimer>> timers_;
    s64 armed_ = 0;  // milliseconds of the clock; 0: not
    struct Waiting {
        FrameHeader header;
        std::vector<u8> frame;
    };
    std::deque<Waiting> waiting_;
    std::size_t waiting_bytes_ = 0;
    std::vector<u8> scratch_;
    std::vector<Forward> forwards_;

    std::unique_ptr<Wakeup> wakeup_;  // last: gone first
};

}  // namespace polyvisor::net
