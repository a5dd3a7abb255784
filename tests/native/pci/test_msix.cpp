// MSI-X: table, masks, pending bits, capability.
#include "pci/msix.hpp"

#include <vector>

#include "base/error.hpp"
#include "check.hpp"
#include "pci/host_bridge.hpp"

using namespace polyvisor;
using namespace polyvisor::pci;

namespace {

struct Sink final : MsiSink {
    void send(u64 address, u32 data) override { messages.emplace_back(address, data); }
    std::vector<std::pair<u64, u32>> messages;
};

void write32(Device& device, u64 offset, u32 value) {
    device.write(offset, {reinterpret_cast<const u8*>(&value), 4});
}
u32 read32(Device& device, u64 offset) {
    u32 value = 0;
    device.read(offset, {reinterpret_cast<u8*>(&value), 4});
    return value;
}

void layout() {
    Sink sink;
    CHECK_THROWS(Msix(sink, 0), ConfigError);
    CHECK_THROWS(Msix(sink, 2049), ConfigError);
    Msix small(sink, 3), large(sink, 2048);
    CHECK_EQ(small.pba_offset(), 2048u);
    CHECK_EQ(small.bar_size(), 4096u);
    CHECK_EQ(large.pba_offset(), 32768u);
    CHECK_EQ(large.bar_size(), 65536u);
    auto body = large.capability(4);
    CHECK_EQ(body[0], 0xff);
    CHECK_EQ(body[1], 0x07);
    CHECK_EQ(body[2], 4);
    CHECK_EQ(body[6], 4);
    CHECK_EQ(body[7], 0x80);
}

void delivery_and_masks() {
    Sink sink;
    Msix msix(sink, 3);
    CHECK_EQ(read32(msix, 16 + 12), 1u);  // masked after reset
    u64 address = 0xfee01000;
    msix.write(16, {reinterpret_cast<const u8*>(&address), 8});
    write32(msix, 16 + 8, 0x41);
    CHECK_EQ(read32(msix, 16), 0xfee01000u);
    CHECK_EQ(read32(msix, 16 + 8), 0x41u);
    msix.notify(1);  // not enabled: nothing, not even pending
    CHECK(!msix.enabled());
    msix.set_control(Msix::kEnable);
    msix.notify(1);
    CHECK(sink.messages.empty());
    CHECK_EQ(read32(msix, 2048), 2u);  // pending
    write32(msix, 2048, 0);            // read-only
    CHECK_EQ(read32(msix, 2048), 2u);
    write32(msix, 16 + 12, 0);  // unmasking sends it
    CHECK_EQ(sink.messages.size(), 1u);
    CHECK(sink.messages[0] == std::pair(u64{0xfee01000}, u32{0x41}));
    CHECK_EQ(read32(msix, 2048), 0u);
    msix.notify(1);
    CHECK_EQ(sink.messages.size(), 2u);
    msix.set_control(Msix::kEnable | Msix::kFunctionMask);
    msix.notify(1);
    msix.notify(1);
    CHECK_EQ(sink.messages.size(), 2u);
    msix.set_control(Msix::kEnable);
    CHECK_EQ(sink.messages.size(), 3u);  // once
    msix.notify(3);                      // no such vector
    CHECK_EQ(sink.messages.size(), 3u);
    // Odd accesses are dropped; beyond table and PBA reads zero.
    u8 byte = 0xff;
    msix.write(16, {&byte, 1});
    CHECK_EQ(read32(msix, 16), 0xfee01000u);
    CHECK_EQ(read32(msix, 48), 0u);
    write32(msix, 16, 0xfee02003);
    CHECK_EQ(read32(msix, 16), 0xfee02000u);  // dword aligned
    msix.reset();
    CHECK_EQ(read32(msix, 16), 0u);
    CHECK(!msix.enabled());
}

// As a device uses it: the capability in configuration space drives the table.
class Endpoint final : public Function {
  public:
    explicit Endpoint(MsiSink& sink)
        : Function("endpoint", Identity{1, 2, 0x020000}), msix(std::make_shared<Msix>(sink, 4)) {
        add_bar(1, BarKind::kMemory32, msix->bar_size(), msix);
        capability = add_capability(kCapMsix, msix->capability(1), Msix::kCapabilityWritable);
    }
    std::shared_ptr<Msix> msix;
    u16 capability;

  protected:
    void config_written(u16 offset, unsigned size) override {
        if (offset < capability + 4u && offset + size > capability + 2u) {
            msix->set_control(space().get16(static_cast<u16>(capability + 2)));
        }
    }
};

void through_configuration_space() {
    Sink sink;
    Bus pio("port", 0x10000), mmio("memory", bit(40));
    HostBridge bridge(pio, mmio);
    auto endpoint = std::make_shared<Endpoint>(sink);
    bridge.plug(endpoint);
    CHECK_EQ(bridge.config_read(0, 1, 0, endpoint->capability, 4), 0x00030011u);
    bridge.config_write(0, 1, 0, endpoint->capability, 0xffffffff, 4);
    CHECK_EQ(bridge.config_read(0, 1, 0, endpoint->capability, 4), 0xc0030011u);
    CHECK(endpoint->msix->enabled());
    bridge.config_write(0, 1, 0, static_cast<u16>(endpoint->capability + 2), 0, 2);
    CHECK(!endpoint->msix->enabled());
}

void snapshot() {
    Sink sink;
    Msix msix(sink, 70);
    write32(msix, 69 * 16, 0xfee00000);
    write32(msix, 69 * 16 + 8, 0x55);
    msix.set_control(Msix::kEnable);
    msix.notify(69);
    auto saved = msix.save();
    Msix other(sink, 70);
    other.restore(saved);
    CHECK(other.save() == saved);
    write32(other, 69 * 16 + 12, 0);
    CHECK_EQ(sink.messages.size(), 1u);
    Msix wrong(sink, 71);
    CHECK_THROWS(wrong.restore(saved), StateError);
}

}  // namespace

int main() {
    layout();
    delivery_and_masks();
    through_configuration_space();
    snapshot();
    return pvtest::finish("test_msix");
}
