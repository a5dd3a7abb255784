// The 8254 interval timer and the port 0x61 register that gates its channel 2.
//
// Channels count on virtual time at 1.193182 MHz. Channel 0's output is an interrupt line; only its
// rising edges are made with a Timer, everything a guest reads is computed from the clock.
//
// Lost ticks: when the host is late by several periods of channel 0, the missed edges are made up
// for at twice the programmed rate, at most kMaxBacklog of them. A guest that counts ticks keeps
// its time, one that was stopped for long is not flooded. Periods shorter than kMinPeriod lose
// edges.
//
// Offsets: 0..3 = ports 0x40..0x43, 4 = port 0x61.
#pragma once

#include <mutex>

#include "bus/clock.hpp"
#include "bus/device.hpp"

namespace polyvisor::irqchip {

class Pit final : public Device {
  public:
    static constexpr u64 kFrequency = 1'193'182;       ///< Hz
    static constexpr u32 kMaxBacklog = 8;              ///< edges
    static constexpr Nanoseconds kMinPeriod = 50'000;  ///< ns between edges of channel 0

    struct Channel {
        u64 start = 0;        ///< tick at which the present count is (or will be) loaded
        u64 held = 0;         ///< ticks counted when the gate stopped the counter
        u64 switch_at = 0;    ///< tick at which next_reload replaces reload; 0 for never
        u32 reload = 0;       ///< 1..0x10000 (10000 in BCD); 0: no count written yet
        u32 next_reload = 0;  ///< modes 2 and 3 finish their period first; 1 and 5 await a trigger
        u16 latch = 0;
        u8 mode = 0;    ///< 0..5
        u8 access = 3;  ///< 1: low byte, 2: high byte, 3: low then high
        u8 status_latch = 0;
        u8 write_low = 0;  ///< first byte of a two-byte write
        // Flags, 0 or 1.
        u8 bcd = 0;
        u8 gate = 1;
        u8 running = 0;  ///< a count is loaded or about to be (and was triggered, modes 1, 5)
        u8 latched = 0;
        u8 status_latched = 0;
        u8 write_high_next = 0;
        u8 read_high_next = 0;
        u8 programmed = 0;  ///< a control word was written since power-on
        u8 reserved[2] = {};
    };
    struct State {
        Channel channels[3];
        u64 next_edge = kNever;  ///< tick of channel 0's next rising edge
        u32 backlog = 0;         ///< edges of channel 0 still owed
        u8 port61 = 0;           ///< bits 0..3 as written
        u8 reserved[3] = {};
    };

    Pit(Clock& clock, IrqLine& irq0);

    std::string_view name() const override { return "pit"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;
    State state() const;

    /// Throws StateError for a state that this chip cannot have.
    static void validate(const State& state);
    /// The tick that virtual time `now` is in.
    static u64 tick_at(Nanoseconds now);
    /// The first nanosecond of a tick.
    static Nanoseconds time_of(u64 tick);
    /// The first tick after `now` at which the channel's output rises, or kNever.
    static u64 next_rise(const Channel& channel, u64 now);

  private:
    u64 tick() const { return tick_at(clock_.now()); }
    u8 read_counter(Channel& channel, u64 now);
    void write_counter(unsigned index, u8 value, u64 now);
    void write_control(u8 value, u64 now);
    void write_gate(Channel& channel, bool gate, u64 now);
    u8 read_port61(u64 now);
    void schedule(u64 now);
    void fire();

    Clock& clock_;
    IrqLine& irq0_;
    mutable std::mutex mutex_;  // before IrqRouter's
    State state_;
    Timer timer_;
};

}  // namespace polyvisor::irqchip
