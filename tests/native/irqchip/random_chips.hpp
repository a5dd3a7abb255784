// Random States of the interrupt chips, each one that its chip can have: for round trips.
#pragma once

#include "irqchip/ioapic.hpp"
#include "irqchip/lapic.hpp"
#include "irqchip/pic.hpp"
#include "irqchip/pit.hpp"
#include "random.hpp"

namespace pvtest {

using namespace polyvisor;
using irqchip::Ioapic;
using irqchip::Lapic;
using irqchip::Pic;
using irqchip::Pit;

class RandomChips {
  public:
    explicit RandomChips(u64 seed) : random_(seed) {}

    /// `now`: virtual time, which the timer's times lie around.
    Lapic::State lapic(const Lapic::Config& config, Nanoseconds now) {
        Lapic::State state{};
        bool x2apic = config.x2apic && flag(), enabled = x2apic || !random_.one_in(4);
        state.apic_base = Lapic::kDefaultBase | (config.bsp ? bit(8) : 0) |
                          (enabled ? bit(11) : 0) | (x2apic ? bit(10) : 0);
        state.id = config.id;
        state.icr = (x2apic ? word() : word() & 0xff000000) << 32 | (word() & 0xccfff);
        state.tpr = word() & 0xff;
        if (!x2apic) state.ldr = word() & 0xff000000;
        state.dfr = flag() ? ~0u : 0x0fffffff;
        state.svr = word() & 0x13ff;
        for (unsigned n = 0; n < 8; ++n) {
            state.isr[n] = sparse();
            state.tmr[n] = sparse();
            state.irr[n] = sparse();
        }
        state.isr[0] &= 0xffff0000;
        state.irr[0] &= 0xffff0000;
        state.esr = word() & 0xff;
        state.esr_pending = word() & 0xff;
        for (unsigned n = 0; n < Lapic::kLvtCount; ++n) {
            u32 legal = Lapic::lvt_writable(n, config);
            if (n == Lapic::kLint0 || n == Lapic::kLint1) legal |= 1u << 14;
            state.lvt[n] = word() & legal;
        }
        state.divide = word() & 0xb;
        state.ext_int = flag();
        timer(state, config, now);
        return state;
    }

    Ioapic::State ioapic() {
        Ioapic::State state{};
        state.lines = word() & (bit(Ioapic::kPins) - 1);
        state.index = byte();
        state.id = byte() & 15;
        for (unsigned pin = 0; pin < Ioapic::kPins; ++pin) {
            u64& entry = state.redirection[pin];
            entry = random_.next() & 0xff000000'0001afff;
            bool level = (entry & Ioapic::kLevel) && (entry >> 8 & 7) <= 1;
            // One that is due is on its way: the chip does not stay in such a state.
            bool due = !(entry & Ioapic::kMask) && (state.lines >> pin & 1);
            if (level && (due || flag())) entry |= Ioapic::kRemoteIrr;
        }
        return state;
    }

    Pic::State pic() {
        Pic::State state;
        for (unsigned which = 0; which < 2; ++which) {
            Pic::Chip& chip = state.chips[which];
            chip.irr = byte();
            chip.imr = byte();
            chip.isr = byte() & byte();
            chip.lines = byte() & (which == 0 ? 0xfb : 0xff);
            chip.elcr = byte() & (which == 0 ? 0xf8 : 0xde);
            chip.vector_base = byte() & 0xf8;
            chip.lowest = byte() & 7;
            chip.init_step = random_.pick<u8>({0, 0, 0, 2, 3, 4});
            chip.icw4_needed = flag();
            chip.auto_eoi = flag();
            chip.rotate_on_auto_eoi = flag();
            chip.fully_nested = flag();
            chip.special_mask = flag();
            chip.poll = flag();
            chip.read_isr = flag();
        }
        Pic::settle(state);
        return state;
    }

    Pit::State pit(Nanoseconds now) {
        Pit::State state;
        u64 tick = Pit::tick_at(now);
        for (unsigned which = 0; which < 3; ++which) channel(state.channels[which], which, tick);
        state.port61 = (byte() & 0xe) | state.channels[2].gate;
        state.next_edge = Pit::next_rise(state.channels[0], tick);
        return state;
    }

    Random& random() { return random_; }

  private:
    bool flag() { return random_.one_in(2); }
    u64 word() { return static_cast<u32>(random_.next() >> 16); }
    u32 sparse() { return static_cast<u32>(word() & word() & word()); }
    u8 byte() { return static_cast<u8>(random_.next() >> 16); }

    void timer(Lapic::State& state, const Lapic::Config& config, Nanoseconds now) {
        state.timer_deadline = kNever;
        u32 mode = state.lvt[Lapic::kTimer] >> 17 & 3;
        if (mode == 2 && config.tsc_deadline && flag()) {
            state.tsc_deadline = now + 1 + word();
            state.timer_deadline = state.tsc_deadline;  // at 1 GHz
        } else if (mode < 2 && flag()) {
            u64 code = (state.divide & 3) | (state.divide >> 1 & 4);
            u64 divider = code == 7 ? 1 : u64{2} << code;
            state.initial_count = static_cast<u32>(word() | 1);
            u64 left = 1 + random_.next() % state.initial_count;
            state.timer_deadline = now + left * divider;
            state.timer_start = state.timer_deadline - state.initial_count * divider;
        } else if (mode < 2 && flag()) {
            state.initial_count = static_cast<u32>(word());  // it has expired
        }
    }

    void channel(Pit::Channel& channel, unsigned which, u64 tick) {
        channel.gate = which != 2 || flag();
        if (random_.one_in(4)) return;  // as after power-on
        channel.programmed = 1;
        channel.mode = static_cast<u8>(random_.below(6));
        channel.access = static_cast<u8>(1 + random_.below(3));
        channel.bcd = random_.one_in(4);
        channel.latch = static_cast<u16>(word());
        channel.latched = flag();
        channel.status_latch = byte();
        channel.status_latched = flag();
        if (channel.access == 3) {
            channel.write_low = byte();
            channel.write_high_next = flag();
            channel.read_high_next = flag();
        }
        u32 limit = channel.bcd ? 10'000 : 0x10000;
        bool triggered = channel.mode == 1 || channel.mode == 5;
        if (triggered || random_.one_in(4)) channel.next_reload = 1 + random_.below(limit);
        if (triggered && (which != 2 || flag())) return;
        channel.reload = 1 + random_.below(limit);
        channel.running = 1;
        channel.start = tick - random_.below(0x8000);
        if (channel.next_reload != 0 && !triggered) {
            bool periodic = channel.mode == 2 || channel.mode == 3;
            if (!periodic) channel.next_reload = 0;
            if (periodic) channel.switch_at = tick + 1 + random_.below(channel.reload);
        }
        if (!channel.gate && !triggered) channel.held = random_.below(0x8000);
    }

    Random random_;
};

}  // namespace pvtest
