// 82093AA: registers, edge and level delivery, remote IRR, EOI.
#include "irqchip/ioapic.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "fixture.hpp"

using namespace polyvisor;
using namespace polyvisor::irqchip;

namespace {

struct Fixture : LapicFixture {
    Fixture() : LapicFixture(2), ioapic(bus) {}
    u32 reg(u8 index) {
        out32(ioapic, 0, index);
        return in32(ioapic, 0x10);
    }
    void reg(u8 index, u32 value) {
        out32(ioapic, 0, index);
        out32(ioapic, 0x10, value);
    }
    void route(unsigned pin, u32 low, u8 destination = 0) {
        reg(static_cast<u8>(0x11 + 2 * pin), static_cast<u32>(destination) << 24);
        reg(static_cast<u8>(0x10 + 2 * pin), low);
    }
    Ioapic ioapic;
};

constexpr u32 kLevel = 1 << 15, kMask = 1 << 16, kRemoteIrr = 1 << 14, kLogical = 1 << 11;

void registers() {
    Fixture f;
    CHECK_EQ(f.reg(0), 0u);
    f.reg(0, 0xffffffff);
    CHECK_EQ(f.reg(0), 0x0f000000u);
    CHECK_EQ(f.reg(1), 0x00170011u);
    f.reg(1, 0);
    CHECK_EQ(f.reg(1), 0x00170011u);
    CHECK_EQ(f.reg(2), 0x0f000000u);
    for (unsigned pin = 0; pin < 24; ++pin) CHECK_EQ(f.reg(0x10 + 2 * pin), kMask);
    f.reg(0x10 + 2 * 23 + 1, 0xffffffff);
    CHECK_EQ(f.reg(0x10 + 2 * 23 + 1), 0xff000000u);
    f.reg(0x10, 0xffffffff);
    CHECK_EQ(f.reg(0x10), 0x0001afffu);  // status bits cannot be written
    CHECK_EQ(f.reg(0x40), 0u);           // beyond the last pin
    CHECK_EQ(in32(f.ioapic, 0x0), 0x40u);
    out8(f.ioapic, 0, 1);  // a byte selects as well
    CHECK_EQ(in32(f.ioapic, 0x10), 0x00170011u);
}

void edges() {
    Fixture f;
    f.route(4, 0x34, 1);
    f.ioapic.set_irq(4, true);
    CHECK(!f.lapic(0).pending());
    CHECK(f.lapic(1).pending());
    CHECK_EQ(f.serve(1), 0x34);
    f.ioapic.set_irq(4, true);
    CHECK(!f.lapic(1).pending());
    f.ioapic.set_irq(4, false);
    f.ioapic.set_irq(4, true);
    CHECK_EQ(f.serve(1), 0x34);
    // Masked: an edge is lost.
    f.route(4, 0x34 | kMask, 1);
    f.ioapic.set_irq(4, false);
    f.ioapic.set_irq(4, true);
    f.route(4, 0x34, 1);
    CHECK(!f.lapic(1).pending());
    f.ioapic.set_irq(99, true);  // no such pin
}

void levels() {
    Fixture f;
    f.route(10, 0x51 | kLevel);
    f.ioapic.set_irq(10, true);
    CHECK_EQ(f.reg(0x10 + 20) & kRemoteIrr, kRemoteIrr);
    CHECK_EQ(f.lapic().acknowledge(), 0x51);
    f.ioapic.set_irq(10, false);
    f.ioapic.set_irq(10, true);  // no second message before the EOI
    CHECK(!f.lapic().pending());
    f.write(0xb0, 0);  // EOI: still asserted, so again
    CHECK(f.lapic().pending());
    CHECK_EQ(f.lapic().acknowledge(), 0x51);
    f.ioapic.set_irq(10, false);
    f.write(0xb0, 0);
    CHECK(!f.lapic().pending());
    CHECK_EQ(f.reg(0x10 + 20) & kRemoteIrr, 0u);
    // Masked levels wait.
    f.route(10, 0x51 | kLevel | kMask);
    f.ioapic.set_irq(10, true);
    CHECK(!f.lapic().pending());
    f.route(10, 0x51 | kLevel);
    CHECK(f.lapic().pending());
    CHECK_EQ(f.lapic().acknowledge(), 0x51);
    // To edge and back clears a stuck remote IRR.
    f.route(10, 0x51 | kMask);
    f.route(10, 0x51 | kLevel | kMask);
    CHECK_EQ(f.reg(0x10 + 20) & kRemoteIrr, 0u);
}

void eoi_register_and_suppressed_broadcast() {
    Fixture f;
    CHECK_EQ(f.read(0x30) & (1u << 24), 1u << 24);
    f.write(0xf0, 0x11ff);  // suppress EOI broadcasts
    f.route(9, 0x61 | kLevel);
    f.ioapic.set_irq(9, true);
    CHECK_EQ(f.serve(), 0x61);
    CHECK_EQ(f.reg(0x10 + 18) & kRemoteIrr, kRemoteIrr);
    f.ioapic.set_irq(9, false);
    out32(f.ioapic, 0x40, 0x60);  // another vector
    CHECK_EQ(f.reg(0x10 + 18) & kRemoteIrr, kRemoteIrr);
    out32(f.ioapic, 0x40, 0x61);
    CHECK_EQ(f.reg(0x10 + 18) & kRemoteIrr, 0u);
}

void other_delivery_modes() {
    Fixture f;
    f.route(3, 0x400);  // NMI
    f.ioapic.set_irq(3, true);
    CHECK_EQ(f.cpu(0).nmis.load(), 1);
    f.route(5, 0x500, 1);  // INIT
    f.ioapic.set_irq(5, true);
    CHECK_EQ(f.cpu(1).inits.load(), 1);
    // Logical destination, lowest priority: one of the two, the less busy.
    f.write(0xd0, 0x01000000, 0);
    f.write(0xd0, 0x02000000, 1);
    f.write(0x80, 0x20, 0);  // CPU 0's task priority
    f.route(6, 0x171 | kLogical, 3);
    f.ioapic.set_irq(6, true);
    CHECK(!f.lapic(0).pending());
    CHECK(f.lapic(1).pending());
    CHECK_EQ(f.serve(1), 0x71);
    // Nobody there: a level interrupt is not in service anywhere.
    f.route(7, 0x72 | kLevel, 9);
    f.ioapic.set_irq(7, true);
    CHECK_EQ(f.reg(0x10 + 14) & kRemoteIrr, 0u);
}

void snapshot() {
    Fixture f;
    f.route(10, 0x51 | kLevel);
    f.ioapic.set_irq(10, true);
    f.reg(0, 0x05000000);
    auto saved = f.ioapic.save();
    Fixture g;
    g.ioapic.restore(saved);
    CHECK(g.ioapic.save() == saved);
    CHECK_EQ(g.reg(0x10 + 20), 0x51 | kLevel | kRemoteIrr);
    saved = g.ioapic.save();
    auto state = f.ioapic.state();
    state.redirection[0] |= bit(20);
    CHECK_THROWS(g.ioapic.restore({reinterpret_cast<const u8*>(&state), sizeof state}), StateError);
    CHECK_THROWS(g.ioapic.restore({}), StateError);
    CHECK(g.ioapic.save() == saved);
    g.ioapic.reset();
    CHECK_EQ(g.reg(0x10 + 20), kMask);
}

}  // namespace

int main() {
    registers();
    edges();
    levels();
    eoi_register_and_suppressed_broadcast();
    other_delivery_modes();
    snapshot();
    return pvtest::finish("test_ioapic");
}
