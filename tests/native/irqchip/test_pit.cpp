// 8254 behaviour: counts, outputs and interrupts at exact ticks.
#include "irqchip/pit.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "fixture.hpp"

using namespace polyvisor;
using namespace polyvisor::irqchip;

namespace {

struct CountingLine final : IrqLine {
    void set(bool level) override {
        if (level) ++edges;
    }
    int edges = 0;
};

struct Fixture {
    Fixture() : clock(Clock::Mode::kDeterministic), pit(clock, line) {}
    /// Virtual time of the middle of tick n, so that rounding is no matter.
    static Nanoseconds at(u64 tick) {
        return static_cast<u64>((static_cast<u128>(tick) * 2 + 1) * 1'000'000'000 / 2 /
                                Pit::kFrequency);
    }
    void go(u64 tick) {
        clock.advance_to(at(tick));
        while (clock.run_expired() <= clock.now()) {
        }
    }
    void program(unsigned channel, unsigned mode, u16 count, bool bcd = false) {
        out8(pit, 3, static_cast<u8>(channel << 6 | 0x30 | mode << 1 | bcd));
        out8(pit, channel, static_cast<u8>(count));
        out8(pit, channel, static_cast<u8>(count >> 8));
    }
    u16 count(unsigned channel) {
        out8(pit, 3, static_cast<u8>(channel << 6));
        u8 low = in8(pit, channel);
        return static_cast<u16>(in8(pit, channel) << 8 | low);
    }
    u8 status(unsigned channel) {
        out8(pit, 3, static_cast<u8>(0xe0 | 2 << channel));
        return in8(pit, channel);
    }
    bool out(unsigned channel) { return status(channel) & 0x80; }
    void gate2(bool on) { out8(pit, 4, on ? 1 : 0); }

    Clock clock;
    CountingLine line;
    Pit pit;
};

void mode0_terminal_count() {
    Fixture f;
    f.go(100);
    f.program(0, 0, 10);
    CHECK_EQ(f.status(0), 0x70);  // output low, null count, both bytes, mode 0
    f.go(101);                    // loaded by the next tick
    CHECK_EQ(f.status(0), 0x30);
    CHECK_EQ(f.count(0), 10);
    f.go(105);
    CHECK_EQ(f.count(0), 6);
    f.go(110);
    CHECK(!f.out(0));
    CHECK_EQ(f.line.edges, 0);
    f.go(111);  // N + 1 ticks after the write
    CHECK(f.out(0));
    CHECK_EQ(f.count(0), 0);
    CHECK_EQ(f.line.edges, 1);
    f.go(112);
    CHECK_EQ(f.count(0), 0xffff);  // goes on counting, without interrupts
    f.go(400'000);
    CHECK_EQ(f.line.edges, 1);
    f.program(0, 0, 5);
    CHECK(!f.out(0));
}

void mode2_rate_generator() {
    Fixture f;
    f.program(0, 2, 100);
    f.go(1);
    CHECK_EQ(f.count(0), 100);
    f.go(51);
    CHECK_EQ(f.count(0), 50);
    CHECK(f.out(0));
    f.go(100);
    CHECK_EQ(f.count(0), 1);
    CHECK(!f.out(0));  // low for the last tick
    CHECK_EQ(f.line.edges, 0);
    f.go(101);
    CHECK_EQ(f.count(0), 100);
    CHECK(f.out(0));
    CHECK_EQ(f.line.edges, 1);
    for (u64 n = 2; n <= 50; ++n) {
        f.go(1 + n * 100);
        CHECK_EQ(f.line.edges, static_cast<int>(n));
    }
    // A new count waits for the end of the period.
    f.go(5001 + 30);
    out8(f.pit, 0, 200);
    out8(f.pit, 0, 0);
    CHECK_EQ(f.count(0), 70);
    CHECK_EQ(f.status(0) & 0x40, 0x40);
    f.go(5101);
    CHECK_EQ(f.count(0), 200);
    CHECK_EQ(f.status(0) & 0x40, 0);
}

void mode3_square_wave() {
    Fixture f;
    f.gate2(true);
    f.program(2, 3, 8);
    f.go(1);
    u16 even[] = {8, 6, 4, 2, 8, 6, 4, 2, 8};
    for (unsigned i = 0; i < 9; ++i) {
        f.go(1 + i);
        CHECK_EQ(f.count(2), even[i]);
        CHECK_EQ(f.out(2), i % 8 < 4);
    }
    f.program(2, 3, 5);  // odd: high for 3, low for 2
    u16 odd[] = {4, 2, 0, 4, 2, 4};
    for (unsigned i = 0; i < 6; ++i) {
        f.go(10 + i);
        CHECK_EQ(f.count(2), odd[i]);
        CHECK_EQ(f.out(2), i % 5 < 3);
    }
    f.gate2(false);
    CHECK(f.out(2));  // at once high
    // Mode 7 is mode 3.
    f.program(2, 7, 5);
    CHECK_EQ(f.status(2) & 0x0e, 0x06);
}

void mode4_strobe() {
    Fixture f;
    f.program(0, 4, 20);
    f.go(20);
    CHECK(f.out(0));
    f.go(21);
    CHECK(!f.out(0));
    CHECK_EQ(f.line.edges, 0);
    f.go(22);
    CHECK(f.out(0));
    CHECK_EQ(f.line.edges, 1);
    f.go(100'000);
    CHECK_EQ(f.line.edges, 1);
    // Again by a count alone, as Linux's one-shot events do.
    out8(f.pit, 0, 50);
    out8(f.pit, 0, 0);
    f.go(100'052);
    CHECK_EQ(f.line.edges, 2);
}

void mode1_and_5_are_triggered() {
    Fixture f;
    f.program(2, 1, 10);
    f.go(50);
    CHECK(f.out(2));
    CHECK_EQ(f.status(2) & 0x40, 0x40);
    f.gate2(true);
    f.go(51);
    CHECK(!f.out(2));
    f.go(60);
    CHECK(!f.out(2));
    f.go(61);
    CHECK(f.out(2));
    f.gate2(false);
    f.gate2(true);  // again
    f.go(65);
    CHECK(!f.out(2));
    f.gate2(false);  // the gate's fall does not stop it
    f.go(72);
    CHECK(f.out(2));
    f.program(2, 5, 3);
    f.gate2(true);
    f.go(76);
    CHECK(!f.out(2));
    f.go(77);
    CHECK(f.out(2));
}

void gate_holds_the_count() {
    Fixture f;
    f.gate2(true);
    f.program(2, 0, 1000);
    f.go(101);
    CHECK_EQ(f.count(2), 900);
    f.gate2(false);
    f.go(500);
    CHECK_EQ(f.count(2), 900);
    f.gate2(true);
    f.go(600);
    CHECK_EQ(f.count(2), 800);
    // Linux's and everybody's TSC calibration: mode 0 on channel 2, poll OUT2 in port 0x61.
    f.program(2, 0, 11931);
    CHECK_EQ(in8(f.pit, 4) & 0x20, 0);
    f.go(600 + 11931);
    CHECK_EQ(in8(f.pit, 4) & 0x20, 0);
    f.go(600 + 11932);
    CHECK_EQ(in8(f.pit, 4) & 0x20, 0x20);
}

void latches() {
    Fixture f;
    f.program(0, 2, 0x1234);
    f.go(1);
    out8(f.pit, 3, 0x00);  // latch
    f.go(50);
    out8(f.pit, 3, 0x00);  // a second latch is ignored until the first was read
    CHECK_EQ(in8(f.pit, 0), 0x34);
    CHECK_EQ(in8(f.pit, 0), 0x12);
    CHECK_EQ(f.count(0), 0x1234 - 49);
    // Read-back of status and count together: status comes first.
    out8(f.pit, 3, 0xc2);
    CHECK_EQ(in8(f.pit, 0), 0xb4);
    u8 low = in8(f.pit, 0);
    CHECK_EQ(in8(f.pit, 0) << 8 | low, 0x1234 - 49);
    // One byte only.
    out8(f.pit, 3, 0x14);
    out8(f.pit, 0, 0x40);
    f.go(51);
    CHECK_EQ(in8(f.pit, 0), 0x40);
    f.go(52);
    CHECK_EQ(in8(f.pit, 0), 0x3f);
    out8(f.pit, 3, 0x24);  // high byte only
    out8(f.pit, 0, 0x02);
    f.go(53);
    CHECK_EQ(in8(f.pit, 0), 0x02);
    f.go(54);
    CHECK_EQ(in8(f.pit, 0), 0x01);
    CHECK_EQ(in8(f.pit, 3), 0xff);
}

void bcd_and_zero() {
    Fixture f;
    f.program(0, 2, 0x1000, true);
    f.go(2);
    CHECK_EQ(f.count(0), 0x0999);
    f.program(0, 2, 0);  // 65536
    f.go(3);
    CHECK_EQ(f.count(0), 0);
    f.go(4);
    CHECK_EQ(f.count(0), 0xffff);
    f.go(3 + 65536);
    CHECK_EQ(f.line.edges, 1);
    f.program(0, 2, 0, true);  // 10000
    f.go(4 + 65536);
    CHECK_EQ(f.count(0), 0);
    f.go(5 + 65536);
    CHECK_EQ(f.count(0), 0x9999);
}

void port61() {
    Fixture f;
    out8(f.pit, 4, 0xff);
    CHECK_EQ(in8(f.pit, 4) & 0xcf, 0x0f);
    u8 before = in8(f.pit, 4) & 0x10;
    f.go(18);
    CHECK_EQ(in8(f.pit, 4) & 0x10, before ^ 0x10);
    f.go(36);
    CHECK_EQ(in8(f.pit, 4) & 0x10, before);
}

// 1193 ticks = 1 kHz: a second gives 1000 interrupts; a host that is late owes only so many.
void lost_ticks() {
    Fixture f;
    f.program(0, 2, 1193);
    for (u64 ms = 1; ms <= 1000; ++ms) {
        f.clock.advance_to(ms * 1'000'000);
        f.clock.run_expired();
    }
    CHECK(f.line.edges >= 999 && f.line.edges <= 1001);
    int before = f.line.edges;
    f.clock.advance_to(2'000'000'000);
    f.clock.run_expired();
    CHECK_EQ(f.line.edges, before + 1);
    for (u64 step = 1; step <= 40; ++step) {  // 10 ms in quarters of a millisecond
        f.clock.advance_to(2'000'000'000 + step * 250'000);
        f.clock.run_expired();
    }
    int caught_up = f.line.edges - before;
    CHECK(caught_up >= 16 && caught_up <= 20);  // 10 regular, 1 late, 8 owed
    // A period that no host could serve is thinned out, not obeyed.
    f.program(0, 2, 2);
    before = f.line.edges;
    for (u64 step = 1; step <= 1000; ++step) {
        f.clock.advance_to(2'010'000'000 + step * 1000);
        f.clock.run_expired();
    }
    CHECK(f.line.edges - before <= 21);
    f.program(0, 0, 0);
    before = f.line.edges;
    f.pit.reset();
    f.clock.advance_to(5'000'000'000);
    f.clock.run_expired();
    CHECK_EQ(f.line.edges, before);
}

void snapshot() {
    Fixture f;
    f.program(0, 2, 100);
    f.gate2(true);
    f.program(2, 3, 77);
    f.go(1050);
    auto saved = f.pit.save();
    Fixture g;
    g.go(1050);
    g.pit.restore(saved);
    CHECK(g.pit.save() == saved);
    CHECK_EQ(g.count(0), f.count(0));
    CHECK_EQ(g.count(2), f.count(2));
    g.go(1101);
    CHECK_EQ(g.line.edges, 1);
    auto state = f.pit.state();
    auto restore = [&](auto change) {
        auto bad = state;
        change(bad);
        const u8* bytes = reinterpret_cast<const u8*>(&bad);
        f.pit.restore({bytes, sizeof bad});
    };
    CHECK_THROWS(restore([](Pit::State& s) { s.channels[0].mode = 6; }), StateError);
    CHECK_THROWS(restore([](Pit::State& s) { s.channels[0].reload = 0; }), StateError);
    CHECK_THROWS(restore([](Pit::State& s) { s.channels[1].reload = 0x10001; }), StateError);
    CHECK_THROWS(restore([](Pit::State& s) { s.backlog = 100; }), StateError);
    CHECK_THROWS(restore([](Pit::State& s) { s.channels[2].access = 0; }), StateError);
}

}  // namespace

int main() {
    mode0_terminal_count();
    mode2_rate_generator();
    mode3_square_wave();
    mode4_strobe();
    mode1_and_5_are_triggered();
    gate_holds_the_count();
    latches();
    bcd_and_zero();
    port61();
    lost_ticks();
    snapshot();
    return pvtest::finish("test_pit");
}
