#include "kvm/chip_state.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::kvm {

using irqchip::Ioapic;
using irqchip::Lapic;
using irqchip::Pic;
using irqchip::Pit;

// --- Local APIC ----------------------------------------------------------------------------------

namespace {

// Offsets in the register page (SDM 3A, table 11-1).
constexpr u32 kId = 0x20, kTpr = 0x80, kLdr = 0xd0, kDfr = 0xe0, kSvr = 0xf0, kIsr = 0x100,
              kTmr = 0x180, kIrr = 0x200, kEsr = 0x280, kIcr = 0x300, kIcrHigh = 0x310,
              kLvt = 0x320, kInitialCount = 0x380, kCurrentCount = 0x390, kDivide = 0x3e0;
constexpr u32 kOneShot = 0, kPeriodic = 1, kTscDeadline = 2;  // timer modes
constexpr u32 kMasked = 1u << 16, kRemoteIrr = 1u << 14;
constexpr u64 kX2apicMode = bit(10);

u32 get(const kvm_lapic_state& page, u32 offset) {
    u32 value;
    std::memcpy(&value, page.regs + offset, sizeof value);
    return value;
}

void put(kvm_lapic_state& page, u32 offset, u32 value) {
    std::memcpy(page.regs + offset, &value, sizeof value);
}

u32 timer_mode(const Lapic::State& state) {
    return state.lvt[Lapic::kTimer] >> 17 & 3;
}

u64 divider(const Lapic::State& state) {
    u32 code = (state.divide & 3) | (state.divide >> 1 & 4);
    return code == 7 ? 1 : u64{2} << code;
}

bool test_bit(const u32 (&bits)[8], u32 n) {
    return bits[n / 32] >> (n % 32) & 1;
}

// The interrupt of an expired one-shot timer may be on its way between KVM's timer and IRR, where
// nothing shows it.
bool expiry_shows(const Lapic::State& state) {
    u32 lvt = state.lvt[Lapic::kTimer], vector = lvt & 0xff;
    return (lvt & kMasked) || test_bit(state.irr, vector) || test_bit(state.isr, vector);
}

void read_timer(const kvm_lapic_state& page, Lapic::State& state, Nanoseconds now) {
    state.timer_deadline = kNever;
    state.initial_count = get(page, kInitialCount);
    u32 mode = timer_mode(state);
    if (mode > kPeriodic) state.initial_count = 0;
    if (state.initial_count == 0) return;
    u64 left = std::min(get(page, kCurrentCount), state.initial_count);
    if (mode == kOneShot && left == 0 && expiry_shows(state)) return;
    state.timer_deadline = now + left * divider(state);
    state.timer_start = state.timer_deadline - state.initial_count * divider(state);
}

void write_timer(const Lapic::State& state, kvm_lapic_state& page, Nanoseconds now) {
    u32 mode = timer_mode(state);
    if (mode > kPeriodic || state.timer_deadline == kNever) return;
    u64 left = 0;
    if (state.timer_deadline > now) {
        left = (state.timer_deadline - now + divider(state) - 1) / divider(state);
    } else if (mode == kPeriodic) {
        left = 1;  // 0 would be a whole period
    }
    put(page, kInitialCount, state.initial_count);
    put(page, kCurrentCount, static_cast<u32>(std::min<u64>(left, state.initial_count)));
}

}  // namespace

Lapic::State from_kvm(const kvm_lapic_state& page, u64 apic_base, const Lapic::Config& config,
                      Nanoseconds now) {
    Lapic::State state{};
    bool x2apic = apic_base & kX2apicMode;
    state.apic_base = apic_base;
    state.id = config.id;
    state.icr = static_cast<u64>(get(page, kIcrHigh)) << 32 | get(page, kIcr);
    state.tpr = get(page, kTpr) & 0xff;
    state.ldr = x2apic ? 0 : get(page, kLdr) & 0xff000000;
    state.dfr = get(page, kDfr) | 0x0fffffff;
    state.svr = get(page, kSvr) & 0x13ff;
    for (u32 n = 0; n < 8; ++n) {
        state.isr[n] = get(page, kIsr + 16 * n);
        state.tmr[n] = get(page, kTmr + 16 * n);
        state.irr[n] = get(page, kIrr + 16 * n);
    }
    state.isr[0] &= ~0xffffu;
    state.irr[0] &= ~0xffffu;
    state.esr = get(page, kEsr);
    for (u32 n = 0; n < Lapic::kLvtCount; ++n) {
        state.lvt[n] = get(page, kLvt + 16 * n) & (Lapic::lvt_writable(n, config) | kRemoteIrr);
    }
    state.divide = get(page, kDivide) & 0xb;
    read_timer(page, state, now);
    return state;
}

kvm_lapic_state to_kvm(const Lapic::State& state, Nanoseconds now) {
    kvm_lapic_state page{};
    bool x2apic = state.apic_base & kX2apicMode;
    put(page, kId, x2apic ? state.id : state.id << 24);
    put(page, kTpr, state.tpr);
    put(page, kLdr, x2apic ? (state.id >> 4) << 16 | 1u << (state.id & 15) : state.ldr);
    put(page, kDfr, state.dfr);
    put(page, kSvr, state.svr);
    for (u32 n = 0; n < 8; ++n) {
        put(page, kIsr + 16 * n, state.isr[n]);
        put(page, kTmr + 16 * n, state.tmr[n]);
        put(page, kIrr + 16 * n, state.irr[n]);
    }
    put(page, kEsr, state.esr);
    put(page, kIcr, static_cast<u32>(state.icr));
    put(page, kIcrHigh, static_cast<u32>(state.icr >> 32));
    for (u32 n = 0; n < Lapic::kLvtCount; ++n) put(page, kLvt + 16 * n, state.lvt[n]);
    put(page, kDivide, state.divide);
    write_timer(state, page, now);
    return page;
}

bool in_tsc_deadline_mode(const Lapic::State& state) {
    return timer_mode(state) == kTscDeadline;
}

u64 deadline_to_guest(u64 clock_deadline, u64 offset) {
    if (clock_deadline == 0) return 0;
    u64 shifted = clock_deadline + offset;
    return shifted != 0 ? shifted : 1;
}

u64 deadline_to_clock(u64 guest_deadline, u64 offset) {
    if (guest_deadline == 0) return 0;
    u64 shifted = guest_deadline - offset;
    // One that lies before the clock's own beginning has passed.
    return static_cast<s64>(shifted) <= 0 && static_cast<s64>(guest_deadline) > 0 ? 1 : shifted;
}

// --- IOAPIC --------------------------------------------------------------------------------------

namespace {

constexpr u64 kIoapicBase = 0xfec0'0000;
constexpr u64 kIoapicBits = 0xff000000'0001ffff;

bool is_level(u64 entry) {
    return (entry & Ioapic::kLevel) && (entry >> 8 & 7) <= 1;
}

}  // namespace

Ioapic::State from_kvm(const kvm_ioapic_state& chip, u32 lines) {
    Ioapic::State state{};
    for (unsigned pin = 0; pin < Ioapic::kPins; ++pin) {
        state.redirection[pin] = chip.redirtbl[pin].bits & kIoapicBits;
    }
    state.lines = lines;
    state.index = static_cast<u8>(chip.ioregsel);
    state.id = chip.id & 15;
    return state;
}

kvm_ioapic_state to_kvm(const Ioapic::State& state) {
    kvm_ioapic_state chip{};
    chip.base_address = kIoapicBase;
    chip.ioregsel = state.index;
    chip.id = state.id;
    for (unsigned pin = 0; pin < Ioapic::kPins; ++pin) {
        u64 entry = state.redirection[pin];
        chip.redirtbl[pin].bits = entry;
        if (is_level(entry)) chip.irr |= state.lines & 1u << pin;
    }
    return chip;
}

// --- 8259 ----------------------------------------------------------------------------------------

Pic::State from_kvm(const kvm_pic_state (&chips)[2]) {
    Pic::State state;
    for (unsigned which = 0; which < 2; ++which) {
        const kvm_pic_state& from = chips[which];
        Pic::Chip& chip = state.chips[which];
        chip.irr = from.irr;
        chip.imr = from.imr;
        chip.isr = from.isr;
        chip.lines = from.last_irr;
        chip.elcr = from.elcr & (which == 0 ? 0xf8 : 0xde);
        chip.vector_base = from.irq_base & 0xf8;
        chip.lowest = static_cast<u8>((from.priority_add + 7) & 7);
        chip.init_step =
            static_cast<u8>(from.init_state == 0 ? 0 : std::min(from.init_state + 1, 4));
        chip.icw4_needed = from.init4 != 0;
        chip.auto_eoi = from.auto_eoi != 0;
        chip.rotate_on_auto_eoi = from.rotate_on_auto_eoi != 0;
        chip.fully_nested = from.special_fully_nested_mode != 0;
        chip.special_mask = from.special_mask != 0;
        chip.poll = from.poll != 0;
        chip.read_isr = from.read_reg_select != 0;
    }
    Pic::settle(state);
    return state;
}

void to_kvm(const Pic::State& state, kvm_pic_state (&chips)[2]) {
    for (const Pic::Chip& chip : state.chips) {
        if (chip.level_mode == 0 && chip.single == 0) continue;
        const char* field = chip.level_mode != 0 ? "level_mode" : "single";
        throw StateError(field, std::string("KVM's 8259s cannot take over a state with '") + field +
                                    "'; give the machine irqchip split or user");
    }
    for (unsigned which = 0; which < 2; ++which) {
        const Pic::Chip& chip = state.chips[which];
        kvm_pic_state& to = chips[which];
        to = {};
        to.irr = chip.irr;
        to.imr = chip.imr;
        to.isr = chip.isr;
        to.last_irr = chip.lines;
        to.elcr = chip.elcr;
        to.elcr_mask = which == 0 ? 0xf8 : 0xde;
        to.irq_base = chip.vector_base;
        to.priority_add = (chip.lowest + 1) & 7;
        to.init_state = static_cast<u8>(chip.init_step == 0 ? 0 : chip.init_step - 1);
        to.init4 = chip.icw4_needed;
        to.auto_eoi = chip.auto_eoi;
        to.rotate_on_auto_eoi = chip.rotate_on_auto_eoi;
        to.special_fully_nested_mode = chip.fully_nested;
        to.special_mask = chip.special_mask;
        to.poll = chip.poll;
        to.read_reg_select = chip.read_isr;
    }
}

// --- 8254 ----------------------------------------------------------------------------------------

namespace {

constexpr u8 kUnprogrammed = 0xff;  // KVM's mode of a channel without a control word
constexpr u8 kLow = 1, kHigh = 2, kWordLow = 3, kWordHigh = 4;  // access states

bool is_triggered(u8 mode) {
    return mode == 1 || mode == 5;
}

Pit::Channel from_kvm(const kvm_pit_channel_state& from, unsigned which, u64 now, u64 loaded) {
    Pit::Channel channel;
    channel.gate = from.gate != 0;
    channel.latch = from.latched_count;
    channel.status_latch = from.status;
    channel.status_latched = from.status_latched != 0;
    channel.write_low = from.write_latch;
    if (from.mode == kUnprogrammed) return channel;

    channel.programmed = 1;
    channel.mode = std::min<u8>(from.mode, 5);
    channel.bcd = from.bcd != 0;
    if (from.rw_mode >= 1 && from.rw_mode <= 3) channel.access = from.rw_mode;
    channel.latched = from.count_latched != 0;
    channel.read_high_next =
        channel.access == 3 &&
        (channel.latched ? from.count_latched == kHigh : from.read_state == kWordHigh);
    channel.write_high_next = channel.access == 3 && from.write_state == kWordHigh;
    u32 count = std::clamp<u32>(from.count, 1, channel.bcd ? 10'000 : 0x10000);
    if (is_triggered(channel.mode) && which != 2) {  // no gate that could trigger it
        channel.next_reload = count;
        return channel;
    }
    channel.reload = count;
    channel.running = 1;
    channel.start = loaded;
    if (!channel.gate && !is_triggered(channel.mode)) channel.held = now - std::min(now, loaded);
    return channel;
}

}  // namespace

Pit::State from_kvm(const kvm_pit_state2& pit, Nanoseconds now, u64 host_offset) {
    Pit::State state;
    u64 tick = Pit::tick_at(now);
    for (unsigned which = 0; which < 3; ++which) {
        const kvm_pit_channel_state& from = pit.channels[which];
        u64 loaded = static_cast<u64>(from.count_load_time) - host_offset;
        bool known = which != 0 && loaded <= now;
        state.channels[which] = from_kvm(from, which, tick, known ? Pit::tick_at(loaded) : tick);
    }
    state.next_edge = Pit::next_rise(state.channels[0], tick);
    state.port61 = static_cast<u8>(state.channels[2].gate |
                                   (pit.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON ? 2 : 0));
    return state;
}

kvm_pit_state2 to_kvm(const Pit::State& state) {
    kvm_pit_state2 pit{};
    for (unsigned which = 0; which < 3; ++which) {
        const Pit::Channel& channel = state.channels[which];
        kvm_pit_channel_state& to = pit.channels[which];
        to.count = channel.next_reload != 0 ? channel.next_reload : channel.reload;
        to.latched_count = channel.latch;
        bool word = channel.access == 3;
        if (channel.latched) {
            to.count_latched = !word ? channel.access : channel.read_high_next ? kHigh : kWordLow;
        }
        to.status_latched = channel.status_latched;
        to.status = channel.status_latch;
        // A latched high byte ends the word, so the next read is of a low one.
        bool high = channel.read_high_next && !channel.latched;
        to.read_state = !word ? channel.access : high ? kWordHigh : kWordLow;
        to.write_state = !word ? channel.access : channel.write_high_next ? kWordHigh : kWordLow;
        to.write_latch = channel.write_low;
        to.rw_mode = channel.access;
        to.mode = channel.programmed ? channel.mode : kUnprogrammed;
        to.bcd = channel.bcd;
        to.gate = channel.gate;
    }
    if (state.port61 & 2) pit.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    return pit;
}

}  // namespace polyvisor::kvm
