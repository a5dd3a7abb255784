// The local APIC's interrupt logic; registers are in lapic_registers.cpp, the timer in
// lapic_timer.cpp.
#include "irqchip/lapic.hpp"

#include "bus/pod_state.hpp"
#include "irqchip/lapic_detail.hpp"

namespace polyvisor::irqchip {

Lapic::Lapic(const Config& config, Clock& clock, ApicBus& bus, Log* log)
    : config_(config), clock_(clock), bus_(bus), log_(log), timer_(clock, [this] {
          timer_expired();
      }) {
    reset(false);
    bus.attach(*this);
}

Lapic::~Lapic() = default;

void Lapic::reset(bool init) {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        if (!init) {
            state_.apic_base = kDefaultBase | kBaseEnable | (config_.bsp ? kBaseBsp : 0);
            tsc_offset_ = 0;
        }
        reset_registers();
        update_mmio_base();
        update(out);
    }
    finish(out);
}

// SDM 3A 11.4.7.1: what power-up, reset and INIT give, the APIC base and id apart.
void Lapic::reset_registers() {
    State fresh{};
    fresh.apic_base = state_.apic_base;
    fresh.id = config_.id;
    fresh.lint = state_.lint;
    fresh.dfr = ~0u;
    fresh.svr = 0xff;
    fresh.timer_deadline = kNever;
    for (u32& lvt : fresh.lvt) lvt = kLvtMasked;
    state_ = fresh;
    timer_.disarm();
}

void Lapic::set_virtual_wire(State& state) {
    state.svr = 0x1ff;
    state.lvt[kLint0] = static_cast<u32>(DeliveryMode::kExtInt) << 8;
    state.lvt[kLint1] = static_cast<u32>(DeliveryMode::kNmi) << 8;
}

void Lapic::set_virtual_wire() {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        set_virtual_wire(state_);
        update(out);
    }
    finish(out);
}

// Calls outward what was decided under the mutex.
void Lapic::finish(const Outcome& out) {
    if (CpuSignals* cpu = cpu_.load(std::memory_order_acquire)) {
        if (out.interrupt) cpu->interrupt();
        if (out.nmi) cpu->nmi();
        if (out.smi) cpu->smi();
        if (out.init) cpu->init();
        if (out.sipi >= 0) cpu->sipi(static_cast<u8>(out.sipi));
    }
    if (out.eoi >= 0) bus_.broadcast_eoi(static_cast<u8>(out.eoi));
    if (out.errors != 0 && log_ != nullptr) {
        log_->note("lapic", "local APIC " + std::to_string(config_.id) + ": error status " +
                                std::to_string(out.errors) +
                                " (SDM 3A 11.5.3) caused by the guest");
    }
    if (!out.send) return;
    switch (out.shorthand) {
        case Shorthand::kNone:
            bus_.deliver(out.message, out.broadcast);
            break;
        case Shorthand::kSelf:
            accept(out.message);
            break;
        case Shorthand::kAll:
            bus_.deliver_to_all(out.message, nullptr);
            break;
        case Shorthand::kOthers:
            bus_.deliver_to_all(out.message, this);
            break;
    }
}

u8 Lapic::processor_priority() const {
    int serving = highest_bit(state_.isr);
    u32 served = serving < 0 ? 0 : static_cast<u32>(serving) & 0xf0;
    u32 task = state_.tpr & 0xff;
    return static_cast<u8>((task & 0xf0) >= served ? task : served);
}

// INTR from the 8259: directly when the APIC is switched off, through LINT0 when that is ExtINT.
bool Lapic::ext_int_requested() const {
    bool lint0 = state_.lint & 1;
    if (!hardware_enabled()) return lint0;
    u32 lvt = state_.lvt[kLint0];
    bool through = !(lvt & kLvtMasked) && mode_of(lvt) == DeliveryMode::kExtInt;
    return (lint0 && through) || state_.ext_int;
}

// Recomputes what pending() shows. To be called after every change of IRR, ISR, TPR, LINT0.
void Lapic::update(Outcome& out) {
    u32 next = 0;
    if (ext_int_requested()) {
        next = kDeliverExtInt;
    } else if (hardware_enabled()) {
        int vector = highest_bit(state_.irr);
        if (vector >= 16 && (vector & 0xf0) > (processor_priority() & 0xf0)) {
            next = kDeliverFixed | static_cast<u32>(vector);
        }
    }
    u32 before = deliverable_.exchange(next, std::memory_order_acq_rel);
    if (next != 0 && next != before) out.interrupt = true;
}

int Lapic::acknowledge() {
    Outcome out;
    int vector = -1;
    bool external = false;
    {
        std::lock_guard lock(mutex_);
        u32 what = deliverable_.load(std::memory_order_relaxed);
        if (what & kDeliverExtInt) {
            external = true;
            state_.ext_int = 0;
        } else if (what & kDeliverFixed) {
            vector = static_cast<int>(what & 0xff);
            clear_bit(state_.irr, static_cast<u8>(vector));
            set_bit(state_.isr, static_cast<u8>(vector));
        }
        update(out);
    }
    if (external) {  // the PIC's mutex comes before ours, so ours is free now
        vector = ext_int_ != nullptr ? ext_int_->acknowledge() : -1;
    }
    if (pending()) out.interrupt = true;  // another one waits behind it
    finish(out);
    return vector;
}

void Lapic::end_of_interrupt(Outcome& out) {
    int vector = highest_bit(state_.isr);
    if (vector < 0) return;
    u8 ended = static_cast<u8>(vector);
    clear_bit(state_.isr, ended);
    if (test_bit(state_.tmr, ended)) {
        if (!(state_.svr & kSvrSuppressEoi)) out.eoi = vector;
        for (unsigned which : {kLint0, kLint1}) {  // a level-triggered LINT that is still high
            u32& lvt = state_.lvt[which];
            if (!(lvt & kLvtRemoteIrr) || (lvt & 0xff) != ended) continue;
            lvt &= ~kLvtRemoteIrr;
            if (state_.lint >> (which - kLint0) & 1) fire_lvt(which, out);
        }
    }
    update(out);
}

u8 Lapic::cr8() const {
    std::lock_guard lock(mutex_);
    return static_cast<u8>((state_.tpr >> 4) & 15);
}

void Lapic::set_cr8(u8 priority) {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        state_.tpr = (priority & 15u) << 4;
        update(out);
    }
    finish(out);
}

void Lapic::error(u32 bits, Outcome& out) {
    state_.esr_pending |= bits;
    out.errors |= bits;
    // An error vector that is itself illegal must not raise another error.
    u32 lvt = state_.lvt[kError];
    if ((lvt & 0xff) >= 16) fire_lvt(kError, out);
}

void Lapic::receive_fixed(u8 vector, bool level, Outcome& out) {
    if (vector < 16) {
        error(kErrorReceiveVector, out);
        return;
    }
    set_bit(state_.irr, vector);
    if (level) {
        set_bit(state_.tmr, vector);
    } else {
        clear_bit(state_.tmr, vector);
    }
    update(out);
}

void Lapic::fire_lvt(unsigned which, Outcome& out) {
    u32& lvt = state_.lvt[which];
    if (!hardware_enabled() || (lvt & kLvtMasked)) return;
    bool pin = which == kLint0 || which == kLint1;
    bool fixed_only = which == kTimer || which == kError;
    DeliveryMode mode = fixed_only ? DeliveryMode::kFixed : mode_of(lvt);
    switch (mode) {
        case DeliveryMode::kFixed: {
            bool level = pin && (lvt & kLvtLevel);
            if (level && (lvt & kLvtRemoteIrr)) return;
            if (level) lvt |= kLvtRemoteIrr;
            receive_fixed(static_cast<u8>(lvt), level, out);
            break;
        }
        case DeliveryMode::kNmi:
            out.nmi = true;
            break;
        case DeliveryMode::kSmi:
            out.smi = true;
            break;
        case DeliveryMode::kInit:
            out.init = true;
            break;
        default:  // ExtINT follows the wire (update()); the rest is reserved
            break;
    }
    if (which == kPerf) lvt |= kLvtMasked;  // SDM 3A 11.5.1: set when the counter interrupts
}

void Lapic::local_interrupt(Lvt source) {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        fire_lvt(source, out);
    }
    finish(out);
}

void Lapic::set_lint(unsigned which, bool level) {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        u8 mask = static_cast<u8>(1u << which);
        bool before = state_.lint & mask;
        state_.lint = static_cast<u8>(level ? state_.lint | mask : state_.lint & ~mask);
        if (level && !before) {
            if (hardware_enabled()) {
                fire_lvt(which == 0 ? kLint0 : kLint1, out);
            } else if (which == 1) {
                out.nmi = true;  // LINT1 is the NMI pin then
            }
        }
        update(out);
    }
    finish(out);
}

u32 Lapic::logical_id() const {
    if (!in_x2apic()) return state_.ldr;
    return (config_.id >> 4) << 16 | 1u << (config_.id & 15);  // SDM 3A 11.12.10.2
}

bool Lapic::matches(const ApicMessage& message, u32 broadcast) const {
    std::lock_guard lock(mutex_);
    if (!hardware_enabled()) return false;
    u32 destination = message.destination;
    if (destination == broadcast) return true;
    if (!message.logical) {
        return destination == (in_x2apic() ? config_.id : config_.id & 0xff);
    }
    u32 ldr = logical_id();
    if (in_x2apic()) {
        return destination >> 16 == ldr >> 16 && (destination & ldr & 0xffff) != 0;
    }
    if (destination > 0xff) return false;
    u32 mine = ldr >> 24;
    if (state_.dfr >> 28 == 0xf) return (destination & mine) != 0;           // flat model
    return destination >> 4 == mine >> 4 && (destination & mine & 15) != 0;  // cluster model
}

u32 Lapic::arbitration_priority() const {
    std::lock_guard lock(mutex_);
    if (!hardware_enabled() || !software_enabled()) return ~0u;
    return processor_priority();
}

bool Lapic::accept(const ApicMessage& message) {
    Outcome out;
    bool accepted = true;
    {
        std::lock_guard lock(mutex_);
        if (!hardware_enabled()) return false;
        switch (message.mode) {
            case DeliveryMode::kFixed:
            case DeliveryMode::kLowestPriority:
                accepted = software_enabled();
                if (accepted) receive_fixed(message.vector, message.level_triggered, out);
                break;
            case DeliveryMode::kSmi:
                out.smi = true;
                break;
            case DeliveryMode::kNmi:
                out.nmi = true;
                break;
            case DeliveryMode::kInit:
                out.init = message.assert_level;
                break;
            case DeliveryMode::kStartUp:
                out.sipi = message.vector;
                break;
            case DeliveryMode::kExtInt:
                state_.ext_int = 1;
                update(out);
                break;
            case DeliveryMode::kReserved:
                accepted = false;
                break;
        }
    }
    finish(out);
    return accepted;
}

bool Lapic::x2apic() const {
    std::lock_guard lock(mutex_);
    return in_x2apic();
}

Lapic::State Lapic::state() const {
    std::lock_guard lock(mutex_);
    return state_;
}

std::vector<u8> Lapic::save() const {
    return save_pod(state());
}

void Lapic::validate(const State& state, const Config& config) {
    constexpr auto kName = "lapic";
    u64 base_bits = kBaseBsp | kBaseEnable | kBaseX2apic | base_address_mask(config.physical_bits);
    check_state((state.apic_base & ~base_bits) == 0, kName, "apic_base");
    bool x2apic = state.apic_base & kBaseX2apic;
    check_state(!x2apic || (config.x2apic && (state.apic_base & kBaseEnable)), kName, "apic_base");
    check_state(state.id == config.id, kName, "id");
    check_state(state.tpr <= 0xff, kName, "tpr");
    check_state((state.ldr & 0xffffff) == 0, kName, "ldr");
    check_state((state.dfr & 0x0fffffff) == 0x0fffffff, kName, "dfr");
    check_state((state.svr & ~kSvrWritable) == 0, kName, "svr");
    for (unsigned i = 0; i < kLvtCount; ++i) {
        check_state((state.lvt[i] & ~(lvt_writable(i, config) | kLvtRemoteIrr)) == 0, kName, "lvt");
    }
    check_state((state.divide & ~0xbu) == 0, kName, "divide");
    check_state((state.irr[0] & 0xffff) == 0 && (state.isr[0] & 0xffff) == 0, kName, "irr");
    bool counting = state.timer_deadline != kNever && (state.lvt[kTimer] >> 17 & 3) != 2;
    bool ordered = static_cast<s64>(state.timer_deadline - state.timer_start) >= 0;
    check_state(!counting || (state.initial_count != 0 && ordered), kName, "timer_deadline");
    check_state(state.lint < 4 && state.ext_int < 2, kName, "lint");
}

void Lapic::restore(std::span<const u8> bytes) {
    State state = load_pod<State>(bytes, "lapic");
    validate(state, config_);
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        state_ = state;
        timer_.arm(state_.timer_deadline);
        update_mmio_base();
        deliverable_.store(0, std::memory_order_relaxed);  // so that the CPU is told anew
        update(out);
    }
    finish(out);
}

}  // namespace polyvisor::irqchip
