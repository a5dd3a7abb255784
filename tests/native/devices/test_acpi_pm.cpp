// ACPI fixed hardware and the reset registers.
#include "devices/acpi_pm.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "ports.hpp"

using namespace polyvisor;
using namespace polyvisor::devices;

namespace {

constexpr u64 kStatus = 0, kEnable = 2, kControl = 4, kTimer = 8, kGpeStatus = 12, kGpeEnable = 14;

struct Fixture {
    explicit Fixture(bool wide = true)
        : clock(Clock::Mode::kDeterministic), pm(clock, sci, [this] { ++offs; }, wide) {}
    void run_to(Nanoseconds time) {
        clock.advance_to(time);
        clock.run_expired();
    }
    Clock clock;
    Line sci;
    int offs = 0;
    AcpiPm pm;
};

void timer() {
    Fixture f;
    CHECK_EQ(in<u32>(f.pm, kTimer), 0u);
    f.run_to(1'000'000'000);
    CHECK_EQ(in<u32>(f.pm, kTimer), 3'579'545u);
    CHECK_EQ(in<u16>(f.pm, kTimer), 3'579'545u & 0xffff);
    out<u32>(f.pm, kTimer, 0);  // read-only
    CHECK_EQ(in<u32>(f.pm, kTimer), 3'579'545u);
    Fixture narrow(false);
    narrow.run_to(10'000'000'000);
    CHECK_EQ(in<u32>(narrow.pm, kTimer), 35'795'450u & 0xffffff);
}

// TMR_STS at each change of the top bit, an SCI when enabled.
void timer_overflow() {
    Fixture f(false);
    constexpr u64 kHalf = u64{1} << 23;
    auto time = [](u64 ticks) { return ticks * 1'000'000'000 / AcpiPm::kTimerFrequency + 1; };
    out<u16>(f.pm, kEnable, 1);
    f.run_to(time(kHalf) - 1000);
    CHECK(!f.sci.level);
    f.run_to(time(kHalf));
    CHECK(f.sci.level);
    CHECK_EQ(in<u16>(f.pm, kStatus), 1);
    out<u16>(f.pm, kStatus, 1);
    CHECK(!f.sci.level);
    f.run_to(time(2 * kHalf));
    CHECK(f.sci.level);
    out<u16>(f.pm, kEnable, 0);
    CHECK(!f.sci.level);
    out<u16>(f.pm, kStatus, 1);
    f.run_to(time(3 * kHalf));
    CHECK_EQ(in<u16>(f.pm, kStatus), 1);  // the status comes without the interrupt too
    CHECK(!f.sci.level);
}

void power_button_and_gpe() {
    Fixture f;
    CHECK_EQ(in<u16>(f.pm, kControl), 1);  // SCI_EN: always ACPI
    f.pm.press_power_button();
    CHECK(!f.sci.level);
    CHECK_EQ(in<u16>(f.pm, kStatus), 0x100);
    out<u16>(f.pm, kEnable, 0xffff);
    CHECK_EQ(in<u16>(f.pm, kEnable), 0x0721);
    CHECK(f.sci.level);
    out(f.pm, kStatus + 1, u8{1});  // byte access
    CHECK(!f.sci.level);
    f.pm.raise_gpe(9);
    f.pm.raise_gpe(16);
    CHECK(!f.sci.level);
    out<u16>(f.pm, kGpeEnable, 0x0200);
    CHECK(f.sci.level);
    CHECK_EQ(in<u16>(f.pm, kGpeStatus), 0x0200);
    out<u16>(f.pm, kGpeStatus, 0x0200);
    CHECK(!f.sci.level);
    f.pm.press_power_button();
    CHECK(f.sci.level);
    f.pm.reset();
    CHECK(!f.sci.level);
}

void sleep() {
    Fixture f;
    out<u16>(f.pm, kControl, 0x2000);  // SLP_EN with type 0
    CHECK_EQ(f.offs, 0);
    out<u16>(f.pm, kControl, 5 << 10);  // the type alone
    CHECK_EQ(f.offs, 0);
    CHECK_EQ(in<u16>(f.pm, kControl), 5 << 10 | 1);
    out<u16>(f.pm, kControl, 5 << 10 | 0x2000);
    CHECK_EQ(f.offs, 1);
    CHECK_EQ(in<u16>(f.pm, kControl) & 0x2000, 0);  // write-only
    out(f.pm, kControl + 1, u8{0x34});
    CHECK_EQ(f.offs, 2);
}

void snapshot() {
    Fixture f;
    out<u16>(f.pm, kEnable, 0x100);
    f.pm.press_power_button();
    auto saved = f.pm.save();
    Fixture g;
    g.pm.restore(saved);
    CHECK(g.sci.level);
    CHECK(g.pm.save() == saved);
    saved[2] = 0x02;
    CHECK_THROWS(g.pm.restore(saved), StateError);
    CHECK_THROWS(g.pm.restore({}), StateError);
}

void reset_registers() {
    int resets = 0;
    ResetControl control([&] { ++resets; });
    out(control, 0, u8{0x02});
    CHECK_EQ(resets, 0);
    CHECK_EQ(in(control, 0), 0x02);
    out(control, 0, u8{0x06});
    CHECK_EQ(resets, 1);
    out(control, 0, u8{0x06});  // no 0 to 1 change
    CHECK_EQ(resets, 1);
    control.reset();
    out(control, 0, u8{0x0e});
    CHECK_EQ(resets, 2);
    CHECK_THROWS(control.restore({}), StateError);

    int a20 = -1;
    SystemControlA port([&](bool on) { a20 = on; }, [&] { ++resets; });
    CHECK_EQ(in(port, 0), 0x02);
    out(port, 0, u8{0x00});
    CHECK_EQ(a20, 0);
    a20 = -1;
    out(port, 0, u8{0x02});
    CHECK_EQ(a20, 1);
    a20 = -1;
    out(port, 0, u8{0x02});
    CHECK_EQ(a20, -1);
    out(port, 0, u8{0x03});
    CHECK_EQ(resets, 3);
    CHECK_EQ(in(port, 0), 0x02);
    out(port, 0, u8{0x00});
    auto saved = port.save();
    port.reset();
    CHECK_EQ(a20, 1);
    port.restore(saved);
    CHECK_EQ(a20, 0);
}

}  // namespace

int main() {
    timer();
    timer_overflow();
    power_button_and_gpe();
    sleep();
    snapshot();
    reset_registers();
    return pvtest::finish("test_acpi_pm");
}
