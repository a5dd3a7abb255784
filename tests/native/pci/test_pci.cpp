// Configuration space by both ways, BARs that follow the guest, INTx.
#include <cstring>
#include <map>

#include "base/error.hpp"
#include "check.hpp"
#include "pci/host_bridge.hpp"

using namespace polyvisor;
using namespace polyvisor::pci;

namespace {

class Registers final : public Device {
  public:
    std::string_view name() const override { return "registers"; }
    void read(u64 offset, std::span<u8> data) override {
        for (u8& byte : data) byte = static_cast<u8>(0x40 + offset++);
    }
    void write(u64 offset, std::span<const u8>) override { last = offset; }
    void reset() override { ++resets; }
    u64 last = ~u64{0};
    int resets = 0;
};

struct Line final : IrqLine {
    explicit Line(bool& level) : level(level) {}
    void set(bool now) override { level = now; }
    bool& level;
};

struct Fixture {
    Fixture() : pio("port", 0x10000), mmio("memory", bit(40)), bridge(pio, mmio) {
        ports = std::make_shared<ConfigPorts>(bridge);
        pio.attach(0xcf8, 8, ports);
        mmio.attach(0xe0000000, HostBridge::kEcamSize, std::make_shared<Ecam>(bridge));
    }
    std::shared_ptr<Function> add(int slot = -1) {
        auto function = std::make_shared<Function>(
            "probe", Identity{0x1234, 0x5678, 0x010203, 7, 0xaaaa, 0xbbbb});
        function->add_bar(0, BarKind::kIo, 32, registers);
        function->add_bar(1, BarKind::kMemory32, 0x1000, registers);
        function->add_bar(2, BarKind::kMemory64Prefetchable, 0x10000, registers);
        function->set_interrupt(1, std::make_unique<Line>(intx));
        this->slot = bridge.plug(function, slot);
        return function;
    }
    u32 out_in(u32 address, unsigned size = 4, unsigned byte = 0) {
        pio.write(0xcf8, {reinterpret_cast<const u8*>(&address), 4});
        u32 value = 0;
        pio.read(0xcfc + byte, {reinterpret_cast<u8*>(&value), size});
        return value;
    }
    u32 read(unsigned reg, unsigned size = 4) {
        return out_in(0x80000000 | slot << 11 | (reg & 0xfc), size, reg & 3);
    }
    void write(unsigned reg, u32 value, unsigned size = 4) {
        u32 address = 0x80000000 | slot << 11 | (reg & 0xfc);
        pio.write(0xcf8, {reinterpret_cast<const u8*>(&address), 4});
        pio.write(0xcfc + (reg & 3), {reinterpret_cast<const u8*>(&value), size});
    }
    Bus pio, mmio;
    HostBridge bridge;
    std::shared_ptr<ConfigPorts> ports;
    std::shared_ptr<Registers> registers = std::make_shared<Registers>();
    unsigned slot = 0;
    bool intx = false;
};

void identity_by_ports() {
    Fixture f;
    CHECK_EQ(f.read(0x00), 0x00081b36u);
    CHECK_EQ(f.read(0x08), 0x06000000u);
    CHECK_EQ(f.read(0x0e, 1), 0u);
    f.add();
    CHECK_EQ(f.slot, 1u);
    CHECK_EQ(f.read(0x00), 0x56781234u);
    CHECK_EQ(f.read(0x02, 2), 0x5678u);
    CHECK_EQ(f.read(0x03, 1), 0x56u);
    CHECK_EQ(f.read(0x08), 0x01020307u);
    CHECK_EQ(f.read(0x2c), 0xbbbbaaaau);
    CHECK_EQ(f.read(0x3c), 0x00000100u);
    f.write(0x00, 0xffffffff);
    CHECK_EQ(f.read(0x00), 0x56781234u);  // read-only
    f.write(0x3c, 0xff0b, 2);
    CHECK_EQ(f.read(0x3c, 2), 0x010bu);
    // Nobody there, another bus, another function, not enabled, odd widths.
    CHECK_EQ(f.out_in(0x80000000 | 9 << 11), ~0u);
    CHECK_EQ(f.out_in(0x80010000), ~0u);
    CHECK_EQ(f.out_in(0x80000100), ~0u);
    CHECK_EQ(f.out_in(0x00000000), ~0u);
    CHECK_EQ(f.out_in(0x80000000, 2, 1), 0xffffu);
    // CONFIG_ADDRESS is only a dword, and its reserved bits read zero.
    u32 address = 0xff123457;
    f.pio.write(0xcf8, {reinterpret_cast<const u8*>(&address), 4});
    u8 byte = 0x12;
    f.pio.write(0xcf8, {&byte, 1});
    u32 back = 0;
    f.pio.read(0xcf8, {reinterpret_cast<u8*>(&back), 4});
    CHECK_EQ(back, 0x80123454u);
    auto saved = f.ports->save();
    f.ports->reset();
    f.pio.read(0xcf8, {reinterpret_cast<u8*>(&back), 4});
    CHECK_EQ(back, 0u);
    f.ports->restore(saved);
    f.pio.read(0xcf8, {reinterpret_cast<u8*>(&back), 4});
    CHECK_EQ(back, 0x80123454u);
}

void ecam() {
    Fixture f;
    f.add(3);
    u32 value = 0;
    auto read = [&](u64 offset, std::size_t size) {
        value = 0;
        f.mmio.read(0xe0000000 + offset, {reinterpret_cast<u8*>(&value), size});
        return value;
    };
    CHECK_EQ(read(3 << 15, 4), 0x56781234u);
    CHECK_EQ(read((3 << 15) + 2, 2), 0x5678u);
    CHECK_EQ(read((3 << 15) + 1, 1), 0x12u);
    CHECK_EQ(read((3 << 15) + 1, 2), 0xffffu);
    CHECK_EQ(read(4 << 15, 4), ~0u);
    CHECK_EQ(read((3 << 15) + 0x100, 4), 0u);  // no extended capabilities
    u8 line = 9;
    f.mmio.write(0xe0000000 + (3 << 15) + 0x3c, {&line, 1});
    CHECK_EQ(f.read(0x3c, 1), 9u);
}

void bar_sizing_and_moving() {
    Fixture f;
    auto function = f.add();
    // As every OS sizes: ones, read back.
    struct Row {
        unsigned reg;
        u32 sized, type;
    };
    for (Row row : {Row{0x10, 0xffffffe1, 1}, Row{0x14, 0xfffff000, 0}, Row{0x18, 0xffff000c, 0xc},
                    Row{0x1c, 0xffffffff, 0}, Row{0x20, 0, 0}, Row{0x30, 0, 0}}) {
        CHECK_EQ(f.read(row.reg), row.type);
        f.write(row.reg, 0xffffffff);
        CHECK_EQ(f.read(row.reg), row.sized);
        f.write(row.reg, 0);
    }
    f.write(0x10, 0xc000);
    f.write(0x14, 0xc1000000);
    f.write(0x18, 0x00000000);
    f.write(0x1c, 0x00000001);
    CHECK(f.pio.find(0xc000) == nullptr);  // nothing is decoded yet
    f.write(0x04, 0x0007, 2);
    CHECK(f.pio.find(0xc01f) == f.registers.get());
    CHECK(f.pio.find(0xc020) == nullptr);
    CHECK(f.mmio.find(0xc1000fff) == f.registers.get());
    CHECK(f.mmio.find(0x1'0000'ffff) == f.registers.get());
    CHECK(function->bar(2).mapped);
    CHECK_EQ(function->bar(2).address, bit(32));
    u8 byte = 0;
    f.pio.read(0xc003, {&byte, 1});
    CHECK_EQ(byte, 0x43);
    // Moved while decoded.
    f.write(0x14, 0xc2000000);
    CHECK(f.mmio.find(0xc1000000) == nullptr);
    CHECK(f.mmio.find(0xc2000000) == f.registers.get());
    // Decoding off.
    f.write(0x04, 0x0001, 2);
    CHECK(f.mmio.find(0xc2000000) == nullptr);
    CHECK(f.pio.find(0xc000) == f.registers.get());
    f.write(0x04, 0x0003, 2);
    // Over another device, or beyond the bus: a guest's mistake, nothing is mapped, nothing breaks.
    f.write(0x10, 0x0cf9);
    CHECK(!function->bar(0).mapped);
    CHECK(f.pio.find(0xcf8) == f.ports.get());
    f.write(0x14, 0xe0000000);
    CHECK(!function->bar(1).mapped);
    f.write(0x1c, 0xffffff00);
    CHECK(!function->bar(2).mapped);
    f.write(0x10, 0xd000);
    CHECK(function->bar(0).mapped);
    CHECK_EQ(f.read(0x04, 2), 0x0003u);
    f.write(0x04, 0xffff, 2);
    CHECK_EQ(f.read(0x04, 2), 0x0547u);
    f.bridge.reset();
    CHECK(f.pio.find(0xd000) == nullptr);
    CHECK_EQ(f.read(0x10), 1u);
    CHECK_EQ(f.registers->resets, 3);
}

void bad_bars_and_slots() {
    Fixture f;
    Function function("bad", Identity{});
    auto target = f.registers;
    CHECK_THROWS(function.add_bar(0, BarKind::kIo, 3, target), ConfigError);
    CHECK_THROWS(function.add_bar(0, BarKind::kIo, 512, target), ConfigError);
    CHECK_THROWS(function.add_bar(0, BarKind::kMemory32, 8, target), ConfigError);
    CHECK_THROWS(function.add_bar(6, BarKind::kIo, 32, target), ConfigError);
    CHECK_THROWS(function.add_bar(5, BarKind::kMemory64, 32, target), ConfigError);
    function.add_bar(2, BarKind::kMemory64, 32, target);
    CHECK_THROWS(function.add_bar(3, BarKind::kIo, 32, target), ConfigError);
    CHECK_THROWS(function.add_bar(1, BarKind::kMemory64, 32, target), ConfigError);
    f.add(5);
    CHECK_THROWS(f.add(5), ConfigError);
    CHECK_THROWS(f.add(0), ConfigError);
    CHECK_THROWS(f.add(32), ConfigError);
    for (int i = 0; i < 30; ++i) f.add();
    CHECK_THROWS(f.add(), ConfigError);
}

void capabilities() {
    ConfigSpace space;
    u8 body[6] = {1, 2, 3, 4, 5, 6}, mask[1] = {0x0f};
    CHECK_EQ(space.add_capability(0x09, body, mask), 0x40);
    CHECK_EQ(space.add_capability(0x11, {body, 2}), 0x48);
    CHECK_EQ(space.get8(kCapabilities), 0x40);
    CHECK_EQ(space.get8(0x41), 0x48);
    CHECK_EQ(space.get8(0x49), 0);
    CHECK_EQ(space.get16(kStatus), kStatusCapabilities);
    CHECK_EQ(space.find_capability(0x11), 0x48);
    CHECK_EQ(space.find_capability(0x05), 0);
    space.write(0x42, 0xffff, 2);
    CHECK_EQ(space.get16(0x42), 0x020f);
    std::vector<u8> large(200);
    CHECK_THROWS(space.add_capability(1, large), ConfigError);
    space.set_clear_on_one(0x06, 0xf900, 2);
    space.set16(0x06, 0xff10);
    space.write(0x06, 0x8000, 2);
    CHECK_EQ(space.get16(0x06), 0x7f10);
}

void interrupts() {
    Fixture f;
    auto function = f.add();
    CHECK_EQ(HostBridge::gsi(1, 1), 17u);
    CHECK_EQ(HostBridge::gsi(3, 2), 16u);
    function->set_intx(true);
    CHECK(f.intx);
    CHECK_EQ(f.read(0x06, 2) & 8, 8u);
    f.write(0x04, 0x400, 2);  // interrupt disable
    CHECK(!f.intx);
    CHECK_EQ(f.read(0x06, 2) & 8, 8u);
    f.write(0x04, 0, 2);
    CHECK(f.intx);
    function->set_intx(false);
    CHECK(!f.intx);
    CHECK_EQ(f.read(0x06, 2) & 8, 0u);
}

void assignment() {
    Fixture f;
    auto a = f.add(), b = f.add();
    f.bridge.assign(0xc000, 0xc0000000, 0xd0000000, {10, 11, 10, 11});
    CHECK_EQ(a->bar(0).address, 0xc000u);
    CHECK_EQ(b->bar(0).address, 0xc020u);
    CHECK_EQ(a->bar(1).address, 0xc0000000u);
    CHECK_EQ(a->bar(2).address, 0xc0010000u);
    CHECK_EQ(b->bar(1).address, 0xc0020000u);
    CHECK(a->bar(2).mapped && b->bar(0).mapped);
    CHECK_EQ(a->command(), 7);
    CHECK_EQ(f.read(0x3c, 1), 10u);  // slot 2, pin A
    Fixture small;
    small.add();
    CHECK_THROWS(small.bridge.assign(0xc000, 0xc0000000, 0xc0001000, {}), ConfigError);
}

void snapshot() {
    Fixture f;
    f.add();
    f.bridge.assign(0xc000, 0xc0000000, 0xd0000000, {10, 11, 10, 11});
    f.bridge.function(1)->set_intx(true);
    auto saved = f.bridge.save();
    Fixture g;
    g.add();
    g.bridge.restore(saved);
    CHECK(g.bridge.save() == saved);
    CHECK(g.intx);
    CHECK(g.mmio.find(0xc0000000) == g.registers.get());
    Fixture other;
    CHECK_THROWS(other.bridge.restore(saved), StateError);  // no device at slot 1
    auto bad = saved;
    bad[5] ^= 1;  // the host bridge's vendor
    CHECK_THROWS(g.bridge.restore(bad), StateError);
    CHECK_THROWS(g.bridge.restore({saved.data(), saved.size() - 1}), StateError);
    CHECK(g.bridge.save() == saved);
}

void reset_port() {
    class Reset final : public Device {
      public:
        std::string_view name() const override { return "reset"; }
        void read(u64, std::span<u8> data) override { data[0] = 0x5a; }
        void write(u64, std::span<const u8> data) override { value = data[0]; }
        int value = -1;
    };
    Bus pio("port", 0x10000), mmio("memory", bit(40));
    HostBridge bridge(pio, mmio);
    auto reset = std::make_shared<Reset>();
    pio.attach(0xcf8, 8, std::make_shared<ConfigPorts>(bridge, reset));
    u8 byte = 6;
    pio.write(0xcf9, {&byte, 1});
    CHECK_EQ(reset->value, 6);
    pio.read(0xcf9, {&byte, 1});
    CHECK_EQ(byte, 0x5a);
    u32 address = 0x80000600;
    pio.write(0xcf8, {reinterpret_cast<const u8*>(&address), 4});
    CHECK_EQ(reset->value, 6);  // a dword is CONFIG_ADDRESS
}

}  // namespace

int main() {
    identity_by_ports();
    ecam();
    bar_sizing_and_moving();
    bad_bars_and_slots();
    capabilities();
    interrupts();
    assignment();
    snapshot();
    reset_port();
    return pvtest::finish("test_pci");
}
