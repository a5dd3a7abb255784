// The 82093AA I/O APIC: 24 inputs, each with a redirection entry that says which message its
// activation becomes. It has the EOI register of later ones too, but does not claim so: the version
// is that of KVM's in-kernel IOAPIC, which has none, and a guest may move from one to the other.
//
// Attach 4 KiB at 0xfec00000. Registers: 0x00 index, 0x10 window, 0x40 EOI.
#pragma once

#include <array>
#include <functional>
#include <mutex>

#include "bus/device.hpp"
#include "irqchip/apic_bus.hpp"

namespace polyvisor::irqchip {

class Ioapic final : public Device {
  public:
    static constexpr unsigned kPins = 24;
    static constexpr u32 kVersion = 0x11;

    /// Redirection entry bits (82093AA 3.2.4).
    static constexpr u64 kDelivStatus = bit(12), kActiveLow = bit(13), kRemoteIrr = bit(14),
                         kLevel = bit(15), kMask = bit(16), kLogical = bit(11);

    struct State {
        u64 redirection[kPins];
        u32 lines;  ///< inputs that are active
        u8 index;
        u8 id;  ///< 4 bits
        u8 reserved[2];
    };

    explicit Ioapic(ApicBus& bus);

    std::string_view name() const override { return "ioapic"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;

    /// The input's wire is active (whatever its polarity bit says: sources here know no polarity).
    void set_irq(unsigned pin, bool active);
    /// A local APIC ended `vector`: clears remote IRR, delivers again what is still asserted.
    void eoi(u8 vector);
    State state() const;
    /// Throws StateError for a state that this chip cannot have.
    static void validate(const State& state);

    /// Called with a pin and the message it sends while level-triggered and unmasked (nullptr
    /// otherwise) whenever that may have changed, under the mutex; and at once for every pin.
    using Observer = std::function<void(unsigned pin, const ApicMessage* message)>;
    void set_observer(Observer observer);

  private:
    void notify(unsigned pin);
    u32 read_register(u8 index) const;
    void write_register(u8 index, u32 value);
    void service(unsigned pin);
    void end_of_interrupt(u8 vector);

    ApicBus& bus_;
    mutable std::mutex mutex_;  // after Pic's, before Lapic's
    State state_{};
    Observer observer_;
};

}  // namespace polyvisor::irqchip
