// What a network frame costs the host outside the CPU engine: a driver without Linux, the device,
// and user networking. Arguments: what ("user": datagrams of 1400 bytes through libslirp to a
// socket of the host; "send": frames to an end that does nothing; "segments": frames of 64 KiB to
// such an end, which are cut and summed; "receive": frames to the guest), frames. Prints
// nanoseconds of the process's CPU time per frame (of segments: per segment), which the driver's
// own part is in.
#include <arpa/inet.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "net/user.hpp"
#include "virtio/fake_guest.hpp"
#include "virtio/net.hpp"

#include "frames.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;

namespace {

double cpu_seconds() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Nothing final : net::End {
    std::string name() const override { return "nothing"; }
    void attach(net::Port*) override {}
    bool send(unsigned, const net::FrameHeader&, std::span<u8>) override { return ++frames; }
    u64 frames = 0;
};

std::vector<u8> with_header(const net::FrameHeader& header, const std::vector<u8>& frame) {
    const NetHeader whole{header, 0};
    const u8* from = reinterpret_cast<const u8*>(&whole);
    std::vector<u8> result(from, from + sizeof whole);
    result.insert(result.end(), frame.begin(), frame.end());
    return result;
}

// Sixteen at a time, as a driver with more to send has it.
void transmit(FakeGuest& guest, const std::vector<u8>& bytes, int frames) {
    const u64 at = guest.buffer(bytes);
    for (int n = 0; n < frames; n += 16) {
        for (int i = 0; i < 16; ++i) {
            guest.driver(1).add({{at, static_cast<u32>(bytes.size()), false}});
        }
        guest.kick(1);
        while (guest.driver(1).get()) {
        }
    }
}

void receive(Net& card, FakeGuest& guest, const std::vector<u8>& frame, int frames) {
    const u64 at = guest.buffer(2048);
    for (int n = 0; n < frames; ++n) {
        guest.driver(0).add({{at, 2048, true}});
        guest.kick(0);
        if (!card.inject(frame)) std::abort();
        guest.driver(0).get();
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const std::string what = argv[1];
    const int frames = std::atoi(argv[2]);
    GuestMemory memory;
    memory.add(Gpa(0), 16 << 20, "ram");
    Clock clock;
    EventLoop loop(clock);
    std::unique_ptr<net::End> end;
    auto* nothing = new Nothing;
    end.reset(nothing);
    pvtest::TcpFrame frame;
    frame.payload.resize(1400);
    const int sink = ::socket(AF_INET, SOCK_DGRAM, 0);
    if (what == "user") {
        sockaddr_in address{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
        socklen_t size = sizeof address;
        if (::bind(sink, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
            ::getsockname(sink, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
            return 1;
        }
        end = std::make_unique<net::User>(loop, nullptr, net::UserConfig{});
        nothing = nullptr;
        frame.protocol = net::kUdp;
        frame.port = ntohs(address.sin_port);
    } else if (what == "segments") {
        frame.payload.resize(45 * 1448);
    }
    Net card(Environment{memory, loop}, std::move(end), NetConfig{.mac = {2, 0, 0, 0, 0, 1}});
    FakeGuest guest(card, memory);
    const auto bytes = what == "segments" ? with_header(frame.header(1448), frame.bytes(true))
                                          : with_header(frame.header(), frame.bytes(true));
    const double begin = cpu_seconds();
    if (what == "receive") {
        receive(card, guest, frame.bytes(), frames);
    } else {
        transmit(guest, bytes, frames);
    }
    const double seconds = cpu_seconds() - begin;
    double count = frames;
    if (what == "user") {
        char first[2048];
        if (::recv(sink, first, sizeof first, MSG_DONTWAIT) != 1400) return 1;
    } else if (nothing != nullptr && what != "receive") {
        count = static_cast<double>(nothing->frames);
    }
    std::printf("%.0f\n", seconds * 1e9 / count);
}
