// User networking by a driver without Linux: its servers, datagrams of the host's both ways, frames
// that wait for buffers, and what is left when it goes.
#include <arpa/inet.h>
#include <dirent.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <map>
#include <optional>
#include <thread>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "check.hpp"
#include "frames.hpp"
#include "net/user.hpp"
#include "virtio/fake_guest.hpp"
#include "virtio/net.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;
using namespace pvtest;

namespace {

constexpr MacAddress kMac{0x52, 0x54, 0, 0x12, 0x34, 0x56};
constexpr u32 kBuffer = 2048;

struct Guest {
    explicit Guest(const net::UserConfig& config = {}, int buffers = 64) : loop(clock) {
        memory.add(Gpa(0), 16 << 20, "ram");
        auto end = std::make_unique<net::User>(loop, nullptr, config);
        user = end.get();
        card = std::make_unique<Net>(Environment{memory, loop}, std::move(end),
                                     NetConfig{.mac = kMac});
        driver = std::make_unique<FakeGuest>(*card, memory);
        out = driver->buffer(kBuffer);
        for (int i = 0; i < buffers; ++i) offer(driver->buffer(kBuffer));
        driver->kick(0);
        loop.start();
    }
    ~Guest() { driver.reset(); }

    void offer(u64 at) { buffers[*driver->driver(0).add({{at, kBuffer, true}})] = at; }
    void send(const Bytes& frame) {
        Bytes whole(sizeof(NetHeader));
        whole.insert(whole.end(), frame.begin(), frame.end());
        memory.write(Gpa(out), whole);
        driver->driver(1).add({{out, static_cast<u32>(whole.size()), false}});
        driver->kick(1);
        CHECK(driver->wait(1).has_value());
    }
    /// The next frame; its buffer goes back to the card.
    std::optional<Bytes> receive() {
        const auto used = driver->wait(0);
        if (!used) return {};
        const u64 at = buffers.extract(used->id).mapped();
        Bytes frame = driver->bytes(at + sizeof(NetHeader), used->written - sizeof(NetHeader));
        offer(at);
        driver->kick(0);
        return frame;
    }
    /// The next frame that is none of libslirp's own (ARP, router advertisements).
    std::optional<net::Layout> receive_udp(Bytes& frame) {
        for (int i = 0; i < 20; ++i) {
            auto got = receive();
            if (!got) return {};
            frame = *got;
            if (frame[12] == 8 && frame[13] == 6) answer_arp(frame);
            const auto layout = net::locate(frame);
            if (layout && !layout->ipv6 && layout->protocol == net::kUdp) return layout;
        }
        return {};
    }
    /// Waits until one more frame found no buffer.
    bool waits_again() {
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (card->counters().rx_waits == waits) {
            if (std::chrono::steady_clock::now() > end) return false;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        waits = card->counters().rx_waits;
        return true;
    }
    void answer_arp(const Bytes& request) {
        Bytes frame(request.begin() + 6, request.begin() + 12);
        frame.insert(frame.end(), kMac.begin(), kMac.end());
        frame.insert(frame.end(), request.begin() + 12, request.begin() + 20);
        put16(frame, 2);
        frame.insert(frame.end(), kMac.begin(), kMac.end());
        frame.insert(frame.end(), request.begin() + 38, request.begin() + 42);
        frame.insert(frame.end(), request.begin() + 22, request.begin() + 32);
        send(frame);
    }

    Clock clock;
    GuestMemory memory;
    EventLoop loop;
    net::User* user;
    std::unique_ptr<Net> card;
    std::unique_ptr<FakeGuest> driver;
    u64 out = 0, waits = 0;
    std::map<u16, u64> buffers;
};

// RFC 2131: a discover is answered with an offer of 10.0.2.15.
void dhcp() {
    Guest guest;
    TcpFrame frame;
    frame.protocol = net::kUdp;
    frame.source = 68;
    frame.port = 67;
    frame.payload.assign(300, 0);
    const Bytes begin{1, 1, 6, 0, 1, 2, 3, 4};
    std::copy(begin.begin(), begin.end(), frame.payload.begin());
    std::copy(kMac.begin(), kMac.end(), frame.payload.begin() + 28);
    const Bytes options{0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255};
    std::copy(options.begin(), options.end(), frame.payload.begin() + 236);
    Bytes bytes = frame.bytes();
    std::fill_n(bytes.begin(), 6, 0xff);
    const Bytes nobody(4, 0), all(4, 255);
    std::copy(nobody.begin(), nobody.end(), bytes.begin() + 26);
    std::copy(all.begin(), all.end(), bytes.begin() + 30);
    std::fill_n(bytes.begin() + 40, 2, 0);  // no UDP checksum
    net::store_be16(bytes.data() + 24, 0);
    net::store_be16(bytes.data() + 24, ~slow_sum(std::span(bytes).subspan(14, 20)) & 0xffff);
    guest.send(bytes);
    Bytes answer;
    const auto layout = guest.receive_udp(answer);
    CHECK(layout.has_value());
    if (!layout) return;
    const auto message = std::span(answer).subspan(layout->payload);
    CHECK_EQ(net::load_be32(message.data() + 4), 0x01020304u);
    CHECK_EQ(net::load_be32(message.data() + 16), 0x0a00020fu);
    CHECK_EQ(message[242], 2);  // an offer
}

struct HostSocket {
    HostSocket() : fd(::socket(AF_INET, SOCK_DGRAM, 0)) {
        sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        socklen_t size = sizeof address;
        CHECK(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
        CHECK(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
        port = ntohs(address.sin_port);
        const timeval limit{10, 0};
        ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    }
    OwnedFd fd;
    u16 port = 0;
};

// A datagram to the host, and an answer that takes three frames to the guest: with few buffers,
// some of them have to wait.
void datagrams() {
    Guest guest({}, 2);
    HostSocket host;
    Random random(1);
    TcpFrame frame;
    frame.protocol = net::kUdp;
    frame.port = host.port;
    for (u32 size : {1u, 1400u, 1472u, 1473u, 4000u, 9000u}) {
        frame.payload = random_bytes(random, std::min(size, 1400u));
        guest.send(frame.bytes());
        Bytes got(65536);
        sockaddr_in from{};
        socklen_t length = sizeof from;
        const ssize_t count = ::recvfrom(host.fd.get(), got.data(), got.size(), 0,
                                         reinterpret_cast<sockaddr*>(&from), &length);
        CHECK_EQ(count, static_cast<ssize_t>(frame.payload.size()));
        got.resize(frame.payload.size());
        CHECK(got == frame.payload);
        const Bytes answer = random_bytes(random, size);
        CHECK(::sendto(host.fd.get(), answer.data(), answer.size(), 0,
                       reinterpret_cast<sockaddr*>(&from), length) > 0);
        // More frames than there are buffers: nothing is taken before one of them has to wait.
        if (size > 2 * 1480) CHECK(guest.waits_again());
        Bytes data, part;
        while (data.size() < size + 8) {
            const auto layout = guest.receive_udp(part);
            CHECK(layout.has_value());
            if (!layout) return;
            CHECK(part.size() <= 1514);
            const u32 place = net::load_be16(part.data() + layout->ip + 6);
            CHECK_EQ((place & 0x1fff) * 8, static_cast<u32>(data.size()));
            data.insert(data.end(), part.begin() + layout->transport, part.begin() + layout->end);
        }
        CHECK(std::equal(data.begin() + 8, data.end(), answer.begin(), answer.end()));
    }
    CHECK_EQ(guest.user->dropped(), u64{0});
}

// The segment size in a SYN is raised on its way to the host, for a driver with large frames: what
// the host then sends comes in fewer, longer frames.
void large_segments() {
    Guest guest({}, 250);
    OwnedFd server(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    CHECK(::bind(server.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
    CHECK(::listen(server.get(), 1) == 0);
    CHECK(::getsockname(server.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    const Bytes data(20000, 'd');
    std::thread host([&] {
        OwnedFd peer(::accept(server.get(), nullptr, nullptr));
        CHECK(::send(peer.get(), data.data(), data.size(), MSG_NOSIGNAL) == 20000);
        char end;
        CHECK(::recv(peer.get(), &end, 1, 0) <= 0);
    });
    TcpFrame frame;
    frame.port = ntohs(address.sin_port);
    frame.tcp_options = 1;  // becomes the segment size
    frame.flags = 2;
    frame.sequence = 1000;
    Bytes syn = frame.bytes();
    const Bytes option{2, 4, 1460 >> 8, 1460 & 255};
    std::copy(option.begin(), option.end(), syn.begin() + frame.tcp() + 20);
    net::finish_tcp(syn);
    guest.send(syn);
    u32 received = 0, longest = 0;
    while (received < data.size()) {
        auto used = guest.driver->wait(0);
        if (!used) break;
        // A frame of several buffers: the header says how many.
        u64 at = guest.buffers.extract(used->id).mapped();
        NetHeader header;
        std::memcpy(&header, guest.driver->bytes(at, sizeof header).data(), sizeof header);
        Bytes got = guest.driver->bytes(at + 12, used->written - 12);
        guest.offer(at);
        for (u16 i = 1; i < header.buffers; ++i) {
            used = guest.driver->wait(0);
            CHECK(used.has_value());
            if (!used) return;
            at = guest.buffers.extract(used->id).mapped();
            const Bytes more = guest.driver->bytes(at, used->written);
            got.insert(got.end(), more.begin(), more.end());
            guest.offer(at);
        }
        guest.driver->kick(0);
        if (got[12] == 8 && got[13] == 6) guest.answer_arp(got);
        const auto layout = net::locate(got);
        if (!layout || layout->protocol != net::kTcp) continue;
        const u8* tcp = got.data() + layout->transport;
        const u32 bytes = layout->end - layout->payload;
        const u32 sequence = net::load_be32(tcp + 4);
        if (got.size() > 1514) {
            CHECK_EQ(header.frame.gso, u8{net::FrameHeader::kTcp4});
            CHECK_EQ(header.frame.gso_size, u16{1460});
            CHECK(header.frame.flags & net::FrameHeader::kNeedsChecksum);
            CHECK(net::finish_checksum(header.frame, got));
        }
        TcpFrame like;
        like.tcp_options = (layout->payload - layout->transport) / 4 - 5;
        CHECK(like.right(Bytes(got.begin(), got.begin() + layout->end)));
        longest = std::max(longest, bytes);
        received += bytes;
        TcpFrame ack = frame;
        ack.tcp_options = 0;
        ack.flags = 0x10;
        ack.sequence = 1001;
        Bytes answer = ack.bytes();
        net::store_be32(answer.data() + ack.tcp() + 8, sequence + bytes + ((tcp[13] & 2) ? 1 : 0));
        net::finish_tcp(answer);
        guest.send(answer);
    }
    CHECK_EQ(received, 20000u);
    CHECK(longest > 1460);
    TcpFrame reset = frame;
    reset.tcp_options = 0;
    reset.flags = 4;
    reset.sequence = 1001;
    guest.send(reset.bytes());
    host.join();
}

int open_descriptors() {
    int count = 0;
    DIR* directory = ::opendir("/proc/self/fd");
    while (::readdir(directory) != nullptr) ++count;
    ::closedir(directory);
    return count;
}

void nothing_is_left() {
    {
        Guest first;
    }  // what libslirp keeps for ever
    const int before = open_descriptors();
    for (int i = 0; i < 5; ++i) {
        net::UserConfig config;
        config.forwards = {{.guest_port = 22}, {.udp = true, .guest_port = 53}};
        Guest guest(config);
        CHECK_EQ(guest.user->forwards().size(), std::size_t{2});
        CHECK_THROWS(guest.user->add_forward(guest.user->forwards()[0]), ConfigError);
        CHECK_THROWS(guest.user->add_forward({.host_address = "x", .guest_port = 1}), ConfigError);
        guest.user->remove_forward(guest.user->forwards()[0]);
        CHECK_EQ(guest.user->forwards().size(), std::size_t{1});
    }
    CHECK_EQ(open_descriptors(), before);
}

}  // namespace

int main() {
    try {
        dhcp();
    } catch (const HostError& error) {
        std::printf("%s\n", error.what());
        return 77;
    }
    datagrams();
    large_segments();
    nothing_is_left();
    return pvtest::finish("net_user");
}
