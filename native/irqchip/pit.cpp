// 8254. Everything is a function of the tick number: a channel remembers at which tick its count
// was loaded, and its counter and output at any later tick follow (data sheet, "Mode Definitions").
#include "irqchip/pit.hpp"

#include <algorithm>

#include "bus/pod_state.hpp"

namespace polyvisor::irqchip {

namespace {

using Channel = Pit::Channel;

constexpr u64 kBillion = 1'000'000'000;

bool is_periodic(const Channel& channel) {
    return channel.mode == 2 || channel.mode == 3;
}
bool is_triggered(const Channel& channel) {
    return channel.mode == 1 || channel.mode == 5;
}
u32 modulus(const Channel& channel) {
    return channel.bcd ? 10'000 : 0x10000;
}

// Ticks since the count was loaded. Only when counting() or held by the gate.
u64 elapsed(const Channel& channel, u64 now) {
    if (!channel.gate && !is_triggered(channel)) return channel.held;
    return now > channel.start ? now - channel.start : 0;
}

bool loaded(const Channel& channel, u64 now) {
    return channel.running && now >= channel.start;
}

// Takes over a count that was to wait for the end of the period.
void settle(Channel& channel, u64 now) {
    if (channel.switch_at == 0 || now < channel.switch_at) return;
    channel.start = channel.switch_at;
    channel.reload = channel.next_reload;
    channel.switch_at = 0;
    channel.next_reload = 0;
}

bool null_count(const Channel& channel, u64 now) {
    return !loaded(channel, now) || channel.next_reload != 0;
}

u32 counter(const Channel& channel, u64 now) {
    u32 n = channel.reload;
    if (!loaded(channel, now)) return n % modulus(channel);
    u64 e = elapsed(channel, now);
    if (channel.mode == 2) return static_cast<u32>(n - e % n) % modulus(channel);
    if (channel.mode == 3) {  // counts by two, in two halves
        u64 phase = e % n, high = (n + 1) / 2;
        u64 in_half = phase < high ? phase : phase - high;
        return static_cast<u32>((n & ~1u) - 2 * in_half) % modulus(channel);
    }
    u64 m = modulus(channel);
    return static_cast<u32>((n % m + m - e % m) % m);
}

bool output(const Channel& channel, u64 now) {
    if (!loaded(channel, now)) return channel.mode != 0;
    u64 e = elapsed(channel, now);
    u32 n = channel.reload;
    switch (channel.mode) {
        case 0:
        case 1:
            return e >= n;
        case 2:
            return !channel.gate || e % n != n - 1;
        case 3:
            return !channel.gate || e % n < (n + 1) / 2;
        default:
            return e != n;  // a strobe of one tick
    }
}

u16 to_bcd(u32 value) {
    return static_cast<u16>(value / 1000 % 10 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 |
                            value % 10);
}

u32 from_bcd(u32 value) {
    return (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15);
}

u16 shown(const Channel& channel, u64 now) {
    u32 count = counter(channel, now);
    return channel.bcd ? to_bcd(count) : static_cast<u16>(count);
}

u8 status(const Channel& channel, u64 now) {
    return static_cast<u8>(output(channel, now) << 7 | null_count(channel, now) << 6 |
                           channel.access << 4 | channel.mode << 1 | channel.bcd);
}

void latch_count(Channel& channel, u64 now) {
    if (channel.latched) return;  // the first latch stands until it is read
    channel.latched = 1;
    channel.latch = shown(channel, now);
}

void load(Channel& channel, u32 written, u64 now) {
    u32 count = channel.bcd ? from_bcd(written) : written;
    if (count == 0) count = modulus(channel);
    if (is_triggered(channel)) {
        channel.next_reload = count;
        return;
    }
    if (is_periodic(channel) && loaded(channel, now) && channel.gate) {
        // The period under way is finished first.
        u64 e = now - channel.start;
        channel.next_reload = count;
        channel.switch_at = channel.start + (e / channel.reload + 1) * channel.reload;
        return;
    }
    channel.reload = count;
    channel.next_reload = 0;
    channel.switch_at = 0;
    channel.start = now + 1;
    channel.held = 0;
    channel.running = 1;
}

}  // namespace

Pit::Pit(Clock& clock, IrqLine& irq0)
    : clock_(clock), irq0_(irq0), timer_(clock, [this] { fire(); }) {
    reset();
}

u64 Pit::tick_at(Nanoseconds now) {
    return static_cast<u64>(static_cast<u128>(now) * kFrequency / kBillion);
}

Nanoseconds Pit::time_of(u64 tick) {
    return static_cast<u64>((static_cast<u128>(tick) * kBillion + kFrequency - 1) / kFrequency);
}

u64 Pit::next_rise(const Channel& channel, u64 now) {
    if (!channel.running || !channel.gate) return kNever;
    u64 first = channel.start + channel.reload + (channel.mode >= 4 ? 1 : 0);
    if (now < first) return first;
    if (!is_periodic(channel)) return kNever;
    return channel.start + ((now - channel.start) / channel.reload + 1) * channel.reload;
}

void Pit::reset() {
    std::lock_guard lock(mutex_);
    state_ = State{};
    state_.channels[2].gate = 0;
    timer_.disarm();
}

std::vector<u8> Pit::save() const {
    return save_pod(state());
}

Pit::State Pit::state() const {
    std::lock_guard lock(mutex_);
    return state_;
}

void Pit::validate(const State& state) {
    constexpr auto kName = "pit";
    for (const Channel& channel : state.channels) {
        u32 limit = channel.bcd ? 10'000 : 0x10000;
        check_state(channel.mode <= 5, kName, "mode");
        check_state(channel.access >= 1 && channel.access <= 3, kName, "access");
        for (u8 flag :
             {channel.bcd, channel.gate, channel.running, channel.latched, channel.status_latched,
              channel.write_high_next, channel.read_high_next, channel.programmed}) {
            check_state(flag <= 1, kName, "flags");
        }
        check_state(channel.reload <= limit && channel.next_reload <= limit, kName, "reload");
        check_state(!channel.running || channel.reload != 0, kName, "running");
        check_state(channel.switch_at == 0 || channel.next_reload != 0, kName, "switch_at");
        check_state(channel.start < bit(62) && channel.switch_at < bit(62), kName, "start");
    }
    check_state(state.backlog <= kMaxBacklog, kName, "backlog");
}

void Pit::restore(std::span<const u8> bytes) {
    State state = load_pod<State>(bytes, name());
    validate(state);
    std::lock_guard lock(mutex_);
    state_ = state;
    if (state_.next_edge == kNever && state_.backlog == 0) {
        timer_.disarm();
    } else {
        timer_.arm(std::max(time_of(std::min(state_.next_edge, bit(62))), clock_.now()));
    }
}

void Pit::schedule(u64 now) {
    state_.backlog = 0;
    state_.next_edge = next_rise(state_.channels[0], now);
    timer_.arm(state_.next_edge == kNever ? kNever : time_of(state_.next_edge));
}

void Pit::fire() {
    std::lock_guard lock(mutex_);
    Channel& channel = state_.channels[0];
    u64 now = tick();
    u64 owed = state_.backlog;
    if (now >= state_.next_edge) {
        u64 edge = state_.next_edge;
        settle(channel, edge);
        state_.next_edge = next_rise(channel, edge);
        ++owed;
        if (state_.next_edge <= now) {  // late: several have passed
            owed += (now - state_.next_edge) / channel.reload + 1;
            settle(channel, now);
            state_.next_edge = next_rise(channel, now);
        }
    }
    // None: re-programmed while this call was on its way; the timer is armed for the new edge.
    if (owed == 0) return;
    state_.backlog = static_cast<u32>(std::min<u64>(owed - 1, kMaxBacklog));
    irq0_.pulse();
    if (state_.backlog == 0 && state_.next_edge == kNever) return;
    Nanoseconds at = state_.next_edge == kNever ? kNever : time_of(state_.next_edge);
    Nanoseconds soonest = clock_.now() + kMinPeriod;
    if (state_.backlog > 0) {
        Nanoseconds half = time_of(channel.reload) / 2;
        at = std::min(at, clock_.now() + half);
    }
    timer_.arm(std::max(at, soonest));
}

u8 Pit::read_counter(Channel& channel, u64 now) {
    if (channel.status_latched) {
        channel.status_latched = 0;
        return channel.status_latch;
    }
    u16 value = channel.latched ? channel.latch : shown(channel, now);
    bool high = channel.access == 2 || (channel.access == 3 && channel.read_high_next);
    if (channel.access == 3) channel.read_high_next ^= 1;
    if (channel.access != 3 || high) channel.latched = 0;  // wholly read
    return static_cast<u8>(high ? value >> 8 : value);
}

void Pit::write_counter(unsigned index, u8 value, u64 now) {
    Channel& channel = state_.channels[index];
    switch (channel.access) {
        case 1:
            load(channel, value, now);
            break;
        case 2:
            load(channel, static_cast<u32>(value) << 8, now);
            break;
        default:
            channel.write_high_next ^= 1;
            if (channel.write_high_next) {
                channel.write_low = value;
                if (channel.mode == 0) channel.running = 0;  // the first byte stops the count
            } else {
                load(channel, static_cast<u32>(value) << 8 | channel.write_low, now);
            }
    }
    if (index == 0) schedule(now);
}

void Pit::write_control(u8 value, u64 now) {
    unsigned select = value >> 6;
    if (select == 3) {  // read-back: latch count and status of several channels
        for (unsigned i = 0; i < 3; ++i) {
            if ((value >> (i + 1) & 1) == 0) continue;
            Channel& channel = state_.channels[i];
            if ((value & 0x20) == 0) latch_count(channel, now);
            if ((value & 0x10) == 0 && !channel.status_latched) {
                channel.status_latched = 1;
                channel.status_latch = status(channel, now);
            }
        }
        return;
    }
    Channel& channel = state_.channels[select];
    u8 access = (value >> 4) & 3;
    if (access == 0) {
        latch_count(channel, now);
        return;
    }
    u8 gate = channel.gate;
    u32 reload = channel.reload;
    channel = Channel{};
    channel.gate = gate;
    channel.reload = reload;  // still shown until a new count is loaded
    channel.access = access;
    channel.programmed = 1;
    channel.mode = (value >> 1) & 7;
    if (channel.mode > 5) channel.mode -= 4;  // 6 and 7 are 2 and 3
    channel.bcd = value & 1;
    if (channel.bcd && channel.reload > 10'000) channel.reload = 10'000;
    if (select == 0) schedule(now);
}

void Pit::write_gate(Channel& channel, bool gate, u64 now) {
    if (gate == (channel.gate != 0)) return;
    if (is_triggered(channel)) {  // a rising edge (re)starts the count
        channel.gate = gate;
        u32 count = channel.next_reload != 0 ? channel.next_reload : channel.reload;
        if (!gate || count == 0) return;
        channel.reload = count;
        channel.next_reload = 0;
        channel.start = now + 1;
        channel.running = 1;
    } else if (!gate) {
        channel.held = loaded(channel, now) ? elapsed(channel, now) : 0;
        channel.gate = 0;
    } else {
        channel.gate = 1;
        if (!channel.running) return;
        if (is_periodic(channel)) {  // starts over
            if (channel.next_reload != 0) channel.reload = channel.next_reload;
            channel.next_reload = 0;
            channel.switch_at = 0;
            channel.start = now + 1;
        } else if (now > channel.start) {  // goes on where it was
            channel.start = now - std::min(channel.held, now);
        }
    }
}

u8 Pit::read_port61(u64 now) {
    // Bit 4 toggles with each DRAM refresh request, every 18 ticks (15.1 us), as on an AT.
    return static_cast<u8>(state_.port61 | (now / 18 & 1) << 4 |
                           output(state_.channels[2], now) << 5);
}

void Pit::read(u64 offset, std::span<u8> data) {
    std::lock_guard lock(mutex_);
    u64 now = tick();
    for (Channel& channel : state_.channels) settle(channel, now);
    for (u8& byte : data) {
        byte = offset < 3    ? read_counter(state_.channels[offset], now)
               : offset == 4 ? read_port61(now)
                             : 0xff;  // the control word cannot be read
        ++offset;
    }
}

void Pit::write(u64 offset, std::span<const u8> data) {
    std::lock_guard lock(mutex_);
    u64 now = tick();
    for (Channel& channel : state_.channels) settle(channel, now);
    for (u8 byte : data) {
        if (offset < 3) {
            write_counter(static_cast<unsigned>(offset), byte, now);
        } else if (offset == 3) {
            write_control(byte, now);
        } else if (offset == 4) {
            state_.port61 = byte & 0x0f;
            write_gate(state_.channels[2], byte & 1, now);
        }
        ++offset;
    }
}

}  // namespace polyvisor::irqchip
