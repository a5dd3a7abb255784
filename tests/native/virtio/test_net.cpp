// virtio-net through a driver without Linux: frames of every size in chains of every shape, what
// the device does for ends that do less than it offers, the control queue, and what drivers do
// wrong.
#include "virtio/net.hpp"

#include <cstring>
#include <deque>
#include <map>

#include "base/error.hpp"
#include "check.hpp"
#include "frames.hpp"
#include "virtio/fake_guest.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;
using namespace pvtest;
using net::FrameHeader;

namespace {

constexpr MacAddress kMac{0x52, 0x54, 0, 0x12, 0x34, 0x56};

class FakeEnd final : public net::End {
  public:
    FakeEnd(u32 takes, u32 gives, unsigned queues)
        : takes_(takes), gives_(gives), queues_(queues) {}
    std::string name() const override { return "fake"; }
    u32 takes() const override { return takes_; }
    u32 gives() const override { return gives_; }
    unsigned queues() const override { return queues_; }
    void attach(net::Port* port) override { this->port = port; }
    void start(u32 offloads) override { started = true, this->offloads = offloads; }
    void stop() override { started = false; }
    bool send(unsigned queue, const FrameHeader& header, std::span<u8> frame) override {
        sent.push_back({queue, header, {frame.begin(), frame.end()}});
        return accepts;
    }
    void flush(unsigned) override { ++flushes; }
    void wake(unsigned queue) override {
        ++wakes;
        woken.push_back(queue);
    }

    struct Sent {
        unsigned queue;
        FrameHeader header;
        Bytes frame;
    };
    std::deque<Sent> sent;
    net::Port* port = nullptr;
    bool started = false, accepts = true;
    u32 offloads = 0;
    int flushes = 0, wakes = 0;
    std::vector<unsigned> woken;

  private:
    u32 takes_, gives_;
    unsigned queues_;
};

struct Setup {
    explicit Setup(u32 takes = 0, u32 gives = 0, unsigned pairs = 1, unsigned end_queues = 1)
        : loop(clock) {
        memory.add(Gpa(0), 64 << 20, "ram");
        auto owned = std::make_unique<FakeEnd>(takes, gives, end_queues);
        end = owned.get();
        net = std::make_unique<Net>(Environment{memory, loop}, std::move(owned),
                                    NetConfig{.mac = kMac, .pairs = pairs});
    }
    Clock clock;
    GuestMemory memory;
    EventLoop loop;
    FakeEnd* end;
    std::unique_ptr<Net> net;
};

Bytes head_of(const FrameHeader& header) {
    const NetHeader whole{header, 0};
    const u8* from = reinterpret_cast<const u8*>(&whole);
    return {from, from + sizeof whole};
}

// Puts header and frame into a chain that is cut anywhere.
void offer(FakeGuest& guest, unsigned queue, const Bytes& bytes, Random& random) {
    std::vector<FakeDriver::Segment> segments;
    const u64 at = guest.buffer(bytes);
    u32 done = 0;
    while (done < bytes.size()) {
        const u32 left = static_cast<u32>(bytes.size()) - done;
        const u32 size = segments.size() > 30 || random.one_in(3) ? left : 1 + random.below(left);
        segments.push_back({at + done, size, false});
        done += size;
    }
    CHECK(guest.driver(queue).add(segments).has_value());
}

Bytes join(Bytes first, const Bytes& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

void transmit_for(u32 takes, u64 features, bool packed) {
    Random random(takes * 16 + packed);
    Setup setup(takes);
    setup.net->offer_packed(packed);
    FakeGuest guest(*setup.net, setup.memory, {.features = features});
    u64 frames = 0;
    for (int n = 0; n < 300; ++n) {
        guest.free_buffers();
        setup.end->sent.clear();
        TcpFrame frame = random_tcp(random, random.one_in(5) ? 60000 : 1400);
        const u16 size = static_cast<u16>(500 + random.below(1000));
        const bool gso = frame.payload.size() > size;
        const bool partial = gso || random.one_in(2);
        const Bytes bytes = frame.bytes(partial);
        const FrameHeader header = gso       ? frame.header(size)
                                   : partial ? frame.header()
                                             : FrameHeader();
        offer(guest, 1, join(head_of(header), bytes), random);
        guest.kick(1);
        const auto used = guest.wait(1);
        CHECK(used && used->written == 0);
        ++frames;
        auto& sent = setup.end->sent;
        const u32 tso = frame.ipv6 ? net::kTso6 : net::kTso4;
        if (gso && (takes & tso)) {
            CHECK(sent.size() == 1 && sent[0].frame == bytes);
            CHECK(sent[0].header.gso_size == size && sent[0].header.flags == header.flags);
        } else if (gso && !(takes & net::kAnySize)) {
            Bytes data;
            for (const auto& each : sent) {
                CHECK(each.header.gso == 0 && each.header.flags == 0 && frame.right(each.frame));
                data.insert(data.end(), each.frame.begin() + frame.data(), each.frame.end());
            }
            CHECK_EQ(sent.size(), (frame.payload.size() + size - 1) / size);
            CHECK(data == frame.payload);
        } else if (partial && (gso || !(takes & net::kChecksum))) {
            CHECK(sent.size() == 1 && frame.right(sent[0].frame) && sent[0].header.flags == 0);
        } else {
            CHECK(sent.size() == 1 && sent[0].frame == bytes);
        }
    }
    CHECK_EQ(setup.net->counters().tx_frames, frames);
    CHECK_EQ(setup.net->counters().tx_dropped, u64{0});
    CHECK(setup.end->flushes > 0);
}

void transmission() {
    for (bool packed : {false, true}) {
        transmit_for(0, ~u64{0}, packed);
        transmit_for(net::kChecksum, ~u64{0}, packed);
        transmit_for(net::kChecksum | net::kTso4 | net::kTso6 | net::kEcnTso, ~u64{0}, packed);
        transmit_for(net::kAnySize, ~u64{0}, packed);
        transmit_for(0, ~u64{kEventIdx | kIndirectDesc}, packed);
    }
}

// Buffers of every size, frames of every size: the header tells how many were used, the frame is
// whole, and one that does not fit waits and comes first.
void reception(bool mergeable, bool packed) {
    Random random(mergeable * 2 + packed);
    Setup setup(0, net::kChecksum | net::kTso4 | net::kTso6);
    setup.net->offer_packed(packed);
    FakeGuest guest(*setup.net, setup.memory,
                    {.features = ~(kNetCtrlVlan | u64{!mergeable} * kNetMergeable)});
    CHECK(setup.end->started);
    CHECK_EQ(setup.end->offloads, u32{net::kChecksum | net::kTso4 | net::kTso6});
    std::map<u16, std::pair<u64, u32>> buffers;  // by id
    std::deque<Bytes> expected;
    Bytes waiting;
    u64 kept = 0;
    auto collect = [&] {
        while (auto used = guest.driver(0).get()) {
            auto [at, size] = buffers.extract(used->id).mapped();
            Bytes got = guest.bytes(at, used->written);
            CHECK(got.size() >= 12 && used->written <= size);
            NetHeader header;
            std::memcpy(&header, got.data(), 12);
            got.erase(got.begin(), got.begin() + 12);
            CHECK(header.buffers >= 1 && (mergeable || header.buffers == 1));
            for (u16 i = 1; i < header.buffers; ++i) {
                auto next = guest.driver(0).get();
                CHECK(next.has_value());
                if (!next) return;
                auto [more, room] = buffers.extract(next->id).mapped();
                CHECK(next->written != 0 && next->written <= room);
                got = join(got, guest.bytes(more, next->written));
            }
            CHECK(!expected.empty() && got == expected.front());
            if (!expected.empty()) expected.pop_front();
        }
    };
    for (int n = 0; n < 3000; ++n) {
        if (random.one_in(2)) {
            if (buffers.empty()) guest.free_buffers();
            const u32 size = mergeable ? 12 + random.below(3000) : 1526;
            if (guest.driver(0).free() != 0 && buffers.size() < 100) {
                const u64 at = guest.buffer(size);
                const auto id = guest.driver(0).add({{at, size, true}});
                buffers[*id] = {at, size};
                const int wakes = setup.end->wakes;
                guest.kick(0);
                if (!waiting.empty()) CHECK_EQ(setup.end->wakes, wakes + 1);
            }
        }
        Bytes frame = waiting;
        if (frame.empty()) {
            TcpFrame tcp = random_tcp(random, mergeable && random.one_in(4) ? 20000 : 1400);
            frame = tcp.bytes();
            if (!mergeable && frame.size() > 1514) frame.resize(1514);
        }
        const auto outcome = setup.end->port->receive(0, {}, frame);
        CHECK(outcome != net::Port::Outcome::kDropped);
        if (outcome == net::Port::Outcome::kTaken) {
            expected.push_back(frame);
            waiting.clear();
            ++kept;
        } else {
            waiting = frame;
        }
        if (random.one_in(3)) collect();
    }
    collect();
    CHECK(expected.empty() && kept > 200);
    CHECK_EQ(setup.net->counters().rx_frames, kept);
    CHECK(setup.net->counters().rx_waits > 100);
    if (!mergeable) {  // longer than any buffer: dropped, and the next one passes
        const u64 at = guest.buffer(1526);
        guest.driver(0).add({{at, 1526, true}});
        guest.kick(0);
        waiting.clear();
        CHECK(setup.end->port->receive(0, {}, Bytes(1600)) == net::Port::Outcome::kDropped);
        CHECK(setup.end->port->receive(0, {}, Bytes(1000)) == net::Port::Outcome::kTaken);
    }
}

u8 command(FakeGuest& guest, unsigned queue, Bytes request) {
    const Bytes answer = guest.request(queue, {request}, 1);
    guest.free_buffers();
    return answer.empty() ? 0xff : answer[0];
}

Bytes frame_to(const MacAddress& to, int vlan = -1) {
    Bytes frame(to.begin(), to.end());
    frame.insert(frame.end(), {2, 0, 0, 0, 0, 1});
    if (vlan >= 0) {
        put16(frame, 0x8100);
        put16(frame, static_cast<u32>(vlan));
    }
    put16(frame, 0x88b5);
    frame.resize(64);
    return frame;
}

void filters() {
    Setup setup;
    FakeGuest guest(*setup.net, setup.memory);
    for (int i = 0; i < 200; ++i) guest.driver(0).add({{guest.buffer(2048), 2048, true}});
    // Requests use what lies behind: buffers of the receive queue stay.
    guest.kick(0);
    const MacAddress other{2, 0, 0, 0, 0, 9}, multicast{1, 0, 0x5e, 0, 0, 1};
    const MacAddress broadcast{255, 255, 255, 255, 255, 255};
    auto passes = [&](const MacAddress& to, int vlan = -1) {
        return setup.end->port->receive(0, {}, frame_to(to, vlan)) == net::Port::Outcome::kTaken;
    };
    auto set = [&](Bytes request) {
        const Bytes answer = guest.request(2, {request}, 1);
        return answer.size() == 1 && answer[0] == 0;
    };
    CHECK(passes(other) && passes(multicast) && passes(kMac));  // promiscuous at first
    CHECK(set({0, 0, 0}));
    CHECK(!passes(other) && !passes(multicast) && passes(kMac) && passes(broadcast));
    CHECK(set({0, 1, 1}) && passes(multicast));
    CHECK(set({0, 1, 0}) && !passes(multicast));
    CHECK(set({0, 2, 1}) && passes(other));
    CHECK(set({0, 2, 0}) && !passes(other));
    CHECK(set({0, 5, 1}) && !passes(broadcast));
    CHECK(set({0, 5, 0}) && passes(broadcast));
    Bytes table{1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1};
    CHECK(set(table) && passes(other) && passes(multicast));
    CHECK(!passes({2, 0, 0, 0, 0, 8}));
    // Saved and restored, it filters the same.
    setup.net->pause();
    const auto state = setup.net->save();
    setup.net->restore(state);
    setup.net->resume();
    CHECK(passes(other) && passes(multicast) && !passes({2, 0, 0, 0, 0, 8}));
    Bytes many{1, 0, 65, 0, 0, 0};  // more than fit: all of the kind pass
    many.resize(6 + 65 * 6);
    many.insert(many.end(), {0, 0, 0, 0});
    CHECK(set(many) && passes({2, 0, 0, 0, 0, 8}) && !passes(multicast));
    CHECK(!set({1, 0, 255, 0, 0, 0, 1, 2, 3}));  // longer than the request
    CHECK(set({1, 0, 0, 0, 0, 0, 0, 0, 0, 0}) && !passes(other));
    CHECK(set({1, 1, 2, 0, 0, 0, 0, 9}) && passes(other) && !passes(kMac));
    CHECK((setup.net->mac() == other));
    CHECK(!passes(other, 7) && passes(other));
    CHECK(set({2, 0, 7, 0}) && passes(other, 7) && !passes(other, 8));
    CHECK(set({2, 1, 7, 0}) && !passes(other, 7));
    CHECK(!set({2, 0, 0, 16}) && !set({0, 9, 1}) && !set({9, 0}) && !set({0}) && !set({0, 0}));
    CHECK(!set({4, 0, 2, 0}));  // one pair only
    CHECK(setup.net->counters().rx_filtered > 10);
    setup.net->reset();
    CHECK((setup.net->mac() == kMac));
}

void queues() {
    for (unsigned end_queues : {1u, 4u}) {
        Setup setup(0, net::kChecksum, 4, end_queues);
        Random random(9);
        FakeGuest guest(*setup.net, setup.memory);
        CHECK_EQ(setup.net->queues(), 9u);
        for (unsigned pair = 0; pair < 4; ++pair) {
            for (int i = 0; i < 20; ++i) {
                guest.driver(2 * pair).add({{guest.buffer(2048), 2048, true}});
            }
            guest.kick(2 * pair);
        }
        const Bytes three{4, 0, 3, 0}, none{4, 0, 0, 0}, five{4, 0, 5, 0};
        CHECK_EQ(guest.request(8, {three}, 1)[0], 0);
        CHECK_EQ(guest.request(8, {none}, 1)[0], 1);
        CHECK_EQ(guest.request(8, {five}, 1)[0], 1);
        CHECK_EQ(setup.net->active_pairs(), 3u);
        for (unsigned pair : {2u, 1u, 0u}) {
            const TcpFrame frame;
            offer(guest, 2 * pair + 1, join(head_of({}), frame.bytes()), random);
            guest.kick(2 * pair + 1);
            CHECK(guest.wait(2 * pair + 1));
            CHECK_EQ(setup.end->sent.back().queue, end_queues == 1 ? 0 : pair);
            // The flow's answers come where it was last sent from; or where the end says.
            const unsigned from = end_queues == 1 ? 0 : pair;
            CHECK(setup.end->port->receive(from, {}, frame.bytes()) == net::Port::Outcome::kTaken);
            CHECK(guest.driver(2 * pair).get().has_value());
        }
    }
}

// Which queue a frame waits for may change before there is room: the end's queue is woken all the
// same.
void queues_that_change() {
    Setup setup(0, net::kChecksum, 2, 2);
    FakeGuest guest(*setup.net, setup.memory);
    CHECK(setup.end->port->receive(1, {}, frame_to(kMac)) == net::Port::Outcome::kNoRoom);
    const Bytes two{4, 0, 2, 0};
    CHECK_EQ(guest.request(4, {two}, 1)[0], 0);
    for (unsigned pair : {0u, 1u}) {
        guest.driver(2 * pair).add({{guest.buffer(2048), 2048, true}});
        guest.kick(2 * pair);
    }
    CHECK(setup.end->woken == std::vector<unsigned>{1});
    CHECK(setup.end->port->receive(1, {}, frame_to(kMac)) == net::Port::Outcome::kTaken);
    CHECK(guest.driver(2).get().has_value());
}

void link_and_driver() {
    Setup setup;
    CHECK(setup.end->port->receive(0, {}, frame_to(kMac)) == net::Port::Outcome::kDropped);
    Random random(3);
    FakeGuest guest(*setup.net, setup.memory);
    guest.driver(0).add({{guest.buffer(2048), 2048, true}});
    guest.kick(0);
    setup.end->port->carrier(false);
    CHECK_EQ(guest.config_interrupts(), u64{1});
    CHECK(!setup.net->link());
    CHECK(setup.end->port->receive(0, {}, frame_to(kMac)) == net::Port::Outcome::kDropped);
    offer(guest, 1, join(head_of({}), frame_to(kMac)), random);
    guest.kick(1);
    CHECK(guest.wait(1) && setup.end->sent.empty());
    setup.end->port->carrier(true);
    setup.net->set_link(false);
    CHECK(!setup.net->link());
    setup.net->set_link(true);
    CHECK(setup.net->link() && guest.config_interrupts() == 4);
    setup.net->pause();  // frames wait for a machine that stands still
    CHECK(setup.end->port->receive(0, {}, frame_to(kMac)) == net::Port::Outcome::kNoRoom);
    CHECK_EQ(setup.end->wakes, 0);
    setup.net->resume();
    CHECK_EQ(setup.end->wakes, 1);
    CHECK(setup.end->port->receive(0, {}, frame_to(kMac)) == net::Port::Outcome::kTaken);
    setup.end->accepts = false;
    offer(guest, 1, join(head_of({}), frame_to(kMac)), random);
    guest.kick(1);
    CHECK(guest.wait(1));
    CHECK_EQ(setup.net->counters().tx_dropped, u64{2});
}

// More frames than a burst: the event loop goes on with them.
void bursts() {
    Setup setup;
    FakeGuest guest(*setup.net, setup.memory);
    const Bytes bytes = join(head_of({}), frame_to(kMac));
    const u64 at = guest.buffer(bytes);
    const auto add = [&] {
        CHECK(guest.driver(1).add({{at, static_cast<u32>(bytes.size()), false}}).has_value());
    };
    for (int i = 0; i < 256; ++i) add();
    guest.kick(1);
    CHECK_EQ(setup.end->sent.size(), std::size_t{Net::kBurst});
    for (int i = 0; i < 10; ++i) CHECK(guest.driver(1).get().has_value());
    for (int i = 0; i < 10; ++i) add();
    guest.driver(1).publish();  // (it is not told to notify: the device looks by itself)
    setup.loop.start();
    for (int i = 0; i < 256; ++i) CHECK(guest.wait(1).has_value());
    CHECK_EQ(setup.net->counters().tx_frames, u64{266});
    setup.loop.stop();
}

void mistakes() {
    auto with = [](u64 features, auto step) {
        Setup setup(0, net::kChecksum | net::kTso4);
        FakeGuest guest(*setup.net, setup.memory, {.features = features, .seconds = 1});
        step(setup, guest);
    };
    // Receive buffers: too small for the header, or nothing to write.
    for (u32 size : {1u, 11u}) {
        with(~u64{0}, [&](Setup& setup, FakeGuest& guest) {
            guest.driver(0).add({{guest.buffer(16), size, true}});
            guest.kick(0);
            CHECK(setup.end->port->receive(0, {}, frame_to(kMac)) == net::Port::Outcome::kDropped);
            CHECK(setup.net->status() & kNeedsReset);
            CHECK(!setup.net->failure().empty());
        });
    }
    with(~u64{0}, [](Setup& setup, FakeGuest& guest) {
        guest.driver(2).add({{guest.buffer(16), 2, false}});  // no room for the answer
        guest.kick(2);
        CHECK(setup.net->status() & kNeedsReset);
    });
    // Frames that are none, and headers that ask for what was not negotiated, are dropped.
    with(~u64{kNetHostTso4 | kNetHostTso6 | kNetHostEcn | kNetCsum},
         [](Setup& setup, FakeGuest& guest) {
             Random random(4);
             TcpFrame frame;
             frame.payload.assign(5000, 7);
             offer(guest, 1, join(head_of(frame.header(1000)), frame.bytes()), random);
             offer(guest, 1, join(head_of(frame.header()), frame.bytes()), random);
             offer(guest, 1, Bytes(12), random);
             offer(guest, 1, Bytes(3), random);
             offer(guest, 1, Bytes(70000), random);
             guest.kick(1);
             for (int i = 0; i < 5; ++i) CHECK(guest.wait(1).has_value());
             CHECK(setup.end->sent.empty() && setup.net->counters().tx_dropped == 5);
             CHECK(!(setup.net->status() & kNeedsReset));
         });
    for (u64 without : {kNetCsum, kNetGuestCsum, kNetCtrlVq}) {
        Setup setup(0, net::kChecksum | net::kTso4);
        CHECK_THROWS(FakeGuest(*setup.net, setup.memory, {.features = ~u64{without}}),
                     StateMismatch);
    }
}

void random_commands() {
    Setup setup(0, net::kChecksum, 2);
    FakeGuest guest(*setup.net, setup.memory);
    Random random(11);
    for (int n = 0; n < 20000; ++n) {
        Bytes request = random_bytes(random, random.below(40));
        if (!request.empty()) request[0] %= 6;
        if (request.size() > 1) request[1] %= 6;
        const u8 answer = command(guest, 4, request);
        CHECK(answer <= 1);
    }
}

void configurations() {
    auto make = [](NetConfig config) {
        Setup setup;
        Net net(Environment{setup.memory, setup.loop}, std::make_unique<FakeEnd>(0, 0, 1), config);
    };
    CHECK_THROWS(make({.mac = {1, 2, 3, 4, 5, 6}}), ConfigError);
    CHECK_THROWS(make({.mtu = 60}), ConfigError);
    CHECK_THROWS(make({.pairs = 0}), ConfigError);
    CHECK_THROWS(make({.pairs = 17}), ConfigError);
}

}  // namespace

int main() {
    transmission();
    for (bool packed : {false, true}) {
        reception(true, packed);
        reception(false, packed);
    }
    filters();
    queues();
    queues_that_change();
    link_and_driver();
    bursts();
    mistakes();
    random_commands();
    configurations();
    return pvtest::finish("net");
}
