// Posted writes: collected by the kernel, never seen late.
#include "hooks_guest.hpp"
#include "kvm/bus_hooks.hpp"

namespace pvtest {
namespace {

using kvm::BusHooks;

constexpr u16 kPort = 0x500, kOther = 0x600;
constexpr u64 kDelay = 1'000'000;

// Writes to offsets 0..3 are posted; it notes every access.
class Recorder final : public Device {
  public:
    explicit Recorder(u64 max_delay) : max_delay_(max_delay) {}
    std::string_view name() const override { return "recorder"; }
    void read(u64 offset, std::span<u8> data) override {
        note("r" + std::to_string(offset));
        std::fill(data.begin(), data.end(), u8{0});
    }
    void write(u64 offset, std::span<const u8> data) override {
        note("w" + std::to_string(offset) + "=" + std::to_string(data[0]));
    }
    std::vector<PostedRange> posted() const override { return {{0, 4, max_delay_}}; }

    std::vector<std::string> seen() const {
        std::lock_guard lock(mutex_);
        return seen_;
    }
    std::size_t count() const { return seen().size(); }

  private:
    void note(std::string what) {
        std::lock_guard lock(mutex_);
        seen_.push_back(std::move(what));
    }
    u64 max_delay_;
    mutable std::mutex mutex_;
    std::vector<std::string> seen_;
};

template <class Condition>
bool eventually(Condition condition) {
    for (int i = 0; i < 5000 && !condition(); ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return condition();
}

// Whatever is posted comes before what exits, in the guest's order; so it does on soft.
void test_order(bool on_kvm, bool port) {
    Guest guest(on_kvm);
    auto device = std::make_shared<Recorder>(0);
    if (port) {
        guest.pio.attach(kPort, 8, device);
    } else {
        guest.mmio.attach(Guest::kMmio, 8, device);
        guest.pio.attach(kPort, 8, device);
    }
    Code code;
    auto write = [&](u8 at, u8 v) { port ? code.out8(kPort + at, v) : code.store8(at, v); };
    write(0, 1);
    write(1, 2);
    write(0, 3);
    code.in8(kPort + 5);
    write(3, 4);
    write(4, 5);  // not posted
    write(2, 6);
    code.exit();
    guest.run(code);
    std::vector<std::string> want{"w0=1", "w1=2", "w0=3", "r5", "w3=4", "w4=5", "w2=6"};
    CHECK(device->seen() == want);
    CHECK_EQ(device->writes(), 6u);
    // The kernel did collect them.
    if (on_kvm) CHECK_EQ(guest.counter("posted_writes"), port ? 5u : 5u);
}

// More writes than the ring has room for.
void test_full_ring() {
    Guest guest(true);
    auto device = std::make_shared<Recorder>(0);
    guest.pio.attach(kPort, 8, device);
    guest.run(Code().out8_loop(kPort, 1000).exit());
    auto seen = device->seen();
    CHECK_EQ(seen.size(), 1000u);
    for (std::size_t i = 0; i < seen.size(); ++i) {
        CHECK_EQ(seen[i], "w0=" + std::to_string(i % 256));
    }
    CHECK(guest.counter("posted_writes") > 900);
}

// A vCPU that is asked to stop leaves nothing behind, though it made no exit of its own.
void test_stop() {
    Guest guest(true);
    auto device = std::make_shared<Recorder>(0);
    guest.pio.attach(kPort, 8, device);
    guest.start(Code().out8(kPort, 1).out8(kPort, 2).forever());
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    guest.stop();
    CHECK(device->seen() == (std::vector<std::string>{"w0=1", "w0=2"}));
}

// A write that must not wait for ever is an exit until the guest makes many of them; then it waits
// for the timer at most, and when the guest makes no more it is an exit again.
void test_bounded_delay() {
    Guest guest(true);
    auto device = std::make_shared<Recorder>(kDelay);
    guest.pio.attach(kPort, 8, device);
    guest.run(Code().out8(kPort, 1).out8(kPort, 2).exit());
    CHECK_EQ(guest.counter("posted_ranges"), 0u);
    CHECK_EQ(guest.counter("posted_writes"), 0u);
    CHECK_EQ(guest.clock.next_deadline(), kNever);

    constexpr u16 kMany = 3 * BusHooks::kWindow;
    guest.start(Code().out8_loop(kPort, kMany).forever());
    CHECK(eventually([&] { return guest.clock.next_deadline() != kNever; }));
    CHECK_EQ(guest.counter("posted_ranges"), 1u);
    // The event loop's part: nothing but the timer can deliver the last writes.
    CHECK(eventually([&] {
        guest.clock.run_expired();
        return device->count() == 2 + kMany;
    }));
    CHECK(guest.counter("posted_writes") >= BusHooks::kWindow);
    CHECK(eventually([&] {
        guest.clock.run_expired();
        return guest.counter("posted_ranges") == 0;
    }));
    CHECK_EQ(guest.clock.next_deadline(), kNever);
    guest.stop();
    u64 before = guest.counter("posted_writes");
    guest.run(Code().out8(kPort, 7).exit());
    CHECK_EQ(guest.counter("posted_writes"), before);
    CHECK_EQ(device->seen().back(), std::string("w0=7"));
}

// Other devices' exits do not make a range busy.
void test_not_busy() {
    Guest guest(true);
    auto device = std::make_shared<Recorder>(kDelay);
    auto other = std::make_shared<Recorder>(0);
    guest.pio.attach(kPort, 8, device);
    guest.pio.attach(kOther, 8, other, 4);
    Code code;
    for (int i = 0; i < 4; ++i) code.out8(kPort, 1).out8_loop(kOther, 40);
    guest.run(code.exit());
    CHECK_EQ(guest.counter("posted_ranges"), 0u);
    CHECK_EQ(device->count(), 4u);
    CHECK_EQ(other->count(), 160u);
}

// A device that goes takes its range along; what the guest wrote before is still delivered.
void test_detach() {
    Guest guest(true);
    auto device = std::make_shared<Recorder>(0);
    guest.pio.attach(kPort, 8, device);
    CHECK_EQ(guest.counter("posted_ranges"), 1u);
    guest.run(Code().out8(kPort, 1).exit());
    guest.pio.detach(kPort);
    CHECK_EQ(guest.counter("posted_ranges"), 0u);
    guest.load(Code().out8(kPort, 2).exit());
    guest.vcpu->run();
    CHECK_EQ(guest.pio.unclaimed(), 1u);
    guest.pio.attach(kPort + 8, 2, device, 3);  // only offset 3 is posted and inside
    guest.run(Code().out8(kPort + 8, 3).out8(kPort + 9, 4).exit());
    CHECK(device->seen() == (std::vector<std::string>{"w0=1", "w3=3", "w4=4"}));
    CHECK_EQ(guest.counter("posted_writes"), 2u);
    // Without the first vCPU there is no ring.
    guest.vcpu.reset();
    CHECK_EQ(guest.counter("posted_ranges"), 0u);
}

int run() {
    bool have_kvm = true;
    try {
        kvm_system();
    } catch (const EngineUnavailable& error) {
        std::printf("engine kvm: %s\n", error.what());
        have_kvm = false;
    }
    test_order(false, true);
    test_order(false, false);
    if (have_kvm) {
        test_order(true, true);
        test_order(true, false);
        test_full_ring();
        test_stop();
        test_bounded_delay();
        test_not_busy();
        test_detach();
    }
    int status = finish("test_posted_writes");
    return status != 0 || have_kvm ? status : 77;
}

}  // namespace
}  // namespace pvtest

int main() {
    return pvtest::run();
}
