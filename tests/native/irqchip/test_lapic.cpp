// Local APIC: priorities, registers of both faces, IPIs, LVT, errors, mode changes (SDM 3A ch. 11).
#include "irqchip/lapic.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "fixture.hpp"

using namespace polyvisor;
using namespace polyvisor::irqchip;

namespace {

constexpr u64 kFault = LapicFixture::kFault;

void power_on() {
    Clock clock(Clock::Mode::kDeterministic);
    ApicBus bus;
    Lapic::Config config;
    config.id = 3;
    Lapic ap(config, clock, bus);
    u64 base = 0;
    CHECK(ap.read_msr(0x1b, base));
    CHECK_EQ(base, 0xfee00800u);
    CHECK_EQ(ap.mmio_base(), 0xfee00000u);
    struct Row {
        u32 offset, value;
    };
    for (Row row :
         {Row{0x20, 0x03000000}, Row{0x30, 0x01050014}, Row{0x80, 0}, Row{0xa0, 0}, Row{0xd0, 0},
          Row{0xe0, 0xffffffff}, Row{0xf0, 0xff}, Row{0x280, 0}, Row{0x300, 0}, Row{0x310, 0},
          Row{0x320, 0x10000}, Row{0x330, 0x10000}, Row{0x340, 0x10000}, Row{0x350, 0x10000},
          Row{0x360, 0x10000}, Row{0x370, 0x10000}, Row{0x380, 0}, Row{0x390, 0}, Row{0x3e0, 0}}) {
        u32 value = 0;
        ap.mmio_read(row.offset, {reinterpret_cast<u8*>(&value), 4});
        CHECK_EQ(value, row.value);
    }
    u8 bytes[8];
    ap.mmio_read(0x31, {bytes, 1});  // a byte within the version register
    CHECK_EQ(bytes[0], 0x00);
    ap.mmio_read(0x30, {bytes, 8});
    CHECK_EQ(bytes[2], 0x05);
    CHECK_EQ(bytes[4], 0);
}

void priorities() {
    LapicFixture f;
    CHECK(!f.lapic().pending());
    CHECK_EQ(f.lapic().acknowledge(), -1);
    f.send_fixed(0x31);
    CHECK(f.lapic().pending());
    CHECK_EQ(f.cpu().interrupts.load(), 1);
    f.send_fixed(0x35);
    CHECK_EQ(f.read(0x210), 0x00220000u);  // IRR, vectors 0x20..0x3f
    CHECK_EQ(f.lapic().acknowledge(), 0x35);
    CHECK_EQ(f.read(0x110), 0x00200000u);
    CHECK_EQ(f.read(0xa0), 0x30u);
    CHECK(!f.lapic().pending());  // 0x31 is of the same class
    f.send_fixed(0x41);
    CHECK(f.lapic().pending());
    CHECK_EQ(f.lapic().acknowledge(), 0x41);
    f.write(0xb0, 0);  // ends 0x41
    CHECK(!f.lapic().pending());
    f.write(0xb0, 0);  // ends 0x35
    CHECK(f.lapic().pending());
    // The task priority holds its class and those below back.
    f.lapic().set_cr8(3);
    CHECK(!f.lapic().pending());
    CHECK_EQ(f.read(0x80), 0x30u);
    CHECK_EQ(f.lapic().cr8(), 3);
    f.write(0x80, 0x2f);
    CHECK_EQ(f.read(0xa0), 0x2fu);
    CHECK(f.lapic().pending());
    CHECK_EQ(f.serve(), 0x31);
    f.write(0xb0, 0);  // one too many is harmless
    // The same vector twice before the acknowledge is one interrupt; after it, another.
    f.write(0x80, 0);
    f.send_fixed(0x50);
    f.send_fixed(0x50);
    CHECK_EQ(f.lapic().acknowledge(), 0x50);
    f.send_fixed(0x50);
    f.write(0xb0, 0);
    CHECK_EQ(f.serve(), 0x50);
    CHECK(!f.lapic().pending());
}

void software_disable() {
    LapicFixture f;
    f.write(0x350, 0x31);
    CHECK_EQ(f.read(0x350), 0x31u);
    f.send_fixed(0x40);
    f.write(0xf0, 0xff);
    CHECK_EQ(f.read(0x350), 0x10031u);  // LVTs are masked
    f.write(0x350, 0x31);
    CHECK_EQ(f.read(0x350), 0x10031u);  // and stay so
    f.send_fixed(0x41);                 // no longer taken
    CHECK_EQ(f.serve(), 0x40);          // what was there is held
    CHECK(!f.lapic().pending());
    ApicMessage nmi;
    nmi.mode = DeliveryMode::kNmi;
    CHECK(f.bus.deliver(nmi));
    CHECK_EQ(f.cpu().nmis.load(), 1);
}

void errors() {
    LapicFixture f;
    f.write(0x370, 0xfe);
    f.write(0x300, 0x0000000f);   // IPI with an illegal vector
    CHECK_EQ(f.read(0x280), 0u);  // latched by a write
    f.write(0x280, 0);
    CHECK_EQ(f.read(0x280), 0x20u);
    f.write(0x280, 0);
    CHECK_EQ(f.read(0x280), 0u);
    CHECK_EQ(f.serve(), 0xfe);
    f.send_fixed(0x05);  // received
    f.write(0x280, 0);
    CHECK_EQ(f.read(0x280), 0x40u);
    CHECK_EQ(f.serve(), 0xfe);
    f.read(0x3f0);  // no such register
    f.write(0x010, 1);
    f.write(0x280, 0);
    CHECK_EQ(f.read(0x280), 0x80u);
    CHECK_EQ(f.serve(), 0xfe);
    f.write(0x390, 5);  // read-only: no error
    f.write(0x280, 0);
    CHECK_EQ(f.read(0x280), 0u);
    f.write(0x370, 0x05);  // an illegal error vector does not recurse
    f.send_fixed(0x05);
    CHECK(!f.lapic().pending());
    // Accesses that are not aligned words are dropped.
    u8 byte = 0x10;
    f.lapic().mmio_write(0x80, {&byte, 1});
    f.lapic().mmio_write(0x84, {&byte, 1});
    CHECK_EQ(f.read(0x80), 0u);
}

void ipis_xapic() {
    LapicFixture f(4);
    auto icr = [&](u32 low, u32 destination, u32 from = 0) {
        f.write(0x310, destination << 24, from);
        f.write(0x300, low, from);
    };
    auto takers = [&](int vector) {
        u32 set = 0;
        for (u32 id = 0; id < 4; ++id) {
            if (f.lapic(id).pending()) {
                CHECK_EQ(f.serve(id), vector);
                set |= 1u << id;
            }
        }
        return set;
    };
    icr(0x40, 2);
    CHECK_EQ(takers(0x40), 0x4u);
    icr(0x40, 0xff);
    CHECK_EQ(takers(0x40), 0xfu);
    icr(0x40041, 0);  // self
    CHECK_EQ(takers(0x41), 0x1u);
    icr(0x80042, 0, 1);  // all including self
    CHECK_EQ(takers(0x42), 0xfu);
    icr(0xc0043, 0, 1);  // all excluding self
    CHECK_EQ(takers(0x43), 0xdu);
    icr(0x44, 9);
    CHECK_EQ(takers(0x44), 0x0u);
    CHECK_EQ(f.read(0x300), 0x44u);
    CHECK_EQ(f.read(0x310), 0x09000000u);

    // Logical, flat: a bit for each.
    for (u32 id = 0; id < 4; ++id) f.write(0xd0, 0x01000000u << id, id);
    icr(0x850, 0x0a);
    CHECK_EQ(takers(0x50), 0xau);
    icr(0x850, 0xff);
    CHECK_EQ(takers(0x50), 0xfu);
    // Cluster model: CPUs 0, 1 in cluster 0, 2, 3 in cluster 1.
    for (u32 id = 0; id < 4; ++id) {
        f.write(0xe0, 0x0fffffff, id);
        f.write(0xd0, (id / 2) << 28 | (1u << (id % 2)) << 24, id);
    }
    icr(0x851, 0x13);
    CHECK_EQ(takers(0x51), 0xcu);
    icr(0x851, 0x01);
    CHECK_EQ(takers(0x51), 0x1u);
    CHECK_EQ(f.read(0xe0), 0x0fffffffu);

    // INIT, its de-assert, start-up, NMI.
    icr(0xc500, 1);
    icr(0x8500, 1);
    CHECK_EQ(f.cpu(1).inits.load(), 1);
    icr(0x4699, 1);
    CHECK_EQ(f.cpu(1).sipis.load(), 1);
    CHECK_EQ(f.cpu(1).last_sipi.load(), 0x99);
    icr(0xc0400, 0);
    CHECK_EQ(f.cpu(0).nmis.load(), 0);
    CHECK_EQ(f.cpu(1).nmis.load() + f.cpu(2).nmis.load() + f.cpu(3).nmis.load(), 3);
    icr(0x4200, 3);
    CHECK_EQ(f.cpu(3).smis.load(), 1);
    icr(0x4700, 3);  // ExtINT and reserved modes are not sent
    icr(0x4300, 3);
    CHECK(!f.lapic(3).pending());
    icr(0x40400, 0);  // self with anything but fixed is invalid
    CHECK_EQ(f.cpu(0).nmis.load(), 0);
}

void x2apic_registers() {
    LapicFixture f(20);
    CHECK_EQ(f.rdmsr(0x802), kFault);
    CHECK(!f.wrmsr(0x80b, 0));
    f.x2apic(19);
    CHECK_EQ(f.lapic(19).mmio_base(), ~u64{0});
    CHECK(f.lapic(19).x2apic());
    struct Read {
        u32 index;
        u64 value;
    };
    for (Read row : {Read{0x802, 19}, Read{0x803, 0x01050014}, Read{0x808, 0}, Read{0x80a, 0},
                     Read{0x80d, 0x00010008}, Read{0x80f, 0x1ff}, Read{0x810, 0}, Read{0x827, 0},
                     Read{0x828, 0}, Read{0x830, 0}, Read{0x832, 0x10000}, Read{0x837, 0x10000},
                     Read{0x838, 0}, Read{0x839, 0}, Read{0x83e, 0},
                     // Not there, or write-only.
                     Read{0x800, kFault}, Read{0x809, kFault}, Read{0x80b, kFault},
                     Read{0x80c, kFault}, Read{0x80e, kFault}, Read{0x82f, kFault},
                     Read{0x831, kFault}, Read{0x83f, kFault}, Read{0x8ff, kFault}}) {
        CHECK_EQ(f.rdmsr(row.index, 19), row.value);
    }
    struct Write {
        u32 index;
        u64 value;
        bool fine;
    };
    for (Write row :
         {Write{0x808, 0xff, true}, Write{0x808, 0x100, false}, Write{0x808, 0, true},
          Write{0x80b, 0, true}, Write{0x80b, 1, false}, Write{0x80f, 0x11ff, true},
          Write{0x80f, 0x400, false}, Write{0x80f, bit(32) | 0x1ff, false}, Write{0x828, 0, true},
          Write{0x828, 1, false}, Write{0x832, 0x600ff, true}, Write{0x832, 0x80000, false},
          Write{0x832, 0x100, false}, Write{0x835, 0x1a7ff, true}, Write{0x835, 0x10000, true},
          Write{0x835, 0x800, false}, Write{0x837, 0x100fe, true}, Write{0x837, 0x400, false},
          Write{0x838, 0xffffffff, true}, Write{0x838, bit(32), false}, Write{0x83e, 0xb, true},
          Write{0x83e, 4, false}, Write{0x83e, 0x10, false}, Write{0x830, bit(13), false},
          Write{0x830, bit(16), false}, Write{0x830, bit(20), false}, Write{0x83f, 0x50, true},
          Write{0x83f, 0x100, false},
          // Read-only or not there.
          Write{0x802, 0, false}, Write{0x803, 0, false}, Write{0x80a, 0, false},
          Write{0x80d, 0, false}, Write{0x80e, 0, false}, Write{0x810, 0, false},
          Write{0x831, 0, false}, Write{0x839, 0, false}, Write{0x82f, 0, false}}) {
        bool fine = f.wrmsr(row.index, row.value, 19);
        if (fine != row.fine)
            std::fprintf(stderr, "MSR %x value %llx\n", row.index,
                         static_cast<unsigned long long>(row.value));
        CHECK_EQ(fine, row.fine);
    }
    CHECK_EQ(f.serve(19), 0x50);  // the self IPI
}

void ipis_x2apic() {
    LapicFixture f(20);
    for (u32 id = 0; id < 20; ++id) f.x2apic(id);
    CHECK(f.wrmsr(0x830, u64{17} << 32 | 0x45));
    CHECK_EQ(f.rdmsr(0x830), u64{17} << 32 | 0x45);
    CHECK_EQ(f.serve(17), 0x45);
    CHECK(f.wrmsr(0x830, u64{0x0001000a} << 32 | 0x846));  // cluster 1, members 1 and 3
    for (u32 id = 0; id < 20; ++id) {
        CHECK_EQ(f.lapic(id).pending(), id == 17 || id == 19);
        f.serve(id);
    }
    CHECK(f.wrmsr(0x830, u64{0xffffffff} << 32 | 0x47));
    for (u32 id = 0; id < 20; ++id) CHECK_EQ(f.serve(id), 0x47);
    CHECK(f.wrmsr(0x830, u64{0xff} << 32 | 0x48));  // no broadcast with 32-bit destinations
    for (u32 id = 0; id < 20; ++id) CHECK(!f.lapic(id).pending());
    CHECK(f.wrmsr(0x830, 0xc0500));
    CHECK_EQ(f.cpu(0).inits.load(), 0);
    CHECK_EQ(f.cpu(19).inits.load(), 1);
    CHECK(f.wrmsr(0x830, 0xc4608));
    CHECK_EQ(f.cpu(7).last_sipi.load(), 8);
}

void apic_base() {
    LapicFixture f(2);
    CHECK_EQ(f.rdmsr(0x1b), 0xfee00900u);
    CHECK_EQ(f.rdmsr(0x1b, 1), 0xfee00800u);
    struct Row {
        u64 from, to;
        bool fine;
    };
    constexpr u64 kOff = 0xfee00100, kOn = 0xfee00900, kX2 = 0xfee00d00, kBad = 0xfee00500;
    for (Row row : {Row{kOn, kX2, true}, Row{kOn, kOff, true}, Row{kOn, kBad, false},
                    Row{kOff, kOn, true}, Row{kOff, kX2, false}, Row{kOff, kBad, false},
                    Row{kX2, kOff, true}, Row{kX2, kOn, false}, Row{kX2, kBad, false},
                    Row{kX2, kX2, true}, Row{kOn, kOn | 1, false}, Row{kOn, kOn | 0x200, false},
                    Row{kOn, kOn | bit(40), false}, Row{kOn, bit(39) | 0x900, true}}) {
        f.wrmsr(0x1b, kOff);
        if (row.from != kOff) CHECK(f.wrmsr(0x1b, kOn));
        if (row.from == kX2) CHECK(f.wrmsr(0x1b, kX2));
        CHECK_EQ(f.rdmsr(0x1b), row.from);
        CHECK_EQ(f.wrmsr(0x1b, row.to), row.fine);
        CHECK_EQ(f.rdmsr(0x1b), row.fine ? row.to : row.from);
    }
    f.wrmsr(0x1b, kOn);
    f.wrmsr(0x1b, 0x12345900);
    CHECK_EQ(f.lapic().mmio_base(), 0x12345000u);
    // Switched off it takes nothing and forgets everything.
    f.write(0x80, 0x55);
    f.wrmsr(0x1b, kOff);
    CHECK_EQ(f.lapic().mmio_base(), ~u64{0});
    f.send_fixed(0x40);
    CHECK(!f.lapic().pending());
    f.wrmsr(0x1b, kOn);
    CHECK_EQ(f.read(0x80), 0u);
    CHECK_EQ(f.read(0xf0), 0xffu);
    // A CPU without x2APIC.
    Lapic::Config config;
    config.x2apic = false;
    config.tsc_deadline = false;
    Lapic plain(config, f.clock, f.bus);
    CHECK(!plain.write_msr(0x1b, kX2));
    CHECK(!plain.write_msr(0x6e0, 5));
    u64 value;
    CHECK(!plain.read_msr(0x6e0, value));
    CHECK(!plain.read_msr(0x17, value));
}

struct FakePic final : ExtIntSource {
    explicit FakePic(ApicBus& bus) : bus(bus) {}
    int acknowledge() override {
        bus.set_lint0(false);
        return 0x77;
    }
    ApicBus& bus;
};

void lint() {
    LapicFixture f(2);
    FakePic pic(f.bus);
    f.lapic(0).set_ext_int_source(&pic);
    f.bus.set_lint0(true);
    CHECK(!f.lapic(0).pending());
    f.write(0x350, 0x700);  // ExtINT: the wire is already high
    CHECK(f.lapic(0).pending());
    CHECK(!f.lapic(1).pending());
    f.lapic(0).set_cr8(15);  // does not hold ExtINT back
    CHECK(f.lapic(0).pending());
    CHECK_EQ(f.lapic(0).acknowledge(), 0x77);
    CHECK(!f.lapic(0).pending());
    CHECK_EQ(f.read(0xa0), 0xf0u);  // not in service here
    f.lapic(0).set_cr8(0);
    // Switched off, LINT0 is INTR and LINT1 is NMI.
    f.wrmsr(0x1b, 0xfee00100);
    f.bus.set_lint0(true);
    CHECK(f.lapic(0).pending());
    CHECK_EQ(f.lapic(0).acknowledge(), 0x77);
    f.bus.set_lint1(true);
    CHECK_EQ(f.cpu(0).nmis.load(), 1);
    CHECK_EQ(f.cpu(1).nmis.load(), 0);
    f.bus.set_lint1(false);
    f.wrmsr(0x1b, 0xfee00900);
    f.lapic(0).set_virtual_wire();
    f.bus.set_lint0(true);
    CHECK(f.lapic(0).pending());
    f.bus.set_lint1(true);
    CHECK_EQ(f.cpu(0).nmis.load(), 2);
    f.lapic(0).acknowledge();
    f.bus.set_lint1(false);
    // Fixed, edge and level.
    f.write(0x360, 0x51, 1);
    f.bus.set_lint1(true);
    CHECK_EQ(f.serve(1), 0x51);
    CHECK(!f.lapic(1).pending());
    f.bus.set_lint1(false);
    f.write(0x350, 0x8052, 1);
    f.bus.set_lint0(true);
    CHECK_EQ(f.read(0x350, 1), 0xc052u);  // remote IRR
    CHECK_EQ(f.serve(1), 0x52);
    CHECK_EQ(f.serve(1), 0x52);  // still high
    f.bus.set_lint0(false);
    f.write(0xb0, 0, 1);
    CHECK_EQ(f.serve(1), 0x52);
    CHECK(!f.lapic(1).pending());
    // A performance counter interrupts once and masks itself.
    f.write(0x340, 0x400, 1);
    f.lapic(1).local_interrupt(Lapic::kPerf);
    f.lapic(1).local_interrupt(Lapic::kPerf);
    CHECK_EQ(f.cpu(1).nmis.load(), 1);
    CHECK_EQ(f.read(0x340, 1), 0x10400u);
}

void init_and_reset() {
    LapicFixture f(2);
    f.x2apic(1);
    f.send_fixed(0x40, 1);
    CHECK(f.lapic(1).pending());
    f.lapic(1).reset(true);
    CHECK(!f.lapic(1).pending());
    CHECK(f.lapic(1).x2apic());  // INIT keeps the mode
    CHECK_EQ(f.rdmsr(0x80f, 1), 0xffu);
    f.lapic(1).reset(false);
    CHECK(!f.lapic(1).x2apic());
    CHECK_EQ(f.rdmsr(0x1b, 1), 0xfee00800u);
}

void snapshot() {
    LapicFixture f(2);
    f.send_fixed(0x40);
    f.send_fixed(0x61);
    f.lapic().acknowledge();
    f.write(0x80, 0x12);
    f.write(0x3e0, 3);
    f.write(0x320, 0x20030);
    f.write(0x380, 1000);
    auto saved = f.lapic().save();
    LapicFixture g(2);
    g.lapic().restore(saved);
    CHECK(g.lapic().save() == saved);
    CHECK(!g.lapic().pending());
    g.write(0xb0, 0);
    CHECK_EQ(g.serve(), 0x40);
    g.run_to(16'000);  // divided by 16
    CHECK_EQ(g.serve(), 0x30);
    CHECK_THROWS(g.lapic(1).restore(saved), StateError);  // another LAPIC's
    auto bad = [&](auto change) {
        auto state = f.lapic().state();
        change(state);
        g.lapic().restore({reinterpret_cast<const u8*>(&state), sizeof state});
    };
    auto before = g.lapic().save();
    CHECK_THROWS(bad([](Lapic::State& s) { s.apic_base = 0x400; }), StateError);
    CHECK_THROWS(bad([](Lapic::State& s) { s.lvt[Lapic::kLint0] = 1u << 20; }), StateError);
    CHECK_THROWS(bad([](Lapic::State& s) { s.initial_count = 0; }), StateError);
    CHECK_THROWS(bad([](Lapic::State& s) { s.timer_start = s.timer_deadline + 1; }), StateError);
    CHECK_THROWS(bad([](Lapic::State& s) { s.irr[0] = 1; }), StateError);
    CHECK_THROWS(bad([](Lapic::State& s) { s.divide = 4; }), StateError);
    CHECK_THROWS(g.lapic().restore({}), StateError);
    CHECK(g.lapic().save() == before);
}

}  // namespace

int main() {
    power_on();
    priorities();
    software_disable();
    errors();
    ipis_xapic();
    x2apic_registers();
    ipis_x2apic();
    apic_base();
    lint();
    init_and_reset();
    snapshot();
    return pvtest::finish("test_lapic");
}
