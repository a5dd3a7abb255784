#include "net/packet.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace polyvisor::net {

namespace {

constexpr u32 kEthernetHeader = 14, kVlanTag = 4;
constexpr u32 kTcpHeader = 20, kUdpHeader = 8, kIpv4Header = 20, kIpv6Header = 40;
constexpr u8 kTcpFin = 0x01, kTcpPush = 0x08, kTcpCwr = 0x80;
constexpr u16 kMoreFragments = 0x2000, kDontFragment = 0x4000, kFragmentOffset = 0x1fff;

u16 fold(u64 value) {
    while (value >> 16) value = (value & 0xffff) + (value >> 16);
    return static_cast<u16>(value);
}

u64 raw_sum(std::span<const u8> bytes) {
    const u8* at = bytes.data();
    std::size_t left = bytes.size();
    u64 total = 0;
    for (; left >= 32; left -= 32, at += 32) {
        u64 words[4];
        std::memcpy(words, at, sizeof words);
        for (u64 word : words) total += (word & 0xffffffff) + (word >> 32);
    }
    for (; left >= 2; left -= 2, at += 2) {
        u16 word;
        std::memcpy(&word, at, sizeof word);
        total += word;
    }
    if (left != 0) total += *at;  // the low byte of the last word
    return total;
}

void store(u8* at, u16 value) {
    std::memcpy(at, &value, sizeof value);
}

void finish_ipv4_header(u8* ip, u32 size) {
    store(ip + 10, 0);
    store(ip + 10, static_cast<u16>(~sum({ip, size})));
}

bool locate_ipv6(std::span<const u8> frame, Layout& layout) {
    const u8* ip = frame.data() + layout.ip;
    if (frame.size() < layout.ip + kIpv6Header || ip[0] >> 4 != 6) return false;
    layout.end = layout.ip + kIpv6Header + load_be16(ip + 4);
    layout.protocol = ip[6];
    layout.transport = layout.ip + kIpv6Header;
    while (true) {
        const u8 next = layout.protocol;
        if (next != 0 && next != 43 && next != 44 && next != 60) return true;
        if (layout.transport + 8 > std::min<std::size_t>(frame.size(), layout.end)) return false;
        const u8* extension = frame.data() + layout.transport;
        layout.protocol = extension[0];
        if (next == 44) {  // a fragment
            layout.fragment = (load_be16(extension + 2) & 0xfff9) != 0;
            layout.transport += 8;
            if (layout.fragment) return true;
        } else {
            layout.transport += 8 + u32{extension[1]} * 8;
        }
    }
}

bool locate_ipv4(std::span<const u8> frame, Layout& layout) {
    const u8* ip = frame.data() + layout.ip;
    if (frame.size() < layout.ip + kIpv4Header || ip[0] >> 4 != 4) return false;
    const u32 header = (ip[0] & 15) * 4u;
    layout.end = layout.ip + load_be16(ip + 2);
    layout.protocol = ip[9];
    layout.transport = layout.ip + header;
    layout.fragment = (load_be16(ip + 6) & (kMoreFragments | kFragmentOffset)) != 0;
    return header >= kIpv4Header;
}

}  // namespace

std::optional<Layout> locate(std::span<const u8> frame) {
    Layout layout;
    u32 at = kEthernetHeader - 2;
    u16 type = 0;
    for (int tags = 0; tags < 3; ++tags, at += kVlanTag) {
        if (frame.size() < at + 2) return {};
        type = load_be16(frame.data() + at);
        if (type != 0x8100 && type != 0x88a8) break;
    }
    layout.ip = at + 2;
    layout.ipv6 = type == 0x86dd;
    if (!layout.ipv6 && type != 0x0800) return {};
    if (!(layout.ipv6 ? locate_ipv6(frame, layout) : locate_ipv4(frame, layout))) return {};
    if (layout.end > frame.size() || layout.transport > layout.end) return {};
    if (layout.fragment) return layout;
    const u32 room = layout.end - layout.transport;
    u32 header = 0;
    if (layout.protocol == kTcp && room >= kTcpHeader) {
        header = (frame[layout.transport + 12] >> 4) * 4u;
        if (header < kTcpHeader || header > room) header = 0;
    } else if (layout.protocol == kUdp && room >= kUdpHeader) {
        header = kUdpHeader;
    }
    if (header != 0) layout.payload = layout.transport + header;
    return layout;
}

u16 sum(std::span<const u8> bytes, u64 start) {
    return fold(raw_sum(bytes) + start);
}

u16 pseudo_header_sum(std::span<const u8> frame, const Layout& layout, u32 size) {
    const u8* ip = frame.data() + layout.ip;
    u8 tail[8] = {};
    store_be32(tail, size);
    tail[7] = layout.protocol;
    return sum(layout.ipv6 ? std::span(ip + 8, 32) : std::span(ip + 12, 8), raw_sum(tail));
}

u16 transport_checksum(std::span<const u8> frame, const Layout& layout, u32 end) {
    const u32 size = end - layout.transport;
    const u16 result = static_cast<u16>(
        ~sum(frame.subspan(layout.transport, size), pseudo_header_sum(frame, layout, size)));
    return result == 0 && layout.protocol == kUdp ? 0xffff : result;
}

bool finish_checksum(const FrameHeader& header, std::span<u8> frame) {
    const u32 start = header.checksum_start, field = start + header.checksum_offset;
    if (field + 2 > frame.size()) return false;
    u16 value = static_cast<u16>(~sum(frame.subspan(start)));
    // Zero means "none" in UDP, and the same as its complement everywhere.
    if (value == 0) value = 0xffff;
    store(frame.data() + field, value);
    return true;
}

bool finish_tcp(std::span<u8> frame) {
    const auto layout = locate(frame);
    if (!layout || layout->protocol != kTcp || layout->payload == 0) return false;
    u8* field = frame.data() + layout->transport + 16;
    store(field, 0);
    store(field, transport_checksum(frame, *layout, layout->end));
    return true;
}

bool segment_tcp(const FrameHeader& header, std::span<const u8> frame, const EachSegment& each) {
    const auto layout = locate(frame);
    const u8 wanted = layout && layout->ipv6 ? FrameHeader::kTcp6 : FrameHeader::kTcp4;
    if (!layout || layout->protocol != kTcp || layout->payload == 0 ||
        header.gso_type() != wanted || header.gso_size == 0) {
        return false;
    }
    const u32 head = layout->payload, payload = layout->end - head;
    if (payload / header.gso_size > 65535 / 8) return false;  // headers only: no driver does that
    const u8* tcp = frame.data() + layout->transport;
    const u32 sequence = load_be32(tcp + 4);
    const u8 flags = tcp[13];
    const u16 identification = load_be16(frame.data() + layout->ip + 4);
    std::vector<u8> segment(head + std::min<u32>(payload, header.gso_size));
    std::copy_n(frame.begin(), head, segment.begin());
    u8* ip = segment.data() + layout->ip;
    u8* out = segment.data() + layout->transport;
    u32 done = 0, count = 0;
    do {
        const u32 size = std::min<u32>(payload - done, header.gso_size);
        const bool first = done == 0, last = done + size == payload;
        std::copy_n(frame.begin() + head + done, size, segment.begin() + head);
        if (layout->ipv6) {
            store_be16(ip + 4, head + size - layout->ip - kIpv6Header);
        } else {
            store_be16(ip + 2, head + size - layout->ip);
            store_be16(ip + 4, identification + count);
            finish_ipv4_header(ip, layout->transport - layout->ip);
        }
        store_be32(out + 4, sequence + done);
        out[13] =
            flags & static_cast<u8>(~((last ? 0 : kTcpFin | kTcpPush) | (first ? 0 : kTcpCwr)));
        store(out + 16, 0);
        const auto whole = std::span(segment).first(head + size);
        store(out + 16, transport_checksum(whole, *layout, head + size));
        each(whole);
        done += size;
        ++count;
    } while (done < payload);
    return true;
}

bool fragment_ipv4(std::span<const u8> frame, u32 mtu, const EachSegment& each) {
    const auto layout = locate(frame);
    if (!layout || layout->ipv6) return false;
    const u8* from = frame.data() + layout->ip;
    const u16 place = load_be16(from + 6);
    const u32 head = layout->transport, data = layout->end - head;
    const u32 header = head - layout->ip;
    if ((place & kDontFragment) || mtu < header + 8) return false;
    const u32 most = (mtu - header) & ~7u;
    std::vector<u8> fragment(head + std::min(data, most));
    std::copy_n(frame.begin(), head, fragment.begin());
    u8* ip = fragment.data() + layout->ip;
    for (u32 done = 0; done < data; done += most) {
        const u32 size = std::min(data - done, most);
        const bool last = done + size == data;
        std::copy_n(frame.begin() + head + done, size, fragment.begin() + head);
        store_be16(ip + 2, header + size);
        store_be16(ip + 6, (place + done / 8) | (last ? 0 : kMoreFragments));
        finish_ipv4_header(ip, header);
        each(std::span(fragment).first(head + size));
    }
    return true;
}

}  // namespace polyvisor::net
