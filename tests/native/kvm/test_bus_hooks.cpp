// Doorbells: ioeventfds on kvm, write() on soft; the same rings on both.
#include <sys/resource.h>

#include "hooks_guest.hpp"

namespace pvtest {
namespace {

constexpr u16 kPort = 0x500;

// Rings its own bells, as a device has to for engines (and accesses) that do not.
class Bells final : public Device {
  public:
    explicit Bells(std::vector<Doorbell> bells) : bells_(std::move(bells)) {
        for (Doorbell& bell : bells_) {
            fds.push_back(make_event());
            if (bell.event_fd < 0) bell.event_fd = fds.back().get();
        }
    }
    std::string_view name() const override { return "bells"; }
    void read(u64, std::span<u8>) override {}
    void write(u64 offset, std::span<const u8> data) override {
        u64 value = 0;
        std::memcpy(&value, data.data(), std::min<std::size_t>(data.size(), 8));
        for (const Doorbell& bell : bells_) {
            if (offset != bell.offset || (bell.size != 0 && bell.size != data.size())) continue;
            if (bell.matches && bell.value != value) continue;
            ::eventfd_write(bell.event_fd, 1);
            return;
        }
        ++plain;
    }
    std::vector<Doorbell> doorbells() const override { return bells_; }
    u64 rung(std::size_t index) const { return rings(fds[index].get()); }

    std::vector<OwnedFd> fds;
    u64 plain = 0;

  private:
    std::vector<Doorbell> bells_;
};

const std::vector<Doorbell> kBells = {
    {.offset = 0},                                          // any size, any value
    {.offset = 4, .size = 2},                               //
    {.offset = 8, .size = 4, .matches = true, .value = 7},  //
    {.offset = 8, .size = 4, .matches = true, .value = 9},
    {.offset = 12, .size = 1, .matches = true, .value = 3},
    {.offset = 16, .matches = true, .value = 0x101},  // any size that has room for it
};

// Each bell is rung by what it says and by nothing else.
void test_sizes_and_values(bool on_kvm, bool port) {
    Guest guest(on_kvm);
    auto device = std::make_shared<Bells>(kBells);
    if (port) {
        guest.pio.attach(kPort, 0x20, device);
    } else {
        guest.mmio.attach(Guest::kMmio, 0x20, device);
    }
    Code code;
    auto write8 = [&](u16 at, u8 v) { port ? code.out8(kPort + at, v) : code.store8(at, v); };
    auto write16 = [&](u16 at, u16 v) { port ? code.out16(kPort + at, v) : code.store16(at, v); };
    auto write32 = [&](u16 at, u32 v) { port ? code.out32(kPort + at, v) : code.store32(at, v); };
    write8(0, 1);
    write16(0, 2);
    write32(0, 3);
    write16(4, 1);
    write16(4, 2);
    write8(4, 3);   // not its size
    write32(4, 4);  // not its size
    write32(8, 7);
    write32(8, 9);
    write32(8, 9);
    write32(8, 8);  // not a value
    write16(8, 7);  // not its size
    write8(12, 3);
    write8(12, 4);  // not its value
    write16(16, 0x101);
    write32(16, 0x101);
    write8(16, 1);  // not its value
    write8(1, 1);   // no bell there
    code.exit();
    guest.run(code);
    CHECK_EQ(device->rung(0), 3u);
    CHECK_EQ(device->rung(1), 2u);
    CHECK_EQ(device->rung(2), 1u);
    CHECK_EQ(device->rung(3), 2u);
    CHECK_EQ(device->rung(4), 1u);
    CHECK_EQ(device->rung(5), 2u);
    CHECK_EQ(device->plain, 7u);
    if (on_kvm) {
        // Only what rings nothing came to the device at all.
        CHECK_EQ(device->writes(), 7u);
        CHECK_EQ(guest.counter("refused_ranges"), 0u);
        CHECK(guest.counter("doorbells") >= 6);
    } else {
        CHECK_EQ(device->writes(), 18u);
    }
}

// A range may show a part of the device only; bells elsewhere are out of reach.
void test_base_offset(bool on_kvm) {
    Guest guest(on_kvm);
    auto device = std::make_shared<Bells>(std::vector<Doorbell>{
        {.offset = 0x100, .size = 1}, {.offset = 0x10, .size = 1}, {.offset = 0x107, .size = 4}});
    guest.pio.attach(kPort, 8, device, 0x100);
    guest.run(Code().out8(kPort, 1).out8(kPort + 7, 1).exit());
    CHECK_EQ(device->rung(0), 1u);
    CHECK_EQ(device->rung(1), 0u);
    CHECK_EQ(device->rung(2), 0u);  // runs over the end of the range
    CHECK_EQ(device->plain, 1u);
    if (on_kvm) CHECK_EQ(guest.counter("doorbells"), 1u);
}

// Moves the device's range when it is written to, as a PCI function moves its BAR.
class Mover final : public Device {
  public:
    Mover(Bus& bus, std::shared_ptr<Device> device) : bus_(bus), device_(std::move(device)) {}
    std::string_view name() const override { return "mover"; }
    void read(u64, std::span<u8>) override {}
    void write(u64, std::span<const u8> data) override {
        if (at_ != 0) bus_.detach(at_);
        at_ = Guest::kMmio + data[0] * u64{0x1000};
        if (data[0] != 0xff) {
            bus_.attach(at_, 0x20, device_);
        } else {
            at_ = 0;
        }
    }

  private:
    Bus& bus_;
    std::shared_ptr<Device> device_;
    u64 at_ = 0;
};

void test_moves_with_its_range(bool on_kvm) {
    Guest guest(on_kvm);
    auto device = std::make_shared<Bells>(std::vector<Doorbell>{{.offset = 4, .size = 2}});
    guest.pio.attach(kPort, 1, std::make_shared<Mover>(guest.mmio, device));
    guest.mmio.attach(Guest::kMmio + 0x4000, 0x20,
                      std::make_shared<Bells>(std::vector<Doorbell>{}));
    Code code;
    code.out8(kPort, 1).store16(0x1004, 1);
    code.out8(kPort, 2).store16(0x2004, 1).store16(0x2004, 1);
    for (int i = 0; i < 20; ++i) code.out8(kPort, 1).out8(kPort, 2);
    code.store16(0x2004, 1).exit();
    guest.run(code);
    CHECK_EQ(device->rung(0), 4u);
    CHECK_EQ(guest.counter("refused_ranges"), 0u);
    if (on_kvm) {
        CHECK_EQ(guest.counter("doorbells"), 1u);
        CHECK_EQ(device->writes(), 0u);
    }
    // Where it was, there is nothing any more: the write is the guest's, not the kernel's.
    guest.load(Code().out8(kPort, 0xff).store16(0x2004, 1).exit());
    guest.vcpu->run();
    CHECK_EQ(guest.mmio.unclaimed(), 1u);
    CHECK_EQ(device->rung(0), 0u);
    if (on_kvm) CHECK_EQ(guest.counter("doorbells"), 0u);
}

// What the kernel refuses works by exits, and says so once.
void test_refused() {
    OwnedFd not_event(::open("/dev/null", O_RDWR | O_CLOEXEC));
    Guest guest(true);
    auto device = std::make_shared<Bells>(std::vector<Doorbell>{
        {.offset = 0, .size = 1},
        {.offset = 0, .size = 1},                               // the same again: EEXIST
        {.offset = 4, .size = 1, .event_fd = not_event.get()},  // no eventfd: EINVAL
        {.offset = 8, .size = 1, .event_fd = 1'000'000},        // nothing: EBADF
        {.offset = 12, .size = 3},                              // no such write
    });
    guest.pio.attach(kPort, 0x20, device);
    CHECK_EQ(guest.counter("doorbells"), 1u);
    CHECK_EQ(guest.counter("refused_ranges"), 4u);
    guest.run(Code().out8(kPort, 1).out8(kPort + 12, 1).exit());
    CHECK_EQ(device->rung(0), 1u);
    CHECK_EQ(device->plain, 1u);
    for (const auto& count : guest.log.counts()) CHECK_EQ(count.count, 4u);
    CHECK_EQ(guest.log.counts().size(), 1u);

    // A process that has no more descriptors: the rest is served by exits.
    rlimit before, low;
    CHECK_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
    low = before;
    low.rlim_cur = 300;
    CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
    std::vector<Doorbell> many;
    OwnedFd fd = make_event();
    for (u64 i = 0; i < 600; ++i) many.push_back({.offset = i, .size = 1, .event_fd = fd.get()});
    class Many final : public Device {
      public:
        explicit Many(std::vector<Doorbell> bells) : bells_(std::move(bells)) {}
        std::string_view name() const override { return "many"; }
        void read(u64, std::span<u8>) override {}
        void write(u64, std::span<const u8>) override { ++plain; }
        std::vector<Doorbell> doorbells() const override { return bells_; }
        u64 plain = 0;

      private:
        std::vector<Doorbell> bells_;
    };
    auto crowd = std::make_shared<Many>(many);
    guest.pio.attach(0x1000, 600, crowd);
    CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
    guest.run(Code().out8(0x1000, 1).out8(0x1000 + 599, 1).exit());
    CHECK_EQ(rings(fd.get()), 1u);
    CHECK_EQ(crowd->plain, 1u);
    guest.pio.detach(0x1000);
    CHECK_EQ(guest.counter("doorbells"), 1u);
}

// The device may close its descriptor before it goes: the kernel must not keep a bell for it.
void test_closed_too_early() {
    Guest guest(true);
    auto device = std::make_shared<Bells>(std::vector<Doorbell>{{.offset = 0, .size = 1}});
    guest.pio.attach(kPort, 1, device);
    device->fds.clear();
    guest.pio.detach(kPort);
    auto next = std::make_shared<Bells>(std::vector<Doorbell>{{.offset = 0, .size = 1}});
    guest.pio.attach(kPort, 1, next);
    CHECK_EQ(guest.counter("refused_ranges"), 0u);
    guest.run(Code().out8(kPort, 1).exit());
    CHECK_EQ(next->rung(0), 1u);
}

int run() {
    bool have_kvm = true;
    try {
        kvm_system();
    } catch (const EngineUnavailable& error) {
        std::printf("engine kvm: %s\n", error.what());
        have_kvm = false;
    }
    for (bool on_kvm : {false, true}) {
        if (on_kvm && !have_kvm) break;
        test_sizes_and_values(on_kvm, true);
        test_sizes_and_values(on_kvm, false);
        test_base_offset(on_kvm);
        test_moves_with_its_range(on_kvm);
    }
    if (have_kvm) {
        test_refused();
        test_closed_too_early();
    }
    int status = finish("test_bus_hooks");
    return status != 0 || have_kvm ? status : 77;
}

}  // namespace
}  // namespace pvtest

int main() {
    return pvtest::run();
}
