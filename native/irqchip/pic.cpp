// 8259A, by the data sheet's command words. Two deliberate simplifications: an edge stays latched
// in IRR when its input falls again before the acknowledge (so a pulse is enough), and the cascade
// input simply follows the slave's INT output.
#include "irqchip/pic.hpp"

#include <utility>

#include "bus/pod_state.hpp"

namespace polyvisor::irqchip {

namespace {

constexpr unsigned kCascade = 2;
constexpr u8 kElcrMask[2] = {0xf8, 0xde};  // timer, keyboard, cascade, RTC, FPU are always edges

// The first input set in `inputs` in order of priority (0 is highest), or 8.
unsigned priority_of(const Pic::Chip& chip, u8 inputs) {
    for (unsigned i = 0; i < 8; ++i) {
        if (inputs & (1u << ((chip.lowest + 1 + i) & 7))) return i;
    }
    return 8;
}

unsigned input_at(const Pic::Chip& chip, unsigned priority) {
    return (chip.lowest + 1 + priority) & 7;
}

bool is_level(const Pic::Chip& chip, unsigned input) {
    return chip.level_mode || (chip.elcr >> input & 1);
}

// First half of an acknowledge: the request moves from IRR to ISR.
void serve(Pic::Chip& chip, unsigned input) {
    u8 mask = static_cast<u8>(1u << input);
    if (!is_level(chip, input)) chip.irr &= ~mask;
    if (!chip.auto_eoi) {
        chip.isr |= mask;
    } else if (chip.rotate_on_auto_eoi) {
        chip.lowest = static_cast<u8>(input);
    }
}

// After power-on everything is masked, as firmware leaves it: nothing here runs firmware.
Pic::Chip power_on(u8 lines) {
    Pic::Chip chip;
    chip.imr = 0xff;
    chip.lines = lines;
    return chip;
}

}  // namespace

Pic::Pic(std::function<void(bool)> output) : output_callback_(std::move(output)) {
    for (Chip& chip : state_.chips) chip = power_on(0);
}

void Pic::reset() {
    std::lock_guard lock(mutex_);
    for (Chip& chip : state_.chips) chip = power_on(chip.lines);
    update();
}

std::vector<u8> Pic::save() const {
    return save_pod(state());
}

void Pic::validate(const State& state) {
    constexpr auto kName = "pic";
    for (const Chip& chip : state.chips) {
        check_state(chip.lowest < 8, kName, "lowest");
        check_state(chip.init_step == 0 || (chip.init_step >= 2 && chip.init_step <= 4), kName,
                    "init_step");
        check_state((chip.vector_base & 7) == 0, kName, "vector_base");
        for (u8 flag : {chip.icw4_needed, chip.single, chip.level_mode, chip.auto_eoi,
                        chip.rotate_on_auto_eoi, chip.fully_nested, chip.special_mask, chip.poll,
                        chip.read_isr}) {
            check_state(flag <= 1, kName, "flags");
        }
    }
    check_state((state.chips[0].lines & 1u << kCascade) == 0, kName, "lines");
    for (unsigned i = 0; i < 2; ++i) {
        check_state((state.chips[i].elcr & ~kElcrMask[i]) == 0, kName, "elcr");
    }
}

void Pic::restore(std::span<const u8> bytes) {
    State state = load_pod<State>(bytes, name());
    validate(state);
    std::lock_guard lock(mutex_);
    state_ = state;
    update(true);  // what hangs on the output was restored too, perhaps from another board
}

Pic::State Pic::state() const {
    std::lock_guard lock(mutex_);
    return state_;
}

bool Pic::output() const {
    std::lock_guard lock(mutex_);
    return output_;
}

void Pic::set_irq(unsigned irq, bool level) {
    if (irq > 15 || irq == kCascade) return;
    std::lock_guard lock(mutex_);
    set_input(state_.chips[irq / 8], irq % 8, level);
    update();
}

void Pic::set_input(Chip& chip, unsigned input, bool level) {
    u8 mask = static_cast<u8>(1u << input);
    bool before = chip.lines & mask;
    chip.lines = static_cast<u8>(level ? chip.lines | mask : chip.lines & ~mask);
    if (is_level(chip, input)) {
        chip.irr = static_cast<u8>(level ? chip.irr | mask : chip.irr & ~mask);
    } else if (level && !before) {
        chip.irr |= mask;
    }
}

// The input for which the chip raises INT, or -1.
int Pic::requesting(const State& state, unsigned which) {
    const Chip& chip = state.chips[which];
    if (chip.init_step != 0) return -1;
    unsigned wanted = priority_of(chip, chip.irr & ~chip.imr);
    u8 serving = chip.isr;
    // Special mask mode: a masked level in service holds back nobody.
    if (chip.special_mask) serving &= ~chip.imr;
    // Special fully nested mode: the slave may interrupt its own earlier request.
    if (chip.fully_nested && which == 0) serving &= ~(1u << kCascade);
    if (wanted >= priority_of(chip, serving)) return -1;
    return static_cast<int>(input_at(chip, wanted));
}

bool Pic::settle(State& state) {
    u8 cascade = 1u << kCascade;
    Chip& master = state.chips[0];
    bool slave = requesting(state, 1) >= 0;
    master.irr = static_cast<u8>(slave ? master.irr | cascade : master.irr & ~cascade);
    return requesting(state, 0) >= 0;
}

void Pic::update(bool report) {
    bool level = settle(state_);
    if (level == output_ && !report) return;
    output_ = level;
    if (output_callback_) output_callback_(level);
}

int Pic::acknowledge() {
    std::lock_guard lock(mutex_);
    Chip& master = state_.chips[0];
    Chip& slave = state_.chips[1];
    int vector;
    int input = requesting(state_, 0);
    if (input < 0) {
        vector = master.vector_base + 7;  // the request went away: spurious, not in service
    } else if (input != static_cast<int>(kCascade)) {
        serve(master, static_cast<unsigned>(input));
        vector = master.vector_base + input;
    } else {
        serve(master, kCascade);
        int behind = requesting(state_, 1);
        if (behind >= 0) serve(slave, static_cast<unsigned>(behind));
        vector = slave.vector_base + (behind >= 0 ? behind : 7);
    }
    update();
    return vector;
}

// OCW3 poll: the read takes the place of an acknowledge.
int Pic::poll(unsigned which) {
    int input = requesting(state_, which);
    if (input < 0) return 0;
    serve(state_.chips[which], static_cast<unsigned>(input));
    return 0x80 | input;
}

u8 Pic::read_chip(unsigned which, unsigned port) {
    Chip& chip = state_.chips[which];
    if (chip.poll) {
        chip.poll = 0;
        int result = poll(which);
        update();
        return static_cast<u8>(result);
    }
    if (port == 1) return chip.imr;
    return chip.read_isr ? chip.isr : chip.irr;
}

void Pic::write_icw1(Chip& chip, u8 value) {
    Chip fresh;
    fresh.lines = chip.lines;
    fresh.elcr = chip.elcr;
    fresh.vector_base = chip.vector_base;
    fresh.icw4_needed = value & 1;
    fresh.single = (value >> 1) & 1;
    fresh.level_mode = (value >> 3) & 1;
    fresh.init_step = 2;
    chip = fresh;
    for (unsigned i = 0; i < 8; ++i) {  // edges are forgotten, levels are still there
        if (is_level(chip, i) && (chip.lines >> i & 1)) chip.irr |= static_cast<u8>(1u << i);
    }
}

void Pic::write_icw(Chip& chip, u8 value) {
    switch (chip.init_step) {
        case 2:
            chip.vector_base = value & 0xf8;
            chip.init_step = !chip.single ? 3 : chip.icw4_needed ? 4 : 0;
            break;
        case 3:  // the cascade is wired, not programmed
            chip.init_step = chip.icw4_needed ? 4 : 0;
            break;
        default:
            chip.fully_nested = (value >> 4) & 1;
            chip.auto_eoi = (value >> 1) & 1;
            chip.init_step = 0;
    }
}

void Pic::write_ocw2(Chip& chip, u8 value) {
    bool rotate = value & 0x80, specific = value & 0x40, eoi = value & 0x20;
    u8 level = value & 7;
    if (eoi) {
        u8 candidates = chip.isr;
        if (chip.special_mask) candidates &= ~chip.imr;
        unsigned priority = priority_of(chip, candidates);
        if (!specific && priority == 8) return;
        u8 ended = specific ? level : static_cast<u8>(input_at(chip, priority));
        chip.isr &= static_cast<u8>(~(1u << ended));
        if (rotate) chip.lowest = ended;
    } else if (specific) {
        if (rotate) chip.lowest = level;  // set priority; without rotate it is no operation
    } else {
        chip.rotate_on_auto_eoi = rotate;
    }
}

void Pic::write_chip(unsigned which, unsigned port, u8 value) {
    Chip& chip = state_.chips[which];
    if (port == 1) {
        if (chip.init_step != 0) {
            write_icw(chip, value);
        } else {
            chip.imr = value;
        }
    } else if (value & 0x10) {
        write_icw1(chip, value);
    } else if (value & 0x08) {
        if (value & 0x02) chip.read_isr = value & 1;
        if (value & 0x40) chip.special_mask = (value >> 5) & 1;
        chip.poll = (value >> 2) & 1;
    } else {
        write_ocw2(chip, value);
    }
    update();
}

void Pic::read(u64 offset, std::span<u8> data) {
    std::lock_guard lock(mutex_);
    for (u8& byte : data) {
        byte = offset < 4   ? read_chip(offset / 2 & 1, offset & 1)
               : offset < 6 ? state_.chips[offset - 4].elcr
                            : 0xff;
        ++offset;
    }
}

void Pic::write(u64 offset, std::span<const u8> data) {
    std::lock_guard lock(mutex_);
    for (u8 byte : data) {
        if (offset < 4) {
            write_chip(offset / 2 & 1, offset & 1, byte);
        } else if (offset < 6) {
            unsigned which = static_cast<unsigned>(offset - 4);
            Chip& chip = state_.chips[which];
            chip.elcr = byte & kElcrMask[which];
            chip.irr = static_cast<u8>((chip.irr & ~chip.elcr) | (chip.lines & chip.elcr));
            update();
        }
        ++offset;
    }
}

}  // namespace polyvisor::irqchip
