// Looking into frames: where the headers are, Internet checksums (RFC 1071), and in software what
// an end does not do by itself: checksums and TCP segmentation.
#pragma once

#include <functional>
#include <optional>
#include <span>

#include "net/end.hpp"

namespace polyvisor::net {

inline u16 load_be16(const u8* at) {
    return static_cast<u16>(at[0] << 8 | at[1]);
}
inline u32 load_be32(const u8* at) {
    return u32{load_be16(at)} << 16 | load_be16(at + 2);
}
inline void store_be16(u8* at, u32 value) {
    at[0] = static_cast<u8>(value >> 8);
    at[1] = static_cast<u8>(value);
}
inline void store_be32(u8* at, u32 value) {
    store_be16(at, value >> 16);
    store_be16(at + 2, value);
}

inline constexpr u8 kIcmp = 1, kTcp = 6, kUdp = 17;

/// Where the headers of an IP packet are in its frame. What the fields say lies within it.
struct Layout {
    bool ipv6 = false;
    u8 protocol = 0;        ///< of the first header that is none of IPv6's extensions
    bool fragment = false;  ///< a part of a datagram: behind the IP header is no other one
    u32 ip = 0;             ///< offset of the IP header
    u32 transport = 0;      ///< of what follows it
    u32 payload = 0;        ///< TCP and UDP: of their data, if the frame has the whole header
    u32 end = 0;            ///< of the packet; the frame may be longer (padding)
};
/// Nothing: no IP, or its header is cut short or wrong.
std::optional<Layout> locate(std::span<const u8> frame);

/// The sum of 16-bit words, folded, as the host reads them.
u16 sum(std::span<const u8> bytes, u64 start = 0);
/// That of the pseudo header for a TCP or UDP packet of `size` bytes: what stands in the checksum's
/// field of a frame with kNeedsChecksum.
u16 pseudo_header_sum(std::span<const u8> frame, const Layout& layout, u32 size);
/// A TCP or UDP checksum over [transport, end), pseudo header included, ready to be stored with
/// memcpy; its field counts as it is, so it must be zero.
u16 transport_checksum(std::span<const u8> frame, const Layout& layout, u32 end);

/// Does what kNeedsChecksum asks for. False: the header points out of the frame.
bool finish_checksum(const FrameHeader& header, std::span<u8> frame);
/// Writes the checksums of a TCP packet anew. False: it is none.
bool finish_tcp(std::span<u8> frame);

/// Cuts a frame with a `gso` of TCP into segments of at most `header.gso_size` of payload, whose
/// checksums are complete, and calls `each` with them, in turn, in the same memory. False: header
/// and frame do not go together.
using EachSegment = std::function<void(std::span<u8> segment)>;
bool segment_tcp(const FrameHeader& header, std::span<const u8> frame, const EachSegment& each);

/// Cuts an IPv4 packet that is longer than `mtu` into fragments. False: it is none, or must not be
/// cut.
bool fragment_ipv4(std::span<const u8> frame, u32 mtu, const EachSegment& each);

}  // namespace polyvisor::net
