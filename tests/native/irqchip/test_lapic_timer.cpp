// The LAPIC timer in its three modes, on a deterministic clock (1 TSC tick = 1 ns unless set).
#include "check.hpp"
#include "fixture.hpp"

using namespace polyvisor;
using namespace polyvisor::irqchip;

namespace {

constexpr u32 kPeriodic = 0x20000, kTscDeadline = 0x40000, kMasked = 0x10000;

void dividers() {
    struct Row {
        u32 code, divider;
    };
    for (Row row : {Row{0, 2}, Row{1, 4}, Row{2, 8}, Row{3, 16}, Row{8, 32}, Row{9, 64},
                    Row{10, 128}, Row{11, 1}}) {
        LapicFixture f;
        f.write(0x3e0, row.code);
        CHECK_EQ(f.read(0x3e0), row.code);
        f.write(0x320, 0x30);
        f.write(0x380, 1000);
        CHECK_EQ(f.read(0x390), 1000u);
        f.run_to(row.divider * 400);
        CHECK_EQ(f.read(0x390), 600u);
        f.run_to(row.divider * 1000 - 1);
        CHECK(!f.lapic().pending());
        CHECK_EQ(f.read(0x390), 1u);
        f.run_to(row.divider * 1000);
        CHECK_EQ(f.serve(), 0x30);
        CHECK_EQ(f.read(0x390), 0u);
        CHECK_EQ(f.read(0x380), 1000u);
        CHECK_EQ(f.clock.next_deadline(), kNever);
    }
}

void periodic() {
    LapicFixture f;
    f.write(0x3e0, 0xb);
    f.write(0x320, kPeriodic | 0x31);
    f.write(0x380, 100'000);
    for (u64 n = 1; n <= 10; ++n) {
        f.run_to(n * 100'000 - 1);
        CHECK(!f.lapic().pending());
        f.run_to(n * 100'000);
        CHECK_EQ(f.serve(), 0x31);
        CHECK_EQ(f.read(0x390), 100'000u);
    }
    // Missed periods are one interrupt, and the phase is kept.
    f.run_to(1'550'000);
    CHECK_EQ(f.serve(), 0x31);
    CHECK(!f.lapic().pending());
    CHECK_EQ(f.read(0x390), 50'000u);
    f.run_to(1'599'999);
    CHECK(!f.lapic().pending());
    f.run_to(1'600'000);
    CHECK_EQ(f.serve(), 0x31);
    // Zero stops it.
    f.write(0x380, 0);
    CHECK_EQ(f.read(0x390), 0u);
    f.run_to(5'000'000);
    CHECK(!f.lapic().pending());
    // A period no host could serve is thinned out.
    f.write(0x380, 1);
    int count = 0;
    for (u64 t = 5'000'000; t < 6'000'000; t += 1000) {
        f.run_to(t);
        if (f.lapic().pending()) {
            f.serve();
            ++count;
        }
    }
    CHECK(count >= 15 && count <= 21);
}

void masked_and_changed() {
    LapicFixture f;
    f.write(0x3e0, 0xb);
    f.write(0x320, kMasked | 0x32);
    f.write(0x380, 1000);
    f.run_to(500);
    CHECK_EQ(f.read(0x390), 500u);  // counts while masked
    f.write(0x3e0, 0x0);            // now half as fast
    CHECK_EQ(f.read(0x390), 500u);
    f.run_to(1000);
    CHECK_EQ(f.read(0x390), 250u);
    f.write(0x320, 0x32);
    f.run_to(1499);
    CHECK(!f.lapic().pending());
    f.run_to(1500);
    CHECK_EQ(f.serve(), 0x32);
    f.write(0x320, kMasked | 0x32);
    f.write(0x380, 10);
    f.run_to(2000);
    f.write(0x320, 0x32);  // expired while masked: lost
    CHECK(!f.lapic().pending());
}

void tsc_deadline() {
    LapicFixture f;
    CHECK(f.wrmsr(0x6e0, 1000));  // ignored in another mode
    CHECK_EQ(f.rdmsr(0x6e0), 0u);
    f.write(0x320, kTscDeadline | 0x33);
    CHECK(f.wrmsr(0x6e0, 1000));
    CHECK_EQ(f.rdmsr(0x6e0), 1000u);
    f.write(0x380, 50);  // the count is ignored in this mode
    CHECK_EQ(f.read(0x390), 0u);
    f.run_to(999);
    CHECK(!f.lapic().pending());
    f.run_to(1000);
    CHECK_EQ(f.serve(), 0x33);
    CHECK_EQ(f.rdmsr(0x6e0), 0u);
    CHECK(f.wrmsr(0x6e0, 900));  // already past: at once
    CHECK_EQ(f.rdmsr(0x6e0), 0u);
    CHECK_EQ(f.serve(), 0x33);
    CHECK(f.wrmsr(0x6e0, 5000));
    CHECK(f.wrmsr(0x6e0, 0));  // disarms
    f.run_to(6000);
    CHECK(!f.lapic().pending());
    CHECK(f.wrmsr(0x6e0, ~u64{0}));  // never
    CHECK_EQ(f.clock.next_deadline(), kNever);
    // Leaving the mode disarms.
    CHECK(f.wrmsr(0x6e0, 7000));
    f.write(0x320, 0x33);
    f.run_to(8000);
    CHECK(!f.lapic().pending());

    // Another TSC rate, and an offset.
    f.clock.set_tsc_khz(2'500'000);
    f.write(0x320, kTscDeadline | 0x33);
    CHECK(f.wrmsr(0x6e0, 25'000));  // at 10 us
    f.run_to(9'999);
    CHECK(!f.lapic().pending());
    f.run_to(10'000);
    CHECK_EQ(f.serve(), 0x33);
    f.lapic().set_tsc_offset(1'000'000);  // guest TSC is 1'025'000 now
    CHECK(f.wrmsr(0x6e0, 1'027'500));
    f.run_to(10'999);
    CHECK(!f.lapic().pending());
    f.lapic().set_tsc_offset(975'000);  // it was set back: the deadline moves
    f.run_to(20'999);
    CHECK(!f.lapic().pending());
    f.run_to(21'000);
    CHECK_EQ(f.serve(), 0x33);
    CHECK(f.wrmsr(0x6e0, 2'000'000));
    f.lapic().set_tsc_offset(10'000'000);  // set forward beyond it: due
    f.run_to(21'001);
    CHECK_EQ(f.serve(), 0x33);
}

void deadline_msr_in_x2apic_mode() {
    LapicFixture f;
    f.x2apic();
    CHECK(f.wrmsr(0x832, kTscDeadline | 0xec));
    CHECK(f.wrmsr(0x6e0, 123));
    f.run_to(123);
    CHECK_EQ(f.serve(), 0xec);
    CHECK_EQ(f.cpu().interrupts.load(), 1);
}

void reset_stops_it() {
    LapicFixture f;
    f.write(0x320, 0x30);
    f.write(0x380, 100);
    f.lapic().reset(true);
    CHECK_EQ(f.clock.next_deadline(), kNever);
    f.run_to(1000);
    CHECK(!f.lapic().pending());
}

}  // namespace

int main() {
    dividers();
    periodic();
    masked_and_changed();
    tsc_deadline();
    deadline_msr_in_x2apic_mode();
    reset_stops_it();
    return pvtest::finish("test_lapic_timer");
}
