// The 8254 interval timer and the port 0x61 register that gates its channel 2.
//
// Channels count on virtual time at 1.193182 MHz. Channel 0's output is an interrupt line; only its
// rising edges are made with a Timer, everything a guest reads is computed from the clock.
//
// Lost ticks: when the host is late by several periods of channel 0, the missed edges are delivered
// one after the other, each when the guest has acknowledged the one before it (see
// set_acknowledged), at most kMaxBacklog of them; Linux counts jiffies from them only before it has
// a better clock.
//
// Offsets: 0..3 = ports 0x40..0x43, 4 = port 0x61.
#pragma once

#include <mutex>

#include "bus/clock.hpp"
#include "bus/device.hpp"

namespace polyvisor::irqchip {

class Pit final : public Device {
  public:
    static constexpr u64 kFrequency = 1'193'182;  ///< Hz
    static constexpr u32 kMaxBacklog = 8;

    struct Channel {
        u64 start = 0;         ///< virtual ns at which the present count was loaded
        u32 reload = 0x10000;  ///< count, 1..0x10000 (0 is written for 65536)
        u32 paused_count = 0;  ///< what the counter shows while the gate holds it
        u16 latch = 0;
        u8 mode = 0;    ///< 0..5
        u8 access = 3;  ///< 1: low byte, 2: high byte, 3: low then high
        u8 status_latch = 0;
        u8 write_low = 0;  ///< first byte of a two-byte write
        bool bcd = false;
        bool gate = true;
        bool null_count = true;  ///< written but not yet loaded: no counting
        bool running = false;    ///< a count was loaded (and triggered, modes 1 and 5)
        bool latched = false;
        bool status_latched = false;
        bool write_high_next = false;
        bool read_high_next = false;
    };
    struct State {
        Channel channels[3];
        bool speaker_data = false;  ///< port 0x61 bit 1
        u32 backlog = 0;            ///< edges of channel 0 still owed
        u64 next_edge = 0;          ///< virtual ns of channel 0's next rising edge, kNever for none
    };

    Pit(Clock& clock, IrqLine& irq0);

    std::string_view name() const override { return "pit"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;
    State state() const;

  private:
    u64 ticks(Nanoseconds from, Nanoseconds to) const;
    u32 count(const Channel& channel, Nanoseconds now) const;
    bool output(const Channel& channel, Nanoseconds now) const;
    u8 read_counter(unsigned index);
    void write_counter(unsigned index, u8 value);
    void write_control(u8 value);
    void load(unsigned index, u32 value);
    void set_gate(unsigned index, bool gate);
    void latch_count(unsigned index);
    void latch_status(unsigned index);
    u8 read_speaker();
    void write_speaker(u8 value);
    void schedule(Nanoseconds now);
    void fire();

    Clock& clock_;
    IrqLine& irq0_;
    mutable std::mutex mutex_;  // before IrqRouter's
    State state_;
    Timer timer_;
};

}  // namespace polyvisor::irqchip
