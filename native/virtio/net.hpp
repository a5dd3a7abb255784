// virtio-net (virtio 1.2, 5.1): a network card whose cable ends in a net::End.
//
// Checksums and segmentation that the driver leaves to the device are done here when the end does
// not do them, so a driver is offered the same whatever the end is. Towards the guest, frames are
// passed on as the end gives them, in as many buffers as they need.
//
// Queue 2n receives, 2n + 1 transmits, the last one controls. A transmit queue is served where the
// driver notifies, up to the end's send(); an end that gives frames finds receive() here. The
// queues' ranks are therefore: transmit, the end's mutex, receive (of which one is held at a time).
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "net/capture.hpp"
#include "net/end.hpp"
#include "net/wakeup.hpp"
#include "virtio/device.hpp"
#include "virtio/net_filter.hpp"

namespace polyvisor::virtio {

/// Feature bits (5.1.3).
enum NetFeature : u64 {
    kNetCsum = bit(0),
    kNetGuestCsum = bit(1),
    kNetCtrlGuestOffloads = bit(2),
    kNetMtu = bit(3),
    kNetMac = bit(5),
    kNetGuestTso4 = bit(7),
    kNetGuestTso6 = bit(8),
    kNetGuestEcn = bit(9),
    kNetHostTso4 = bit(11),
    kNetHostTso6 = bit(12),
    kNetHostEcn = bit(13),
    kNetMergeable = bit(15),
    kNetStatus = bit(16),
    kNetCtrlVq = bit(17),
    kNetCtrlRx = bit(18),
    kNetCtrlVlan = bit(19),
    kNetCtrlRxExtra = bit(20),
    kNetMq = bit(22),
    kNetCtrlMac = bit(23),
};

/// Before each frame in its buffers (5.1.6): the size with VIRTIO_F_VERSION_1.
struct NetHeader {
    net::FrameHeader frame;
    u16 buffers = 1;
};
static_assert(sizeof(NetHeader) == 12);

struct NetConfig {
    MacAddress mac{};
    u16 mtu = 0;         ///< 0: not told; the driver takes 1500
    unsigned pairs = 1;  ///< of receive and transmit queues
    u16 queue_size = 256;
};

struct NetCounters {
    u64 rx_frames = 0, rx_bytes = 0;
    u64 rx_dropped = 0;   ///< no driver, link down, or longer than the driver's buffers
    u64 rx_filtered = 0;  ///< not for this guest
    u64 rx_waits = 0;     ///< times that the guest had no buffers
    u64 tx_frames = 0, tx_bytes = 0;
    u64 tx_dropped = 0;  ///< malformed, link down, or the end could not send
};

class Net final : public Device, private net::Port {
  public:
    static constexpr unsigned kMostPairs = 16;
    /// Frames that are sent in one go; the event loop goes on with the rest, so that a guest that
    /// never stops sending keeps nobody from his work.
    static constexpr int kBurst = 256;

    /// Throws ConfigError for numbers out of bounds.
    Net(const Environment& environment, std::unique_ptr<net::End> end, const NetConfig& config);
    ~Net() override;

    net::End& end() { return *end_; }
    unsigned pairs() const { return config_pairs_; }
    MacAddress mac() const { return config<MacAddress>(0); }
    /// The cable, as the host pulls it. The link is up when the end's is, too.
    void set_link(bool up);
    bool link() const { return plugged_ && carrier_; }
    /// A frame for the guest from somebody else than the end. False: it is not taken.
    bool inject(std::span<const u8> frame) { return receive(0, {}, frame) == Outcome::kTaken; }
    NetCounters counters() const;
    /// Frames of both directions, as the end sees them.
    net::Capture& capture() { return capture_; }
    /// Pairs that the driver uses.
    unsigned active_pairs() const { return active_pairs_.load(std::memory_order_relaxed); }

  private:
    // A receive queue's chains of one frame, and what a transmit queue needs.
    struct Pair {
        std::vector<Chain> rx;
        std::atomic<u32> starved{0};  // bits: queues of the end that wait for wake()
        Chain tx;
        std::vector<u8> frame;
    };

    static Description describe(const net::End& end, const NetConfig& config);

    void serve(unsigned index, Queue& queue) override;
    bool accept(u64 features) override;
    void start(u64 features) override;
    void stop() override;
    std::vector<u8> save_device() const override;
    void restore_device(std::span<const u8> state) override;

    // net::Port
    Outcome receive(unsigned queue, const net::FrameHeader& header,
                    std::span<const u8> frame) override;
    void carrier(bool up) override;

    void transmit(unsigned pair, Queue& queue);
    bool transmit_one(unsigned pair, const Chain& chain);
    bool send(unsigned pair, net::FrameHeader header, std::span<u8> frame);
    bool pass(unsigned pair, const net::FrameHeader& header, std::span<u8> frame);
    Outcome put(Pair& own, Queue& queue, net::FrameHeader header, std::span<const u8> frame);
    unsigned choose_pair(unsigned end_queue, std::span<const u8> frame) const;
    void control(Queue& queue);
    bool control(std::span<const u8> request);
    void start_end(u64 features);
    void show_link();

    unsigned control_queue() const { return has(kNetMq) ? 2 * config_pairs_ : 2; }

    std::unique_ptr<net::End> end_;
    const unsigned config_pairs_;
    const MacAddress mac_;
    std::vector<std::unique_ptr<Pair>> pairs_;
    Chain control_chain_;
    net::Capture capture_;

    std::atomic<bool> plugged_{true}, carrier_{true};
    std::atomic<unsigned> active_pairs_{1};
    std::atomic<u32> guest_offloads_{0};          // what the end may give
    std::atomic<u32> allowed_offloads_{~u32{0}};  // by VIRTIO_NET_CTRL_GUEST_OFFLOADS
    // Which pair a flow was last seen on, so that its other direction is given to the same CPU
    // (5.1.6.5.5).
    std::array<std::atomic<u8>, 256> flows_{};

    mutable std::mutex filter_mutex_;  // a leaf
    NetFilter filter_;

    struct Counters {
        std::atomic<u64> rx_frames, rx_bytes, rx_dropped, rx_filtered, rx_waits;
        std::atomic<u64> tx_frames, tx_bytes, tx_dropped;
    };
    Counters counters_{};

    std::atomic<u32> unfinished_{0};      // bits: pairs whose transmit queue has more than a burst
    std::unique_ptr<net::Wakeup> go_on_;  // last: gone first
};

}  // namespace polyvisor::virtio
