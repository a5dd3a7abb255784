// Frames for tests of networks, and the plainest way to check them: byte by byte, as RFC 791, 793
// and 1071 say.
#pragma once

#include <span>
#include <vector>

#include "net/end.hpp"
#include "net/packet.hpp"
#include "random.hpp"

namespace pvtest {

using namespace polyvisor;

using Bytes = std::vector<u8>;

inline void put16(Bytes& bytes, u32 value) {
    bytes.push_back(static_cast<u8>(value >> 8));
    bytes.push_back(static_cast<u8>(value));
}

inline u32 slow_sum(std::span<const u8> bytes) {
    u64 total = 0;
    for (std::size_t i = 0; i < bytes.size(); ++i) total += u64{bytes[i]} << (i % 2 ? 0 : 8);
    while (total > 0xffff) total = (total & 0xffff) + (total >> 16);
    return static_cast<u32>(total);
}

struct TcpFrame {
    bool ipv6 = false;
    bool vlan = false;
    u32 ip_options = 0, tcp_options = 0;  // words
    u8 flags = 0x18;
    u32 sequence = 1;
    u16 identification = 7;
    u8 protocol = net::kTcp;
    u16 source = 40000, port = 80;
    Bytes payload;

    u32 ip() const { return vlan ? 18 : 14; }
    u32 tcp() const { return ip() + (ipv6 ? 40 : 20 + 4 * ip_options); }
    u32 data() const { return tcp() + (protocol == net::kTcp ? 20 + 4 * tcp_options : 8); }

    /// With all checksums; or with the pseudo header's only, as a driver leaves it.
    Bytes bytes(bool partial = false) const {
        Bytes out = {0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x52, 0x55, 10, 0, 2, 2};
        if (vlan) {
            put16(out, 0x8100);
            put16(out, 5);
        }
        put16(out, ipv6 ? 0x86dd : 0x0800);
        const u32 transport =
            static_cast<u32>(payload.size()) + (protocol == net::kTcp ? 20 + 4 * tcp_options : 8);
        if (ipv6) {
            out.insert(out.end(), {0x60, 0, 0, 0});
            put16(out, transport);
            out.insert(out.end(), {protocol, 64});
            for (u8 i = 0; i < 32; ++i) out.push_back(static_cast<u8>(i * 7 + 3));
        } else {
            out.push_back(static_cast<u8>(0x45 + ip_options));
            out.push_back(0);
            put16(out, 20 + 4 * ip_options + transport);
            put16(out, identification);
            put16(out, 0);
            out.insert(out.end(), {64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2});
            out.insert(out.end(), 4 * ip_options, 1);
            const u32 sum = ~slow_sum(std::span(out).subspan(ip(), 20 + 4 * ip_options)) & 0xffff;
            net::store_be16(out.data() + ip() + 10, sum);
        }
        put16(out, source);
        put16(out, port);
        if (protocol == net::kTcp) {
            put16(out, sequence >> 16);
            put16(out, sequence);
            out.insert(out.end(), {1, 2, 3, 4});
            out.push_back(static_cast<u8>((5 + tcp_options) << 4));
            out.push_back(flags);
            out.insert(out.end(), {0x20, 0, 0, 0, 0, 0});
            out.insert(out.end(), 4 * tcp_options, 1);
        } else {
            put16(out, transport);
            put16(out, 0);
        }
        out.insert(out.end(), payload.begin(), payload.end());
        const u32 field = tcp() + (protocol == net::kTcp ? 16 : 6);
        const u32 sum = partial ? pseudo(out, transport) : ~slow_transport(out, transport) & 0xffff;
        net::store_be16(out.data() + field, !partial && sum == 0 ? 0xffff : sum);
        return out;
    }
    u32 pseudo(const Bytes& out, u32 size) const {
        Bytes head(out.begin() + ip() + (ipv6 ? 8 : 12), out.begin() + ip() + (ipv6 ? 40 : 20));
        put16(head, size >> 16);
        put16(head, size);
        put16(head, protocol);
        return slow_sum(head);
    }
    u32 slow_transport(const Bytes& out, u32 size) const {
        const u32 total = pseudo(out, size) + slow_sum(std::span(out).subspan(tcp(), size));
        return (total & 0xffff) + (total >> 16);
    }
    /// The transport checksum of `out`, which is a frame like this one, is right.
    bool right(const Bytes& out) const {
        return slow_transport(out, static_cast<u32>(out.size()) - tcp()) == 0xffff;
    }
    net::FrameHeader header(u16 gso_size = 0) const {
        net::FrameHeader result;
        result.flags = net::FrameHeader::kNeedsChecksum;
        result.checksum_start = static_cast<u16>(tcp());
        result.checksum_offset = protocol == net::kTcp ? 16 : 6;
        if (gso_size != 0) {
            result.gso = ipv6 ? net::FrameHeader::kTcp6 : net::FrameHeader::kTcp4;
            result.gso_size = gso_size;
            result.header_length = static_cast<u16>(data());
        }
        return result;
    }
};

inline Bytes random_bytes(Random& random, u32 size) {
    Bytes result(size);
    for (u8& byte : result) byte = static_cast<u8>(random.next());
    return result;
}

inline TcpFrame random_tcp(Random& random, u32 most) {
    TcpFrame frame;
    frame.ipv6 = random.one_in(2);
    frame.vlan = random.one_in(4);
    frame.ip_options = frame.ipv6 ? 0 : random.below(4);
    frame.tcp_options = random.below(11);
    frame.flags = static_cast<u8>(random.next());
    frame.sequence = static_cast<u32>(random.next());
    frame.identification = static_cast<u16>(random.next());
    frame.payload = random_bytes(random, random.below(most + 1));
    return frame;
}

}  // namespace pvtest
