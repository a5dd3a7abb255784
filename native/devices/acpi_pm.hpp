// ACPI fixed hardware (ACPI 6.4, 4.8): PM1 event and control blocks, PM timer, GPE0, and the two
// reset registers a PC has besides (0xcf9 and port 0x92).
//
// There is no SMI: ACPI is always on (SCI_EN reads 1), FADT.SMI_CMD is 0.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>

#include "bus/clock.hpp"
#include "bus/device.hpp"

namespace polyvisor::devices {

/// One block of ports: PM1a_EVT_BLK at offset 0 (4), PM1a_CNT_BLK at 4 (2), PM_TMR_BLK at 8 (4),
/// GPE0_BLK at 12 (4: two of status, two of enable). 16 ports, at 0x600 by convention here.
class AcpiPm final : public Device {
  public:
    static constexpr u64 kPorts = 16;
    static constexpr u16 kEventOffset = 0, kControlOffset = 4, kTimerOffset = 8, kGpeOffset = 12;
    static constexpr u64 kTimerFrequency = 3'579'545;  ///< Hz
    static constexpr u8 kSleepTypeS5 = 5;              ///< SLP_TYP of \_S5

    struct State {
        u16 pm1_status = 0;
        u16 pm1_enable = 0;
        u16 pm1_control = 0;
        u16 gpe_status = 0;
        u16 gpe_enable = 0;
        u16 reserved = 0;
    };

    /// `power_off` is called on the vCPU's thread when the guest enters S5. `timer_32bit` must
    /// agree with FADT.TMR_VAL_EXT.
    AcpiPm(Clock& clock, IrqLine& sci, std::function<void()> power_off, bool timer_32bit = true);

    std::string_view name() const override { return "acpi-pm"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;

    /// Presses the power button: PWRBTN_STS, and an SCI when enabled.
    void press_power_button();
    /// Raises general-purpose event 0..15.
    void raise_gpe(unsigned number);

  private:
    u8 read_byte(u64 offset, u32 timer) const;
    bool write_byte(u64 offset, u8 value);  // true: the guest enters S5
    void update_timer_status(Nanoseconds now);
    void schedule(Nanoseconds now);
    void update_sci();
    u64 ticks(Nanoseconds now) const;

    Clock& clock_;
    IrqLine& sci_;
    std::function<void()> power_off_;
    unsigned timer_bits_;
    mutable std::mutex mutex_;  // before IrqRouter's
    State state_;
    u64 overflows_seen_ = 0;
    bool sci_level_ = false;
    Timer timer_;  // the timer's carry (TMR_STS), only while TMR_EN is set
};

/// The reset control register of PC chipsets (I/O port 0xcf9, one byte): bit 1 selects a hard
/// reset, a 0 to 1 change of bit 2 performs it. Give it to pci::ConfigPorts, inside whose range it
/// lies.
class ResetControl final : public Device {
  public:
    explicit ResetControl(std::function<void()> reset) : reset_(std::move(reset)) {}
    std::string_view name() const override { return "reset-control"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override { value_ = 0; }
    std::vector<u8> save() const override { return {value_}; }
    void restore(std::span<const u8> state) override;

  private:
    std::function<void()> reset_;
    std::atomic<u8> value_{0};
};

/// System control port A (0x92): bit 0 resets on a 0 to 1 change, bit 1 is the A20 gate.
class SystemControlA final : public Device {
  public:
    SystemControlA(std::function<void(bool on)> a20, std::function<void()> reset)
        : a20_(std::move(a20)), reset_(std::move(reset)) {}
    std::string_view name() const override { return "port92"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override { return {value_}; }
    void restore(std::span<const u8> state) override;

  private:
    std::function<void(bool)> a20_;
    std::function<void()> reset_;
    std::atomic<u8> value_{2};  // A20 is open: nothing that boots here wants it shut
};

}  // namespace polyvisor::devices
