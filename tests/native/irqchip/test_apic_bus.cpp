// The wiring: MSIs, the router from GSIs to chips, the 8259 through LINT0, and many threads at
// once.
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "fixture.hpp"
#include "irqchip/irq_router.hpp"

using namespace polyvisor;
using namespace polyvisor::irqchip;

namespace {

struct Board : LapicFixture {
    explicit Board(u32 cpus = 2)
        : LapicFixture(cpus),
          ioapic(bus),
          pic([this](bool level) { bus.set_lint0(level); }),
          router(&pic, &ioapic) {
        for (auto& lapic : lapics) lapic->set_ext_int_source(&pic);
        for (unsigned chip : {0u, 2u}) {
            out8(pic, chip, 0x11);
            out8(pic, chip + 1, chip == 0 ? 0x20 : 0x28);
            out8(pic, chip + 1, chip == 0 ? 4 : 2);
            out8(pic, chip + 1, 1);
        }
    }
    void route(unsigned pin, u32 low) {
        out32(ioapic, 0, 0x10 + 2 * pin);
        out32(ioapic, 0x10, low);
    }
    Ioapic ioapic;
    Pic pic;
    IrqRouter router;
};

// What a message is as an MSI, for engines that have the local APICs.
void messages_as_msis() {
    ApicMessage message;
    message.destination = 3;
    message.vector = 0x61;
    CHECK(to_msi(message) == (Msi{0xfee03000, 0x4061}));
    message.level_triggered = true;
    CHECK(to_msi(message) == (Msi{0xfee03000, 0xc061}));
    message.logical = true;
    CHECK(to_msi(message) == (Msi{0xfee03004, 0xc061}));
    message.mode = DeliveryMode::kLowestPriority;
    CHECK(to_msi(message) == (Msi{0xfee0300c, 0xc161}));
    message = {};
    message.destination = 0x12345;
    message.mode = DeliveryMode::kNmi;
    CHECK(to_msi(message) == (Msi{0x12300'fee45000, 0x4400}));
}

void msi() {
    Board f(4);
    f.bus.send(0xfee00000 | 2 << 12, 0x41);
    CHECK_EQ(f.serve(2), 0x41);
    f.bus.send(0xfee00000 | 0xff << 12, 0x42);
    for (u32 id = 0; id < 4; ++id) CHECK_EQ(f.serve(id), 0x42);
    for (u32 id = 0; id < 4; ++id) f.write(0xd0, 0x01000000u << id, id);
    f.bus.send(0xfee00004 | 6 << 12, 0x43);  // logical without the redirection hint: both
    CHECK_EQ(f.serve(1), 0x43);
    CHECK_EQ(f.serve(2), 0x43);
    int total = 0;
    f.bus.send(0xfee0000c | 6 << 12, 0x44);  // with the hint: one of them
    for (u32 id = 0; id < 4; ++id) total += f.serve(id) == 0x44;
    CHECK_EQ(total, 1);
    f.bus.send(0xfee00000, 0x400);  // NMI
    CHECK_EQ(f.cpu(0).nmis.load(), 1);
    CHECK_EQ(f.bus.dropped(), 0u);
    f.bus.send(0xfed00000, 0x45);
    f.bus.send(0x1'fee00000, 0x45);
    f.bus.send(0xfee00000, 0x345);   // reserved mode
    f.bus.send(0xfee00000, 0x8045);  // level de-assert
    CHECK_EQ(f.bus.dropped(), 4u);
    CHECK(!f.lapic(0).pending());
    f.bus.send(0xfee00000, 0xc046);
    CHECK_EQ(f.serve(0), 0x46);
}

void lowest_priority_takes_turns() {
    Board f(4);
    for (u32 id = 0; id < 4; ++id) f.write(0xd0, 0x01000000u << id, id);
    int counts[4] = {};
    for (int i = 0; i < 400; ++i) {
        f.bus.send(0xfee0000c | 0xf << 12, 0x51);
        for (u32 id = 0; id < 4; ++id) counts[id] += f.serve(id) == 0x51;
    }
    for (int count : counts) CHECK_EQ(count, 100);
}

void router() {
    Board f;
    CHECK_THROWS(f.router.line(24), ConfigError);
    CHECK_THROWS(f.router.route_pci(9, 11), ConfigError);
    CHECK_THROWS(f.router.route_pci(16, 2), ConfigError);
    // The timer: 8259 input 0, IOAPIC pin 2, by either name.
    auto timer = f.router.line(0);
    f.route(2, 0x30);
    timer->pulse();
    CHECK_EQ(f.serve(), 0x30);
    CHECK_EQ(f.pic.acknowledge(), 0x20);
    out8(f.pic, 0, 0x20);
    auto same = f.router.line(2);
    same->pulse();
    CHECK_EQ(f.serve(), 0x30);
    CHECK_EQ(f.pic.acknowledge(), 0x20);
    out8(f.pic, 0, 0x20);
    // Two sources of one level interrupt, and a PCI interrupt that shares its 8259 input.
    f.router.route_pci(17, 11);
    out8(f.pic, 5, 0x08);  // ELCR: 11 is level-triggered
    f.route(17, 0x8040);
    f.route(11, 0x8041);
    auto a = f.router.line(17), b = f.router.line(17), isa = f.router.line(11);
    a->set(true);
    b->set(true);
    isa->set(true);
    a->set(false);
    CHECK_EQ(f.ioapic.state().lines, bit(17) | bit(11));
    CHECK_EQ(f.pic.state().chips[1].lines, 0x08);
    b->set(false);
    CHECK_EQ(f.ioapic.state().lines, bit(11));
    CHECK_EQ(f.pic.state().chips[1].lines, 0x08);
    isa->set(false);
    CHECK_EQ(f.pic.state().chips[1].lines, 0);
    // A source that is destroyed lets go; a chip that was reset hears of its wires again.
    a->set(true);
    f.pic.restore(Pic().save());
    f.router.refresh();
    CHECK_EQ(f.pic.state().chips[1].lines, 0x08);
    a.reset();
    CHECK_EQ(f.ioapic.state().lines, 0u);
    // Re-routing moves the level.
    b->set(true);
    f.router.route_pci(17, 10);
    CHECK_EQ(f.pic.state().chips[1].lines, 0x04);
    f.router.route_pci(17, 0xff);
    CHECK_EQ(f.pic.state().chips[1].lines, 0x00);
}

// As an OS without APIC sees it: device -> 8259 -> LINT0 -> acknowledge -> 8259 vector.
void virtual_wire() {
    Board f;
    f.lapic(0).set_virtual_wire();
    auto keyboard = f.router.line(1);
    auto disk = f.router.line(14);
    keyboard->pulse();
    disk->pulse();
    CHECK(f.lapic(0).pending());
    CHECK(!f.lapic(1).pending());
    CHECK_EQ(f.lapic(0).acknowledge(), 0x21);
    CHECK(!f.lapic(0).pending());
    out8(f.pic, 0, 0x20);
    CHECK(f.lapic(0).pending());
    CHECK_EQ(f.lapic(0).acknowledge(), 0x2e);
    // A more urgent one while another is served: the CPU is told anew.
    int told = f.cpu(0).interrupts;
    keyboard->pulse();
    CHECK(f.lapic(0).pending());
    CHECK(f.cpu(0).interrupts > told);
    // Withdrawn between INTR and the acknowledge: the spurious vector.
    CHECK_EQ(f.lapic(0).acknowledge(), 0x21);
    CHECK_EQ(f.lapic(0).acknowledge(), -1);
}

// Devices, IPIs, MSIs, EOIs and register accesses from several threads: nothing is lost, nothing
// deadlocks (the lock order in apic_bus.hpp), and ThreadSanitizer has something to look at.
void many_threads() {
    Board f(2);
    f.route(10, 0x8050);
    f.route(4, 0x61);
    auto level = f.router.line(10);
    auto edge = f.router.line(4);
    std::atomic<bool> stop{false};
    std::atomic<int> msis{0}, ipis{0}, levels{0}, edges{0};
    auto vcpu = [&](u32 id) {
        while (!stop) {
            if (!f.lapic(id).pending()) {
                std::this_thread::yield();
                continue;
            }
            int vector = f.lapic(id).acknowledge();
            if (vector == 0x50) {
                level->set(false);  // first: counting lets the device raise it again
                ++levels;
            }
            if (vector == 0x61) ++edges;
            if (vector == 0x70) ++msis;
            if (vector == 0x80) ++ipis;
            if (vector >= 0) f.write(0xb0, 0, id);
            f.lapic(id).set_cr8(0);
        }
    };
    std::thread cpu0(vcpu, 0), cpu1(vcpu, 1);
    auto wait_for = [](std::atomic<int>& count, int want) {
        auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (count < want && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        return count >= want;
    };
    bool fine = true;
    std::thread device([&] {
        for (int i = 1; i <= 300 && fine; ++i) {
            level->set(true);
            fine = fine && wait_for(levels, i);
        }
    });
    for (int i = 1; i <= 300; ++i) {
        f.bus.send(0xfee01000, 0x70);  // to CPU 1
        CHECK(wait_for(msis, i));
        f.write(0x300, 0x40080, 0);  // from CPU 0 to itself
        CHECK(wait_for(ipis, i));
        edge->pulse();
        CHECK(wait_for(edges, i));
    }
    device.join();
    stop = true;
    cpu0.join();
    cpu1.join();
    CHECK(fine);
    CHECK(levels >= 300);
    CHECK_EQ(msis.load(), 300);
    CHECK_EQ(ipis.load(), 300);
    CHECK_EQ(edges.load(), 300);
}

}  // namespace

int main() {
    msi();
    messages_as_msis();
    lowest_priority_takes_turns();
    router();
    virtual_wire();
    many_threads();
    return pvtest::finish("test_apic_bus");
}
