#include "irqchip/ioapic.hpp"

#include <algorithm>
#include <cstring>

#include "bus/pod_state.hpp"

namespace polyvisor::irqchip {

namespace {

constexpr u64 kIndex = 0x00, kWindow = 0x10, kEoi = 0x40;  // offsets of the memory-mapped registers
constexpr u64 kReadOnly = Ioapic::kDelivStatus | Ioapic::kRemoteIrr;
constexpr u64 kWritable = 0xff000000'0001afffull;

u8 vector_of(u64 entry) {
    return static_cast<u8>(entry);
}
DeliveryMode mode_of(u64 entry) {
    return static_cast<DeliveryMode>(bits(entry, 10, 8));
}

// Only fixed and lowest-priority interrupts can be level-triggered.
bool is_level(u64 entry) {
    return (entry & Ioapic::kLevel) && mode_of(entry) <= DeliveryMode::kLowestPriority;
}

ApicMessage message_of(u64 entry) {
    ApicMessage message;
    message.destination = static_cast<u32>(entry >> 56);
    message.logical = entry & Ioapic::kLogical;
    message.mode = mode_of(entry);
    message.vector = vector_of(entry);
    message.level_triggered = is_level(entry);
    return message;
}

}  // namespace

Ioapic::Ioapic(ApicBus& bus) : bus_(bus) {
    bus.attach(*this);
    reset();
}

void Ioapic::reset() {
    std::lock_guard lock(mutex_);
    u32 lines = state_.lines;
    state_ = {};
    state_.lines = lines;
    for (u64& entry : state_.redirection) entry = kMask;
    for (unsigned pin = 0; pin < kPins; ++pin) notify(pin);
}

std::vector<u8> Ioapic::save() const {
    return save_pod(state());
}

Ioapic::State Ioapic::state() const {
    std::lock_guard lock(mutex_);
    return state_;
}

void Ioapic::validate(const State& state) {
    constexpr auto kName = "ioapic";
    for (u64 entry : state.redirection) {
        check_state((entry & ~(kWritable | kReadOnly)) == 0, kName, "redirection");
    }
    check_state(state.lines < bit(kPins), kName, "lines");
    check_state(state.id < 16, kName, "id");
}

void Ioapic::restore(std::span<const u8> bytes) {
    State state = load_pod<State>(bytes, name());
    validate(state);
    std::lock_guard lock(mutex_);
    state_ = state;
    for (unsigned pin = 0; pin < kPins; ++pin) notify(pin);
}

void Ioapic::set_observer(Observer observer) {
    std::lock_guard lock(mutex_);
    observer_ = std::move(observer);
    for (unsigned pin = 0; pin < kPins; ++pin) notify(pin);
}

void Ioapic::notify(unsigned pin) {
    if (!observer_) return;
    u64 entry = state_.redirection[pin];
    ApicMessage message = message_of(entry);
    observer_(pin, is_level(entry) && !(entry & kMask) ? &message : nullptr);
}

// Sends the pin's message if it is due.
void Ioapic::service(unsigned pin) {
    u64& entry = state_.redirection[pin];
    if (entry & kMask) return;
    if (is_level(entry) && ((entry & kRemoteIrr) || !(state_.lines >> pin & 1))) return;
    bool accepted = bus_.deliver(message_of(entry));
    if (accepted && is_level(entry)) entry |= kRemoteIrr;
}

void Ioapic::set_irq(unsigned pin, bool active) {
    if (pin >= kPins) return;
    std::lock_guard lock(mutex_);
    u32 mask = 1u << pin;
    bool before = state_.lines & mask;
    state_.lines = active ? state_.lines | mask : state_.lines & ~mask;
    // An edge that comes while the pin is masked is lost (82093AA 3.4.2); a level stays.
    if (active && !before) service(pin);
}

void Ioapic::eoi(u8 vector) {
    std::lock_guard lock(mutex_);
    end_of_interrupt(vector);
}

void Ioapic::end_of_interrupt(u8 vector) {
    for (unsigned pin = 0; pin < kPins; ++pin) {
        u64& entry = state_.redirection[pin];
        if (vector_of(entry) != vector || !(entry & kRemoteIrr)) continue;
        entry &= ~kRemoteIrr;
        if (is_level(entry)) service(pin);
    }
}

u32 Ioapic::read_register(u8 index) const {
    switch (index) {
        case 0:
        case 2:  // arbitration id: loaded with the id
            return static_cast<u32>(state_.id) << 24;
        case 1:
            return (kPins - 1) << 16 | kVersion;
        default:
            if (index < 0x10 || index >= 0x10 + 2 * kPins) return 0;
            u64 entry = state_.redirection[(index - 0x10) / 2];
            return static_cast<u32>(index & 1 ? entry >> 32 : entry);
    }
}

void Ioapic::write_register(u8 index, u32 value) {
    if (index == 0) state_.id = (value >> 24) & 15;
    if (index < 0x10 || index >= 0x10 + 2 * kPins) return;
    unsigned pin = (index - 0x10u) / 2;
    u64& entry = state_.redirection[pin];
    u64 half = index & 1 ? 0xffffffff'00000000ull : 0xffffffffull;
    u64 written = index & 1 ? static_cast<u64>(value) << 32 : value;
    u64 writable = kWritable & half;
    entry = (entry & ~writable) | (written & writable);
    // Going to edge mode forgets the level interrupt in service; drivers use it to recover a pin.
    if (!is_level(entry)) entry &= ~kRemoteIrr;
    notify(pin);  // first: the end of the interrupt must find its way back
    if (is_level(entry)) service(pin);
}

void Ioapic::read(u64 offset, std::span<u8> data) {
    std::lock_guard lock(mutex_);
    u64 reg = offset & ~u64{3};
    u32 value = reg == kIndex ? state_.index : reg == kWindow ? read_register(state_.index) : 0;
    for (u8& byte : data) {
        byte = static_cast<u8>(offset - reg < 4 ? value >> (8 * (offset - reg)) : 0);
        ++offset;
    }
}

void Ioapic::write(u64 offset, std::span<const u8> data) {
    std::lock_guard lock(mutex_);
    u32 value = 0;
    std::memcpy(&value, data.data(), std::min<std::size_t>(data.size(), sizeof value));
    if (offset == kIndex) {
        state_.index = static_cast<u8>(value);
    } else if (offset == kWindow && data.size() >= 4) {
        write_register(state_.index, value);
    } else if (offset == kEoi) {
        end_of_interrupt(static_cast<u8>(value));
    }
}

}  // namespace polyvisor::irqchip
