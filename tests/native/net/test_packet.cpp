// Checksums, segments and fragments, against the plainest models.
#include "net/packet.hpp"

#include "check.hpp"
#include "frames.hpp"

using namespace polyvisor;
using namespace pvtest;
using net::FrameHeader;

namespace {

void test_sum() {
    Random random(1);
    for (int n = 0; n < 3000; ++n) {
        const Bytes bytes = random_bytes(random, random.below(200));
        const u16 got = net::sum(bytes);
        CHECK_EQ(net::load_be16(reinterpret_cast<const u8*>(&got)), slow_sum(bytes));
    }
    const Bytes ones(65549, 0xff);  // the most that can be carried
    CHECK_EQ(u32{net::sum(ones)}, 0xffu + 0u);
}

void test_locate() {
    Random random(2);
    for (int n = 0; n < 3000; ++n) {
        TcpFrame frame = random_tcp(random, 100);
        if (random.one_in(3)) frame.protocol = net::kUdp;
        Bytes bytes = frame.bytes();
        const u32 size = static_cast<u32>(bytes.size());
        bytes.resize(bytes.size() + random.below(20));  // padding
        const auto layout = net::locate(bytes);
        CHECK(layout.has_value());
        if (!layout) continue;
        CHECK_EQ(layout->ip, frame.ip());
        CHECK_EQ(layout->transport, frame.tcp());
        CHECK_EQ(layout->payload, frame.data());
        CHECK_EQ(layout->end, size);
        CHECK_EQ(layout->ipv6, frame.ipv6);
        CHECK_EQ(layout->protocol, frame.protocol);
        bytes.resize(random.below(size));
        CHECK(!net::locate(bytes));  // cut short
    }
}

void test_finish() {
    Random random(3);
    for (int n = 0; n < 2000; ++n) {
        TcpFrame frame = random_tcp(random, 300);
        if (random.one_in(3)) frame.protocol = net::kUdp;
        const Bytes want = frame.bytes();
        Bytes got = frame.bytes(true);
        CHECK(net::finish_checksum(frame.header(), got));
        CHECK(frame.right(got));
        if (frame.protocol == net::kUdp) {
            CHECK(net::load_be16(got.data() + frame.tcp() + 6) != 0);
        } else {
            Bytes whole = frame.bytes(true);
            CHECK(net::finish_tcp(whole));
            CHECK(frame.right(whole));
        }
        FrameHeader wrong = frame.header();
        wrong.checksum_start = static_cast<u16>(random.next());
        wrong.checksum_offset = static_cast<u16>(random.next());
        const bool inside = u32{wrong.checksum_start} + wrong.checksum_offset + 2 <= got.size();
        CHECK_EQ(net::finish_checksum(wrong, got), inside);
    }
}

void test_segments() {
    Random random(4);
    for (int n = 0; n < 400; ++n) {
        const TcpFrame frame = random_tcp(random, random.one_in(4) ? 65000 : 5000);
        const u32 size =
            1 + random.below(random.one_in(2) ? 3000 : 200) + frame.payload.size() / 5000;
        const Bytes whole = frame.bytes(true);
        Bytes data;
        u32 count = 0;
        bool last_seen = false;
        CHECK(net::segment_tcp(frame.header(static_cast<u16>(size)), whole, [&](std::span<u8> got) {
            const u32 here = static_cast<u32>(got.size()) - frame.data();
            TcpFrame want = frame;
            want.payload.assign(got.begin() + frame.data(), got.end());
            want.sequence += static_cast<u32>(data.size());
            want.identification = static_cast<u16>(want.identification + count);
            const bool last = data.size() + here == frame.payload.size();
            if (!last) want.flags &= 0xf6;       // FIN and PSH end the last one
            if (count != 0) want.flags &= 0x7f;  // CWR begins the first
            CHECK(here <= size && (last || here == size) && !last_seen);
            last_seen = last;
            const Bytes expected = want.bytes();
            Bytes bytes(got.begin(), got.end());
            CHECK(frame.right(bytes));
            // Zero has two forms in a checksum; the rest must be the same.
            std::fill_n(bytes.begin() + frame.tcp() + 16, 2, 0);
            Bytes bare = expected;
            std::fill_n(bare.begin() + frame.tcp() + 16, 2, 0);
            CHECK(bytes == bare);
            data.insert(data.end(), want.payload.begin(), want.payload.end());
            ++count;
        }));
        CHECK(data == frame.payload && last_seen);
    }
}

void test_refusals() {
    TcpFrame frame;
    frame.payload.assign(3000, 1);
    auto refused = [](const FrameHeader& header, const Bytes& bytes) {
        return !net::segment_tcp(header, bytes, [](std::span<u8>) {});
    };
    CHECK(!refused(frame.header(1000), frame.bytes()));
    FrameHeader header = frame.header(1000);
    header.gso = FrameHeader::kTcp6;  // of an IPv4 packet
    CHECK(refused(header, frame.bytes()));
    header = frame.header(1000);
    header.gso_size = 0;
    CHECK(refused(header, frame.bytes()));
    frame.protocol = net::kUdp;
    CHECK(refused(frame.header(1000), frame.bytes()));
    Bytes udp = frame.bytes();
    CHECK(!net::finish_tcp(udp));
}

// Whatever stands in it: answers, and stays within the frame (a sanitizer sees that).
void test_garbage() {
    Random random(5);
    for (int n = 0; n < 20000; ++n) {
        const TcpFrame frame = random_tcp(random, 100);
        Bytes bytes = frame.bytes();
        for (u32 i = 1 + random.below(4); i != 0; --i) {
            bytes[12 + random.below(static_cast<u32>(bytes.size()) - 12)] =
                static_cast<u8>(random.next());
        }
        bytes.resize(random.below(static_cast<u32>(bytes.size()) + 1));
        net::locate(bytes);
        net::segment_tcp(frame.header(1), bytes, [&](std::span<u8> s) { CHECK(s.size() < 300); });
        net::fragment_ipv4(bytes, 68 + random.below(100), [](std::span<u8>) {});
        net::finish_tcp(bytes);
    }
}

void test_fragments() {
    Random random(6);
    for (int n = 0; n < 300; ++n) {
        TcpFrame frame = random_tcp(random, 9000);
        frame.ipv6 = false;
        frame.protocol = net::kUdp;
        const Bytes whole = frame.bytes();
        const u32 mtu = 576 + random.below(1000);
        Bytes data;
        bool more = true;
        CHECK(net::fragment_ipv4(whole, mtu, [&](std::span<u8> got) {
            const auto layout = net::locate(got);
            CHECK(layout && layout->end == got.size() && got.size() <= mtu + frame.ip() && more);
            if (!layout) return;
            const u32 place = net::load_be16(got.data() + layout->ip + 6);
            CHECK_EQ((place & 0x1fff) * 8, static_cast<u32>(data.size()));
            more = place & 0x2000;
            CHECK_EQ(slow_sum(got.subspan(layout->ip, layout->transport - layout->ip)), 0xffffu);
            data.insert(data.end(), got.begin() + layout->transport, got.end());
        }));
        CHECK(!more);
        CHECK(std::equal(data.begin(), data.end(), whole.begin() + frame.tcp(), whole.end()));
    }
}

}  // namespace

int main() {
    test_sum();
    test_locate();
    test_finish();
    test_segments();
    test_refusals();
    test_garbage();
    test_fragments();
    return pvtest::finish("packet");
}
