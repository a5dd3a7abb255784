// 8259A behaviour, command word by command word.
#include "irqchip/pic.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "fixture.hpp"

using namespace polyvisor;
using namespace polyvisor::irqchip;

namespace {

constexpr unsigned kMaster = 0, kSlave = 2, kElcr = 4;

// As Linux and every BIOS set it up: vectors 0x20 and 0x28, cascade on 2.
void initialise(Pic& pic, u8 icw4 = 1) {
    for (unsigned chip : {kMaster, kSlave}) {
        out8(pic, chip, 0x11);
        out8(pic, chip + 1, chip == kMaster ? 0x20 : 0x28);
        out8(pic, chip + 1, chip == kMaster ? 0x04 : 0x02);
        out8(pic, chip + 1, icw4);
    }
}

u8 read_irr(Pic& pic, unsigned chip) {
    out8(pic, chip, 0x0a);
    return in8(pic, chip);
}
u8 read_isr(Pic& pic, unsigned chip) {
    out8(pic, chip, 0x0b);
    return in8(pic, chip);
}

void pulse(Pic& pic, unsigned irq) {
    pic.set_irq(irq, true);
    pic.set_irq(irq, false);
}

void power_on_is_silent() {
    Pic pic;
    pulse(pic, 1);
    CHECK(!pic.output());
    CHECK_EQ(in8(pic, kMaster + 1), 0xff);
}

void edges_and_output() {
    int changes = 0;
    bool level = false;
    Pic pic([&](bool now) {
        ++changes;
        level = now;
    });
    initialise(pic);
    CHECK_EQ(in8(pic, kMaster + 1), 0x00);
    pic.set_irq(1, true);
    CHECK(level);
    CHECK_EQ(changes, 1);
    CHECK_EQ(read_irr(pic, kMaster), 0x02);
    CHECK_EQ(pic.acknowledge(), 0x21);
    CHECK(!level);
    CHECK_EQ(read_irr(pic, kMaster), 0x00);
    CHECK_EQ(read_isr(pic, kMaster), 0x02);
    pic.set_irq(1, true);  // still high: no new edge
    CHECK(!level);
    out8(pic, kMaster, 0x20);
    CHECK_EQ(read_isr(pic, kMaster), 0x00);
    CHECK(!level);
    pulse(pic, 1);
    CHECK(!level || read_irr(pic, kMaster) == 2);
    pic.set_irq(1, false);
    pic.set_irq(1, true);
    CHECK(level);
}

// Fully nested: lower priorities wait for the EOI, higher ones interrupt.
void priorities() {
    Pic pic;
    initialise(pic);
    pulse(pic, 3);
    pulse(pic, 5);
    pulse(pic, 1);
    CHECK_EQ(pic.acknowledge(), 0x21);
    CHECK(!pic.output());
    pulse(pic, 0);
    CHECK(pic.output());
    CHECK_EQ(pic.acknowledge(), 0x20);
    CHECK_EQ(read_isr(pic, kMaster), 0x03);
    out8(pic, kMaster, 0x20);  // non-specific: ends the highest, 0
    CHECK_EQ(read_isr(pic, kMaster), 0x02);
    out8(pic, kMaster, 0x61);  // specific: 1
    CHECK_EQ(read_isr(pic, kMaster), 0x00);
    CHECK_EQ(pic.acknowledge(), 0x23);
    out8(pic, kMaster, 0x20);
    CHECK_EQ(pic.acknowledge(), 0x25);
}

void masks() {
    Pic pic;
    initialise(pic);
    out8(pic, kMaster + 1, 0xfd);
    pulse(pic, 3);
    CHECK(!pic.output());
    CHECK_EQ(read_irr(pic, kMaster), 0x08);
    out8(pic, kMaster + 1, 0xf5);
    CHECK(pic.output());
    CHECK_EQ(pic.acknowledge(), 0x23);
}

void cascade() {
    Pic pic;
    initialise(pic);
    pulse(pic, 12);
    CHECK(pic.output());
    CHECK_EQ(read_irr(pic, kMaster), 0x04);
    CHECK_EQ(pic.acknowledge(), 0x2c);
    CHECK_EQ(read_isr(pic, kMaster), 0x04);
    CHECK_EQ(read_isr(pic, kSlave), 0x10);
    // A more urgent one behind the slave waits for the master's EOI, unless fully nested specially.
    pulse(pic, 8);
    CHECK(!pic.output());
    out8(pic, kMaster, 0x20);
    CHECK(pic.output());
    CHECK_EQ(pic.acknowledge(), 0x28);
    out8(pic, kSlave, 0x20);
    out8(pic, kSlave, 0x20);
    out8(pic, kMaster, 0x20);
    CHECK_EQ(read_isr(pic, kSlave), 0x00);

    initialise(pic, 0x11);  // special fully nested mode
    pulse(pic, 12);
    CHECK_EQ(pic.acknowledge(), 0x2c);
    pulse(pic, 8);
    CHECK(pic.output());
    CHECK_EQ(pic.acknowledge(), 0x28);
    pic.set_irq(2, true);  // the cascade is no input
    CHECK_EQ(read_irr(pic, kMaster) & 4, 0);
}

void spurious() {
    Pic pic;
    initialise(pic);
    CHECK_EQ(pic.acknowledge(), 0x27);
    CHECK_EQ(read_isr(pic, kMaster), 0x00);
    out8(pic, kElcr + 1, 0x02);  // IRQ 9 level-triggered
    pic.set_irq(9, true);
    pic.set_irq(9, false);  // withdrawn before the acknowledge
    CHECK(!pic.output());
    CHECK_EQ(pic.acknowledge(), 0x27);
    // The slave's own spurious interrupt sets the master's ISR bit 2, but none of its own.
    pic.set_irq(9, true);
    out8(pic, kSlave + 1, 0x02);
    CHECK(!pic.output());
}

void level_triggered() {
    Pic pic;
    initialise(pic);
    out8(pic, kElcr, 0xff);
    CHECK_EQ(in8(pic, kElcr), 0xf8);
    out8(pic, kElcr + 1, 0xff);
    CHECK_EQ(in8(pic, kElcr + 1), 0xde);
    pic.set_irq(11, true);
    CHECK_EQ(pic.acknowledge(), 0x2b);
    out8(pic, kSlave, 0x20);
    out8(pic, kMaster, 0x20);
    CHECK(pic.output());  // still high
    CHECK_EQ(pic.acknowledge(), 0x2b);
    pic.set_irq(11, false);
    out8(pic, kSlave, 0x20);
    out8(pic, kMaster, 0x20);
    CHECK(!pic.output());
}

void rotation() {
    Pic pic;
    initialise(pic);
    pulse(pic, 3);
    pic.acknowledge();
    out8(pic, kMaster, 0xa0);  // rotate on non-specific EOI: 3 becomes lowest, 4 highest
    pulse(pic, 3);
    pulse(pic, 1);
    pulse(pic, 5);
    CHECK_EQ(pic.acknowledge(), 0x25);
    out8(pic, kMaster, 0x20);
    CHECK_EQ(pic.acknowledge(), 0x21);
    out8(pic, kMaster, 0x20);
    CHECK_EQ(pic.acknowledge(), 0x23);
    out8(pic, kMaster, 0x20);
    out8(pic, kMaster, 0xc7);  // set priority: 7 lowest, as at the start
    pulse(pic, 5);
    pulse(pic, 1);
    CHECK_EQ(pic.acknowledge(), 0x21);
    out8(pic, kMaster, 0xe1);  // rotate on specific EOI of 1
    CHECK_EQ(pic.state().chips[0].lowest, 1);
    CHECK_EQ(pic.acknowledge(), 0x25);
    out8(pic, kMaster, 0x40);  // no operation
    CHECK_EQ(read_isr(pic, kMaster), 0x20);
}

void automatic_eoi() {
    Pic pic;
    initialise(pic, 0x03);
    pulse(pic, 4);
    CHECK_EQ(pic.acknowledge(), 0x24);
    CHECK_EQ(read_isr(pic, kMaster), 0x00);
    out8(pic, kMaster, 0x80);  // rotate in automatic EOI mode
    pulse(pic, 4);
    pic.acknowledge();
    CHECK_EQ(pic.state().chips[0].lowest, 4);
    out8(pic, kMaster, 0x00);
    pulse(pic, 6);
    pic.acknowledge();
    CHECK_EQ(pic.state().chips[0].lowest, 4);
}

void special_mask() {
    Pic pic;
    initialise(pic);
    pulse(pic, 1);
    pic.acknowledge();
    pulse(pic, 6);
    CHECK(!pic.output());
    out8(pic, kMaster + 1, 0x02);
    CHECK(!pic.output());
    out8(pic, kMaster,
         0x68);  // set special mask mode: the masked level in service holds nobody back
    CHECK(pic.output());
    CHECK_EQ(pic.acknowledge(), 0x26);
    out8(pic, kMaster, 0x48);
    CHECK_EQ(pic.state().chips[0].special_mask, 0);
}

void poll() {
    Pic pic;
    initialise(pic);
    out8(pic, kMaster, 0x0c);
    CHECK_EQ(in8(pic, kMaster), 0x00);
    pulse(pic, 5);
    out8(pic, kMaster, 0x0c);
    CHECK_EQ(in8(pic, kMaster), 0x85);
    CHECK(!pic.output());
    CHECK_EQ(read_isr(pic, kMaster), 0x20);
}

void initialisation_words() {
    Pic pic;
    initialise(pic);
    pulse(pic, 5);
    out8(pic, kMaster + 1, 0xff);
    out8(pic, kMaster, 0x13);  // single, ICW4 follows: no ICW3
    CHECK(!pic.output());
    out8(pic, kMaster + 1, 0x47);
    out8(pic, kMaster + 1, 0x01);
    CHECK_EQ(in8(pic, kMaster + 1), 0x00);   // ICW1 clears the mask
    CHECK_EQ(read_irr(pic, kMaster), 0x00);  // and forgets edges
    out8(pic, kMaster + 1, 0xaa);            // an ordinary mask again
    CHECK_EQ(in8(pic, kMaster + 1), 0xaa);
    CHECK_EQ(pic.state().chips[0].vector_base, 0x40);
    out8(pic, kMaster, 0x18);  // level-triggered, cascaded, no ICW4
    out8(pic, kMaster + 1, 0x20);
    out8(pic, kMaster + 1, 0x04);
    CHECK_EQ(pic.state().chips[0].init_step, 0);
    pic.set_irq(4, true);
    CHECK(pic.output());
    pic.set_irq(4, false);
    CHECK(!pic.output());
}

// What Linux does to see whether there is a PIC.
void probe() {
    Pic pic;
    out8(pic, kSlave + 1, 0xff);
    out8(pic, kMaster + 1, 0xfb);
    CHECK_EQ(in8(pic, kMaster + 1), 0xfb);
}

void snapshot() {
    Pic pic;
    initialise(pic);
    pulse(pic, 5);
    pic.set_irq(12, true);
    auto saved = pic.save();
    bool level = false;
    Pic other([&](bool now) { level = now; });
    other.restore(saved);
    CHECK(level);
    CHECK(other.save() == saved);
    CHECK_EQ(other.acknowledge(), 0x2c);
    auto bad = saved;
    bad[6] = 9;  // lowest
    CHECK_THROWS(other.restore(bad), StateError);
    CHECK_THROWS(other.restore({saved.data(), saved.size() - 1}), StateError);
    pic.reset();
    CHECK(!pic.output());
    CHECK_EQ(pic.state().chips[1].lines, 0x10);  // the wire is not the chip's to reset
}

}  // namespace

int main() {
    power_on_is_silent();
    edges_and_output();
    priorities();
    masks();
    cascade();
    spurious();
    level_triggered();
    rotation();
    automatic_eoi();
    special_mask();
    poll();
    initialisation_words();
    probe();
    snapshot();
    return pvtest::finish("test_pic");
}
