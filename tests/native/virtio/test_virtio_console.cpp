// virtio-console against a driver that does as it likes: streams both ways on all ports, flow
// control, control messages, ports that come and go, garbage, saved state.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <thread>

#include "base/error.hpp"
#include "bus/event_loop.hpp"
#include "check.hpp"
#include "random.hpp"
#include "virtio/console.hpp"
#include "virtio/fake_guest.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;
using pvtest::Random;

namespace {

constexpr u64 kMemory = 8 << 20;
using Bytes = std::vector<u8>;

struct World {
    explicit World(Console::Config config, bool packed = false)
        : clock(Clock::Mode::kFreeRunning), loop(clock) {
        memory.add(Gpa(0), kMemory, "ram");
        device = std::make_unique<Console>(Environment{memory, loop}, std::move(config));
        device->offer_packed(packed);
        loop.start();
    }
    ~World() {
        guest.reset();
        loop.stop();
    }
    void boot() {
        guest.reset();
        guest = std::make_unique<FakeGuest>(*device, memory);
    }
    void say(u32 id, u16 event, u16 value) {
        const u16 words[4] = {static_cast<u16>(id), 0, event, value};
        Bytes bytes(8);
        std::memcpy(bytes.data(), words, 8);
        guest->request(3, {bytes}, 0);
    }
    // Gives buffers for control messages and collects `count` of them, as "event id value rest".
    std::vector<std::string> hear(unsigned count) {
        std::vector<std::string> result;
        while (result.size() < count) {
            const u64 at = guest->buffer(64);
            guest->driver(2).add({{at, 64, true}});
            guest->kick(2);
            auto used = guest->wait(2);
            if (!used) break;
            Bytes bytes = guest->bytes(at, used->written);
            u16 words[4];
            std::memcpy(words, bytes.data(), 8);
            std::string rest(bytes.begin() + 8, bytes.end());
            if (words[2] == 5) rest = std::to_string(bytes[8]) + "x" + std::to_string(bytes[10]);
            result.push_back(std::to_string(words[2]) + " " + std::to_string(words[0]) + " " +
                             std::to_string(words[3]) + (rest.empty() ? "" : " " + rest));
        }
        return result;
    }
    // Linux's side of the handshake.
    void plug_in(u32 ports) {
        say(0, 0, 1);
        hear(ports);
        for (u32 id = 0; id < ports; ++id) {
            say(id, 3, 1);
            const auto& config = device->port_config(id);
            hear(1u + config.console + !config.name.empty());
            say(id, 6, 1);
        }
    }

    GuestMemory memory;
    Clock clock;
    EventLoop loop;
    std::unique_ptr<Console> device;
    std::unique_ptr<FakeGuest> guest;
};

unsigned rx_of(u32 id) {
    return id == 0 ? 0 : 2 + 2 * id;
}

void check_lists(const std::vector<std::string>& got, const std::vector<std::string>& want) {
    auto join = [](const std::vector<std::string>& list) {
        std::string text;
        for (const auto& item : list) text += item + "; ";
        return text;
    };
    CHECK_EQ(join(got), join(want));
}

void messages() {
    World world({{{"", true}, {"agent", false}}, 4, Console::Size{24, 80}});
    world.boot();
    CHECK_EQ(world.device->queues(), 10u);
    u8 config[8];
    world.device->read_config(0, config);
    CHECK_EQ(config[0], 80);
    CHECK_EQ(config[2], 24);
    CHECK_EQ(config[4], 4);
    world.say(0, 0, 1);
    check_lists(world.hear(2), {"1 0 1", "1 1 1"});
    world.say(0, 3, 1);
    // (FakeGuest has SIZE: a console's port is told its size.)
    check_lists(world.hear(3), {"4 0 1", "5 0 1 80x24", "6 0 1"});
    world.say(1, 3, 1);
    check_lists(world.hear(2), {"7 1 1 agent", "6 1 1"});
    CHECK(!world.device->guest_open(1));
    world.say(1, 6, 1);
    CHECK(world.device->guest_open(1));
    world.device->resize({50, 132});
    check_lists(world.hear(1), {"5 0 1 132x50"});
    world.device->set_host_open(1, false);
    check_lists(world.hear(1), {"6 1 0"});
    CHECK_EQ(world.device->add_port({"more", false}), 2u);
    check_lists(world.hear(1), {"1 2 1"});
    CHECK_THROWS(world.device->add_port({"more", false}), ConfigError);
    world.device->remove_port(1);
    check_lists(world.hear(1), {"2 1 1"});
    CHECK_THROWS(world.device->remove_port(1), ConfigError);
    CHECK(!world.device->guest_open(1));
    // A driver that asks a thousand times and takes nothing is answered once.
    for (int i = 0; i < 1000; ++i) world.say(2, 3, 1);
    check_lists(world.hear(2), {"7 2 1 more", "6 2 1"});
    world.boot();
    world.say(0, 0, 1);
    check_lists(world.hear(2), {"1 0 1", "1 2 1"});
}

void streams(u64 seed, bool packed) {
    Random random(seed);
    const u32 ports = 1 + random.below(3);
    Console::Config config;
    for (u32 id = 0; id < ports; ++id) {
        config.ports.push_back({id ? "port" + std::to_string(id) : "", id == 0});
    }
    World world(std::move(config), packed);
    world.boot();
    if (ports > 1) world.plug_in(ports);
    std::vector<std::string> out(ports), out_got(ports), in(ports), in_got(ports);
    std::vector<u64> at(ports);
    std::vector<std::map<u16, u64>> posted(ports);
    u8 next = 0;
    auto collect = [&](u32 id) {
        FakeDriver& driver = world.guest->driver(rx_of(id));
        while (auto used = driver.get()) {
            Bytes bytes = world.guest->bytes(posted[id][used->id], used->written);
            in_got[id].append(bytes.begin(), bytes.end());
            CHECK(used->written != 0);
        }
    };
    for (int step = 0; step < 300; ++step) {
        const u32 id = random.below(ports);
        const unsigned rx = rx_of(id), tx = rx + 1;
        switch (random.below(4)) {
            case 0: {  // the guest prints
                std::vector<FakeDriver::Segment> segments;
                for (u32 n = 1 + random.below(3); n != 0; --n) {
                    Bytes bytes(1 + random.below(300));
                    for (u8& byte : bytes) byte = next++;
                    segments.push_back(
                        {world.guest->buffer(bytes), static_cast<u32>(bytes.size()), false});
                    out[id].append(bytes.begin(), bytes.end());
                }
                CHECK(world.guest->driver(tx).add(segments).has_value());
                world.guest->kick(tx);
                CHECK(world.guest->driver(tx).get().has_value());
                break;
            }
            case 1: {  // the host types
                Bytes bytes(1 + random.below(2000));
                for (u8& byte : bytes) byte = next++;
                in[id].append(bytes.begin(), bytes.end());
                world.device->console(id)->send(bytes);
                break;
            }
            case 2:  // the guest reads
                for (u32 n = random.below(8); n != 0; --n) {
                    const u32 size = 1 + random.below(700);
                    const u64 gpa = world.guest->buffer(size);
                    auto chain = world.guest->driver(rx).add({{gpa, size, true}});
                    if (chain) posted[id][*chain] = gpa;
                }
                world.guest->kick(rx);
                collect(id);
                break;
            default:
                at[id] = world.device->console(id)->read(at[id], random.below(4000), out_got[id]);
                break;
        }
    }
    for (u32 id = 0; id < ports; ++id) {
        at[id] = world.device->console(id)->read(at[id], ~u64{0} >> 1, out_got[id]);
        CHECK(out_got[id] == out[id]);
        FakeDriver& driver = world.guest->driver(rx_of(id));
        for (int tries = 0; in_got[id].size() < in[id].size() && tries < 20'000; ++tries) {
            while (driver.outstanding() < 8) {
                const u64 gpa = world.guest->buffer(1000);
                posted[id][*driver.add({{gpa, 1000, true}})] = gpa;
            }
            world.guest->kick(rx_of(id));
            std::this_thread::sleep_for(std::chrono::microseconds(20));
            collect(id);
        }
        CHECK_EQ(in_got[id].size(), in[id].size());
        CHECK(in_got[id] == in[id]);
        CHECK_EQ(world.device->console(id)->unsent(), 0u);
    }
    CHECK_EQ(world.device->failure(), "");
}

// A guest that prints more than the reader takes waits, and nothing is lost.
void flow_control(bool packed) {
    World world({{{"", true}}}, packed);
    world.boot();
    auto& console = *world.device->console(0);
    console.set_flow_control(true);
    std::string want, got;
    u64 at = 0;
    u32 most = 0;
    for (int i = 0; i < 200; ++i) {
        Bytes bytes(4096, static_cast<u8>(i));
        want.append(bytes.begin(), bytes.end());
        if (world.guest->driver(1).free() == 0) {
            at = console.read(at, 50'000, got);
            while (world.guest->driver(1).get()) {
            }
        }
        world.guest->driver(1).add({{world.guest->buffer(bytes), 4096, false}});
        world.guest->kick(1);
        while (world.guest->driver(1).get()) {
        }
        most = std::max<u32>(most, static_cast<u32>(console.size() - at));
        if (i == 64) CHECK(world.guest->driver(1).outstanding() > 0);
    }
    CHECK(most <= devices::HostConsole::kHigh + 4096);
    while (got.size() < want.size()) {
        const u64 before = at;
        at = console.read(at, 10'000, got);
        if (at == before) break;
    }
    CHECK(got == want);
    while (world.guest->driver(1).get()) {
    }
    CHECK_EQ(world.guest->driver(1).outstanding(), 0u);
}

void closed_ports_wait() {
    World world({{{"", true}, {"data", false}}});
    world.boot();
    world.say(0, 0, 1);
    world.hear(2);
    world.say(1, 3, 1);
    world.hear(2);
    world.device->console(1)->send(Bytes{'h', 'i'});
    const u64 at = world.guest->buffer(16);
    world.guest->driver(4).add({{at, 16, true}});
    world.guest->kick(4);
    CHECK(!world.guest->driver(4).get().has_value());
    CHECK_EQ(world.device->console(1)->unsent(), 2u);
    world.say(1, 6, 1);  // a program opens it
    auto used = world.guest->wait(4);
    CHECK(used.has_value() && used->written == 2);
    CHECK(world.guest->bytes(at, 2) == (Bytes{'h', 'i'}));
}

void emergency() {
    World world({{{"", true}}});
    for (u8 byte : Bytes{'o', 'h'}) {
        const u8 word[4] = {byte, 0, 0, 0};
        world.device->write_config(8, word);
    }
    std::string text;
    world.device->console(0)->read(0, 100, text);
    CHECK_EQ(text, "oh");
}

void saved_state() {
    World world({{{"", true}, {"data", false}}, 3});
    world.boot();
    world.plug_in(2);
    world.device->add_port({"new", false});
    world.device->pause();
    const Bytes state = world.device->save();
    World other({{{"", true}, {"data", false}}, 3});
    other.device->restore(state);
    CHECK(other.device->guest_open(1));
    CHECK(other.device->present(2));
    CHECK(other.device->save() == state);
    World small({{{"", true}, {"data", false}}, 2});
    CHECK_THROWS(small.device->restore(state), StateError);
    Random random(7);
    for (int i = 0; i < 300; ++i) {  // whatever the state says
        Bytes bad = state;
        bad[random.below(static_cast<u32>(bad.size()))] = static_cast<u8>(random.next());
        if (random.one_in(4)) bad.resize(random.below(static_cast<u32>(bad.size())));
        try {
            other.device->restore(bad);
        } catch (const Error&) {
        }
    }
    world.device->resume();
}

// Chains of any shape on any queue: the device answers, fails, or ignores them.
void garbage(u64 seed, bool packed) {
    Random random(seed);
    World world({{{"", true}, {"a", false}, {"", true}}, 4, Console::Size{1, 2}}, packed);
    for (int round = 0; round < 10; ++round) {
        world.boot();
        for (int step = 0; step < 100; ++step) {
            const unsigned queue = random.below(world.device->queues());
            std::vector<FakeDriver::Segment> segments;
            for (u32 n = random.below(4); n != 0; --n) {
                Bytes bytes(1 + random.below(40));
                for (u8& byte : bytes) byte = static_cast<u8>(random.below(9));
                segments.push_back(
                    {world.guest->buffer(bytes), static_cast<u32>(bytes.size()), random.one_in(2)});
            }
            if (segments.empty()) segments.push_back({random.next() % kMemory, 70'000, true});
            (void)world.guest->driver(queue).add(segments);
            world.guest->kick(queue);
            if (random.one_in(20)) world.device->console(random.below(4))->send(Bytes(500));
            if (random.one_in(50)) world.device->reset_queue(queue);
            (void)world.guest->driver(queue).get();
        }
    }
}

}  // namespace

int main() {
    messages();
    for (u64 seed = 0; seed < 40; ++seed) streams(seed, seed % 2 != 0);
    flow_control(false);
    flow_control(true);
    closed_ports_wait();
    emergency();
    saved_state();
    for (u64 seed = 0; seed < 20; ++seed) garbage(seed, seed % 2 != 0);
    return pvtest::finish("test_virtio_console");
}
