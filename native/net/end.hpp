// What a network card is plugged into: a cable's other end. Frames are Ethernet frames without
// preamble and checksum, each with a header that tells what is left to do with it.
//
// To add an end: derive from End, answer send(), and call port().receive() for what arrives.
//
// Threads and locks. send() and flush() run with the transmit queue held, on the vCPU's thread or
// the event loop's. receive() takes a receive queue. So: transmit queue, the end's own mutex,
// receive queue; wake() runs with a receive queue held and must take no lock of the end (Wakeup
// hands it over to the event loop).
#pragma once

#include <span>
#include <string>

#include "base/types.hpp"

namespace polyvisor::net {

/// struct virtio_net_hdr (virtio 1.2, 5.1.6), without num_buffers; also what a tap with
/// IFF_VNET_HDR has before each frame.
struct FrameHeader {
    enum Flag : u8 {
        kNeedsChecksum = 1,  ///< the sum from checksum_start on is to be put at checksum_offset
        kDataValid = 2,      ///< the checksums have been looked at, and are right
    };
    enum Gso : u8 { kNone = 0, kTcp4 = 1, kUdp = 3, kTcp6 = 4, kUdpL4 = 5, kEcn = 0x80 };

    u8 flags = 0;
    u8 gso = kNone;
    u16 header_length = 0;
    u16 gso_size = 0;  ///< payload of a segment
    u16 checksum_start = 0;
    u16 checksum_offset = 0;  ///< from checksum_start

    u8 gso_type() const { return gso & static_cast<u8>(~kEcn); }
};
static_assert(sizeof(FrameHeader) == 10);

/// What one side leaves to the other.
enum Offload : u32 {
    kChecksum = 1,  ///< frames with kNeedsChecksum
    kTso4 = 2,      ///< frames of up to 64 KiB with kTcp4 and a gso_size
    kTso6 = 4,
    kEcnTso = 8,
    /// TCP segments of up to 64 KiB as they are, with their checksum: the end is no wire.
    kAnySize = 16,
};

/// The longest frame: 64 KiB of IP, Ethernet's header, two VLAN tags.
inline constexpr u32 kLongestFrame = 65535 + 14 + 8;

/// The machine's side.
class Port {
  public:
    enum class Outcome {
        kTaken,
        kDropped,  ///< the guest does not want it, or has no network driver at present
        kNoRoom,   ///< keep it (End::wake() tells when there is room) or drop it
    };
    virtual ~Port() = default;
    /// A frame for the guest. `queue` is the End's.
    virtual Outcome receive(unsigned queue, const FrameHeader& header,
                            std::span<const u8> frame) = 0;
    /// The cable was pulled, or plugged in again.
    virtual void carrier(bool up) = 0;
};

class End {
  public:
    virtual ~End() = default;

    /// For people: "user", "tap tap0".
    virtual std::string name() const = 0;
    /// Offload bits of frames that send() takes.
    virtual u32 takes() const { return 0; }
    /// Offload bits that receive() may be given, when offer() allows them.
    virtual u32 gives() const { return 0; }
    virtual unsigned queues() const { return 1; }

    /// Once, before anything else; nullptr at the end, after which receive() is not called.
    virtual void attach(Port* port) = 0;
    /// The guest has a driver, which takes `offloads` of gives(). Frames may come from here on.
    virtual void start(u32 offloads) { (void)offloads; }
    /// The driver is gone.
    virtual void stop() {}

    /// A frame of the guest's. One that cannot be sent now is dropped: false.
    virtual bool send(unsigned queue, const FrameHeader& header, std::span<u8> frame) = 0;
    /// The last of a batch has been sent.
    virtual void flush(unsigned queue) { (void)queue; }
    /// There is room again after kNoRoom.
    virtual void wake(unsigned queue) { (void)queue; }
};

}  // namespace polyvisor::net
