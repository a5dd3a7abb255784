// virtio devices in a whole machine: where they are plugged, and that nothing of them outlives the
// chips that they interrupt (make asan).
#include "base/error.hpp"
#include "check.hpp"
#include "machine/machine.hpp"

using namespace polyvisor;

namespace {

class Silent final : public virtio::Device {
  public:
    Silent(const virtio::Environment& environment, int& alive)
        : Device(environment, {.type = 42, .name = "virtio-silent", .queue_sizes = {16}}),
          alive_(alive) {
        ++alive_;
    }
    ~Silent() override { --alive_; }

  private:
    void serve(unsigned, virtio::Queue&) override {}
    int& alive_;
};

void lives_and_ends(bool started) {
    int alive = 0;
    {
        MachineConfig config;
        config.memory = 16 << 20;
        config.engine = "soft";
        Machine machine(config);
        for (int n = 0; n < 6; ++n) {
            const auto transport = n % 2 == 0 ? VirtioTransport::kPci : VirtioTransport::kMmio;
            auto device = std::make_shared<Silent>(machine.virtio_environment(), alive);
            const auto place = machine.virtio().plug(device, transport);
            CHECK_EQ(place.slot, unsigned(n % 2 == 0 ? 1 + n / 2 : n / 2));
            if (n % 2 != 0) {
                CHECK_EQ(place.gpa, PcLayout::kVirtioMmio + 0x1000 * place.slot);
                // An interrupt of it is up when the machine ends.
                CHECK(machine.mmio().find(place.gpa) != nullptr);
                const u32 value = 0xf;
                machine.mmio().write(place.gpa + 0x70, {reinterpret_cast<const u8*>(&value), 4});
            }
        }
        CHECK_EQ(alive, 6);
        if (started) {
            machine.start();
            machine.stop();
            auto late = std::make_shared<Silent>(machine.virtio_environment(), alive);
            CHECK_THROWS(machine.virtio().plug(late, VirtioTransport::kPci), StateMismatch);
        }
    }
    CHECK_EQ(alive, 0);
}

void no_more_places() {
    int alive = 0;
    MachineConfig config;
    config.memory = 16 << 20;
    config.engine = "soft";
    Machine machine(config);
    auto plug = [&](VirtioTransport transport) {
        machine.virtio().plug(std::make_shared<Silent>(machine.virtio_environment(), alive),
                              transport);
    };
    for (unsigned n = 0; n < VirtioSlots::kMmioSlots; ++n) plug(VirtioTransport::kMmio);
    CHECK_THROWS(plug(VirtioTransport::kMmio), ConfigError);
    for (unsigned n = 1; n < 32; ++n) plug(VirtioTransport::kPci);
    CHECK_THROWS(plug(VirtioTransport::kPci), ConfigError);
    CHECK_THROWS(parse_virtio_transport("isa"), ConfigError);
}

}  // namespace

int main() {
    lives_and_ends(false);
    lives_and_ends(true);
    no_more_places();
    return pvtest::finish("virtio slots");
}
