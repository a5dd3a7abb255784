// Dispatch: ranges, offsets, unclaimed accesses, and lookups while ranges move.
#include "bus/bus.hpp"

#include <thread>

#include "base/error.hpp"
#include "check.hpp"

using namespace polyvisor;

namespace {

class Probe final : public Device {
  public:
    explicit Probe(u8 value) : value_(value) {}
    std::string_view name() const override { return "probe"; }
    void read(u64 offset, std::span<u8> data) override {
        last = offset;
        for (u8& byte : data) byte = value_;
    }
    void write(u64 offset, std::span<const u8> data) override {
        last = offset;
        size = data.size();
        ++writes;
    }
    std::atomic<u64> last{~u64{0}}, size{0}, writes{0};

  private:
    u8 value_;
};

void ranges_and_offsets() {
    Bus bus("port", 0x10000);
    auto a = std::make_shared<Probe>(0xaa);
    auto b = std::make_shared<Probe>(0xbb);
    bus.attach(0x20, 2, a);
    bus.attach(0xa0, 2, a, 2);
    bus.attach(0x22, 4, b, 0x100);
    u8 data[4] = {};
    CHECK(bus.read(0x21, {data, 1}));
    CHECK_EQ(data[0], 0xaa);
    CHECK_EQ(a->last.load(), 1u);
    CHECK(bus.write(0xa1, {data, 1}));
    CHECK_EQ(a->last.load(), 3u);
    CHECK(bus.write(0x22, {data, 4}));
    CHECK_EQ(b->last.load(), 0x100u);
    CHECK_EQ(b->size.load(), 4u);
    CHECK(bus.find(0x25) == b.get());
    CHECK(bus.find(0x26) == nullptr);
    CHECK(bus.find(0x1f) == nullptr);
    CHECK(bus.find(0xffff) == nullptr);

    // Unclaimed: below, between, above, and running over the end of a range.
    u64 before = bus.unclaimed();
    for (u64 address : {u64{0}, u64{0x1f}, u64{0x30}, u64{0xfff0}, u64{0x23}}) {
        data[0] = data[3] = 0;
        CHECK(!bus.read(address, {data, 4}));
        CHECK_EQ(data[0], 0xff);
        CHECK_EQ(data[3], 0xff);
    }
    CHECK(!bus.write(0x21, {data, 2}));
    CHECK_EQ(bus.unclaimed() - before, 6u);

    bus.detach(0x22);
    CHECK(bus.find(0x22) == nullptr);
    bus.attach(0x22, 1, a, 7);
    CHECK_EQ(bus.ranges().size(), 3u);
    CHECK_EQ(bus.ranges()[1].base, 7u);
}

void bad_ranges() {
    Bus bus("port", 0x10000);
    auto a = std::make_shared<Probe>(1);
    bus.attach(0x100, 0x10, a);
    CHECK_THROWS(bus.attach(0x10f, 1, a), MemoryRangeError);
    CHECK_THROWS(bus.attach(0xff, 2, a), MemoryRangeError);
    CHECK_THROWS(bus.attach(0xf0, 0x100, a), MemoryRangeError);
    CHECK_THROWS(bus.attach(0x200, 0, a), MemoryRangeError);
    CHECK_THROWS(bus.attach(0xffff, 2, a), MemoryRangeError);
    CHECK_THROWS(bus.attach(8, ~u64{0} - 4, a), MemoryRangeError);
    CHECK_THROWS(bus.detach(0x101), MemoryRangeError);
    bus.attach(0xff, 1, a);
    bus.attach(0x110, 1, a);
    bus.attach(0xffff, 1, a);
    CHECK_EQ(bus.ranges().size(), 4u);
}

void detached_devices_live_until_released() {
    Bus bus("port", 0x10000);
    std::weak_ptr<Probe> weak;
    {
        auto probe = std::make_shared<Probe>(1);
        weak = probe;
        bus.attach(0, 1, probe);
        bus.attach(8, 1, std::move(probe));
    }
    bus.detach(0);
    bus.release_detached();
    CHECK(!weak.expired());  // still at 8
    bus.detach(8);
    CHECK(!weak.expired());  // a vCPU might be inside it
    bus.release_detached();
    CHECK(weak.expired());
}

void many_ranges() {
    Bus bus("memory", bit(52));
    std::vector<std::shared_ptr<Probe>> devices;
    for (u64 i = 0; i < 500; ++i) {
        devices.push_back(std::make_shared<Probe>(static_cast<u8>(i)));
        u64 slot = (i * 7919) % 500;
        bus.attach(slot * 0x1000, 0x800, devices.back());
    }
    u8 byte;
    for (u64 i = 0; i < 500; ++i) {
        u64 slot = (i * 7919) % 500;
        CHECK(bus.read(slot * 0x1000 + 0x7ff, {&byte, 1}));
        CHECK_EQ(byte, static_cast<u8>(i));
        CHECK(!bus.read(slot * 0x1000 + 0x800, {&byte, 1}));
    }
}

// One thread moves a range to and fro while two read: a neighbour is always found, the moving one
// either answers with its own value or is absent, never another's.
void lookups_while_ranges_move() {
    Bus bus("port", 0x10000);
    auto fixed = std::make_shared<Probe>(0x11);
    auto moving = std::make_shared<Probe>(0x22);
    bus.attach(0x80, 8, fixed);
    bus.attach(0x40, 8, moving);
    std::atomic<bool> stop{false};
    std::atomic<u64> wrong{0}, reads{0};
    auto reader = [&] {
        while (!stop) {
            u8 byte = 0;
            if (!bus.read(0x84, {&byte, 1}) || byte != 0x11) ++wrong;
            bool found = bus.read(0x42, {&byte, 1});
            if (byte != (found ? 0x22 : 0xff)) ++wrong;
            found = bus.read(0xc2, {&byte, 1});
            if (byte != (found ? 0x22 : 0xff)) ++wrong;
            ++reads;
        }
    };
    std::thread one(reader), two(reader);
    for (int i = 0; i < 20000 || (reads < 1000 && i < 20'000'000); ++i) {
        bus.detach(i % 2 ? 0xc0 : 0x40);
        bus.attach(i % 2 ? 0x40 : 0xc0, 8, moving);
    }
    stop = true;
    one.join();
    two.join();
    CHECK_EQ(wrong.load(), 0u);
    CHECK(reads.load() > 0);
}

}  // namespace

int main() {
    ranges_and_offsets();
    bad_ranges();
    detached_devices_live_until_released();
    many_ranges();
    lookups_while_ranges_move();
    return pvtest::finish("test_bus");
}
