// The conversions between our chips' States and KVM's structs, without a KVM: nothing is lost on
// the way but what chip_state.hpp says, what comes from KVM is valid, and a State that came from
// KVM goes there and back unchanged.
#include <cstring>

#include "base/error.hpp"
#include "check.hpp"
#include "irqchip/random_chips.hpp"
#include "irqchip/show_chips.hpp"
#include "kvm/chip_state.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;
using namespace pvtest;

namespace {

constexpr Nanoseconds kNow = 5'000'000'000'000;
constexpr int kRounds = 2000;

Lapic::Config config_of(u32 id) {
    Lapic::Config config;
    config.id = id;
    config.bsp = id == 0;
    config.physical_bits = 40;
    return config;
}

u32 reg(const kvm_lapic_state& page, u32 offset) {
    u32 value;
    std::memcpy(&value, page.regs + offset, sizeof value);
    return value;
}

// What KVM has no place for.
Lapic::State without_unkept(Lapic::State state) {
    state.esr_pending = 0;
    state.ext_int = 0;
    state.tsc_deadline = 0;  // an MSR
    if (in_tsc_deadline_mode(state)) state.timer_deadline = kNever;
    if (state.timer_deadline == kNever) state.initial_count = 0;
    return state;
}

void lapic_round_trips() {
    RandomChips chips(1);
    for (int round = 0; round < kRounds; ++round) {
        Lapic::Config config = config_of(chips.random().below(254));
        Lapic::State state = chips.lapic(config, kNow);
        Lapic::validate(state, config);
        Lapic::State back = from_kvm(to_kvm(state, kNow), state.apic_base, config, kNow);
        Lapic::validate(back, config);
        CHECK_EQ(difference(without_unkept(state), back), "");
        Lapic::State again = from_kvm(to_kvm(back, kNow), back.apic_base, config, kNow);
        CHECK_EQ(difference(back, again), "");
    }
}

void lapic_is_where_kvm_has_it() {
    Lapic::State state{};
    state.apic_base = Lapic::kDefaultBase | bit(11);
    state.id = 3;
    state.icr = 0x05000000'000cc456;
    state.ldr = 0x42000000;
    state.dfr = ~0u;
    state.svr = 0x1ff;
    state.isr[2] = 0x10;
    state.irr[7] = 0x80000000;
    state.lvt[Lapic::kTimer] = 1 << 17 | 0x31;
    state.lvt[Lapic::kError] = 0xfe;
    state.divide = 0xb;  // by 1
    state.initial_count = 1000;
    state.timer_start = kNow - 400;
    state.timer_deadline = kNow + 600;
    kvm_lapic_state page = to_kvm(state, kNow);
    CHECK_EQ(reg(page, 0x20), 3u << 24);
    CHECK_EQ(reg(page, 0xd0), 0x42000000u);
    CHECK_EQ(reg(page, 0x120), 0x10u);
    CHECK_EQ(reg(page, 0x270), 0x80000000u);
    CHECK_EQ(reg(page, 0x300), 0x000cc456u);
    CHECK_EQ(reg(page, 0x310), 0x05000000u);
    CHECK_EQ(reg(page, 0x320), 1u << 17 | 0x31u);
    CHECK_EQ(reg(page, 0x370), 0xfeu);
    CHECK_EQ(reg(page, 0x380), 1000u);
    CHECK_EQ(reg(page, 0x390), 600u);
    CHECK_EQ(reg(page, 0x3e0), 0xbu);
    state.apic_base |= bit(10);
    state.id = 0x123;
    page = to_kvm(state, kNow);
    CHECK_EQ(reg(page, 0x20), 0x123u);
    CHECK_EQ(reg(page, 0xd0), 0x12u << 16 | 8u);
}

// SDM 3A 11.5.4: a one-shot timer that has fired stays stopped; one that is due fires; a periodic
// one goes on. KVM does the first only if it is not told the count.
void lapic_timer_that_is_over() {
    Lapic::Config config = config_of(0);
    Lapic::State state{};
    state.apic_base = Lapic::kDefaultBase | bit(11);
    state.dfr = ~0u;
    state.lvt[Lapic::kTimer] = 0x31;
    state.initial_count = 500;
    state.divide = 0xb;
    state.timer_deadline = kNever;
    kvm_lapic_state page = to_kvm(state, kNow);
    CHECK_EQ(reg(page, 0x380), 0u);

    state.timer_start = kNow - 700;
    state.timer_deadline = kNow - 200;
    page = to_kvm(state, kNow);
    CHECK_EQ(reg(page, 0x380), 500u);
    CHECK_EQ(reg(page, 0x390), 0u);  // KVM: at once
    Lapic::State back = from_kvm(page, state.apic_base, config, kNow);
    CHECK_EQ(back.timer_deadline, kNow);  // not lost while its vector does not show
    state.irr[1] = 1u << 0x11;
    back = from_kvm(to_kvm(state, kNow), state.apic_base, config, kNow);
    CHECK_EQ(back.timer_deadline, kNever);
    state.irr[1] = 0;
    state.isr[1] = 1u << 0x11;
    back = from_kvm(to_kvm(state, kNow), state.apic_base, config, kNow);
    CHECK_EQ(back.timer_deadline, kNever);

    state.lvt[Lapic::kTimer] |= 1 << 17;  // periodic
    page = to_kvm(state, kNow);
    CHECK_EQ(reg(page, 0x390), 1u);
}

void lapic_garbage_becomes_valid() {
    RandomChips chips(2);
    for (int round = 0; round < kRounds; ++round) {
        kvm_lapic_state page;
        for (char& byte : page.regs) byte = static_cast<char>(chips.random().next() >> 20);
        Lapic::Config config = config_of(1);
        config.tsc_deadline = round & 1;
        u64 base = Lapic::kDefaultBase | bit(11) | (round & 2 ? bit(10) : 0);
        Lapic::validate(from_kvm(page, base, config, kNow), config);
        ++checks;
    }
}

void tsc_deadlines() {
    CHECK_EQ(deadline_to_guest(0, 77), 0u);
    CHECK_EQ(deadline_to_guest(1000, 77), 1077u);
    CHECK_EQ(deadline_to_guest(1000, u64(-1000)), 1u);  // 0 would disarm it
    CHECK_EQ(deadline_to_clock(0, 77), 0u);
    CHECK_EQ(deadline_to_clock(1077, 77), 1000u);
    CHECK_EQ(deadline_to_clock(1077, u64(-77)), 1154u);
    CHECK_EQ(deadline_to_clock(50, 77), 1u);  // before the clock's beginning: passed
}

void ioapic_round_trips() {
    RandomChips chips(3);
    for (int round = 0; round < kRounds; ++round) {
        Ioapic::State state = chips.ioapic();
        Ioapic::validate(state);
        kvm_ioapic_state chip = to_kvm(state);
        for (unsigned pin = 0; pin < Ioapic::kPins; ++pin) {
            u64 entry = state.redirection[pin];
            bool level = (entry & Ioapic::kLevel) && (entry >> 8 & 7) <= 1;
            // An edge that was there before must not be there again.
            CHECK_EQ(chip.irr >> pin & 1, level ? state.lines >> pin & 1 : 0u);
            CHECK_EQ(chip.redirtbl[pin].fields.vector, entry & 0xff);
            CHECK_EQ(chip.redirtbl[pin].fields.remote_irr, entry >> 14 & 1);
        }
        CHECK_EQ(difference(state, from_kvm(chip, state.lines)), "");
    }
}

void pic_round_trips() {
    RandomChips chips(4);
    for (int round = 0; round < kRounds; ++round) {
        Pic::State state = chips.pic();
        Pic::validate(state);
        kvm_pic_state pair[2];
        to_kvm(state, pair);
        CHECK_EQ(difference(state, from_kvm(pair)), "");
    }
    Pic::State state;
    state.chips[1].lowest = 2;
    state.chips[0].init_step = 3;
    state.chips[0].vector_base = 0x68;
    kvm_pic_state pair[2];
    to_kvm(state, pair);
    CHECK_EQ(pair[0].priority_add, 0u);  // input 7 is lowest, 0 highest
    CHECK_EQ(pair[1].priority_add, 3u);
    CHECK_EQ(pair[0].init_state, 2u);  // ICW2 was written
    CHECK_EQ(pair[0].irq_base, 0x68u);
    state.chips[1].level_mode = 1;
    CHECK_THROWS(to_kvm(state, pair), StateError);
    state.chips[1].level_mode = 0;
    state.chips[0].single = 1;
    CHECK_THROWS(to_kvm(state, pair), StateError);
}

// What chip_state.hpp says of KVM's 8254, as a function.
Pit::State as_kvm_has_it(Pit::State state, Nanoseconds now) {
    u64 tick = Pit::tick_at(now);
    for (unsigned which = 0; which < 3; ++which) {
        Pit::Channel& channel = state.channels[which];
        if (!channel.programmed) continue;
        bool triggered = channel.mode == 1 || channel.mode == 5;
        u32 count = channel.next_reload != 0 ? channel.next_reload : channel.reload;
        channel.switch_at = channel.held = channel.start = 0;
        channel.reload = channel.next_reload = channel.running = 0;
        if (triggered && which != 2) {
            channel.next_reload = count;
        } else {
            channel.reload = count;
            channel.running = 1;
            channel.start = tick;
        }
        if (!channel.latched) continue;
        if (channel.access != 3) channel.read_high_next = 0;
    }
    state.next_edge = Pit::next_rise(state.channels[0], tick);
    state.port61 &= 3;
    return state;
}

void pit_round_trips() {
    RandomChips chips(5);
    constexpr u64 kHostOffset = 123'456'789;
    for (int round = 0; round < kRounds; ++round) {
        Pit::State state = chips.pit(kNow);
        Pit::validate(state);
        Pit::State back = from_kvm(to_kvm(state), kNow, kHostOffset);
        Pit::validate(back);
        CHECK_EQ(difference(as_kvm_has_it(state, kNow), back), "");
        CHECK_EQ(difference(back, from_kvm(to_kvm(back), kNow, kHostOffset)), "");
    }
    // Channel 2 was loaded a millisecond ago by the host's clock.
    kvm_pit_state2 pit = to_kvm(Pit::State{});
    CHECK_EQ(pit.channels[2].mode, 0xffu);
    pit.channels[2].mode = 3;
    pit.channels[2].rw_mode = 3;
    pit.channels[2].count = 0x10000;
    pit.channels[2].gate = 1;
    pit.channels[2].count_load_time = static_cast<s64>(kNow + kHostOffset - 1'000'000);
    pit.flags = KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    Pit::State state = from_kvm(pit, kNow, kHostOffset);
    CHECK_EQ(state.channels[2].start, Pit::tick_at(kNow - 1'000'000));
    CHECK_EQ(state.port61, 3u);
    // Latched words: KVM reads their halves by a state of their own.
    pit.channels[2].count_latched = 2;
    pit.channels[2].latched_count = 0xabcd;
    state = from_kvm(pit, kNow, kHostOffset);
    CHECK_EQ(state.channels[2].latched, 1u);
    CHECK_EQ(state.channels[2].read_high_next, 1u);
    CHECK_EQ(to_kvm(state).channels[2].count_latched, 2u);
}

}  // namespace

int main() {
    lapic_round_trips();
    lapic_is_where_kvm_has_it();
    lapic_timer_that_is_over();
    lapic_garbage_becomes_valid();
    tsc_deadlines();
    ioapic_round_trips();
    pic_round_trips();
    pit_round_trips();
    return finish("test_chip_state");
}
