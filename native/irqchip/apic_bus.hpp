// The wires between interrupt chips: interprocessor interrupts, IOAPIC messages and MSIs all become
// one ApicMessage, and the bus hands it to the local APICs that its destination names.
//
// LAPICs and the IOAPIC are attached before the machine runs and stay until it ends, so delivery
// takes no lock of its own. Lock order of the interrupt chips, outermost first:
//
//     a device's mutex > IrqRouter > Pic > Ioapic > Lapic > (clock, vCPU wake-up: leaves)
//
// Nothing calls outward with a later lock held: a LAPIC releases its mutex before it broadcasts an
// EOI to the IOAPIC or acknowledges the PIC.
//
// Where an engine has the local APICs (split irqchip), the bus has none, and every message goes to
// the engine's InterruptChips in the form of an MSI. Their mutex is a leaf in the order above, and
// they report the end of an interrupt with it released.
#pragma once

#include <atomic>
#include <vector>

#include "bus/device.hpp"
#include "bus/interrupt_chips.hpp"
#include "bus/interrupts.hpp"

namespace polyvisor::irqchip {

class Lapic;
class Ioapic;

/// Delivery modes, as in the ICR, the LVT and redirection entries (SDM 3A 11.5.1, 11.6.1).
enum class DeliveryMode : u8 {
    kFixed = 0,
    kLowestPriority = 1,
    kSmi = 2,
    kReserved = 3,
    kNmi = 4,
    kInit = 5,
    kStartUp = 6,
    kExtInt = 7,
};

/// One message on the APIC bus.
struct ApicMessage {
    u32 destination = 0;
    bool logical = false;  ///< destination is matched against LDR/DFR, not the APIC id
    DeliveryMode mode = DeliveryMode::kFixed;
    u8 vector = 0;
    bool level_triggered = false;
    bool assert_level = true;  ///< false only for the INIT level de-assert, which does nothing
};

/// The address and data that an MSI with this meaning has (SDM 3A 11.11). A destination beyond 8
/// bits goes to address bits 63..40, as KVM's KVM_CAP_X2APIC_API and the VT-d "extended destination
/// id" have it.
struct Msi {
    u64 address = 0;
    u32 data = 0;
    bool operator==(const Msi&) const = default;
};
Msi to_msi(const ApicMessage& message);

class ApicBus final : public MsiSink {
  public:
    void attach(Lapic& lapic) { lapics_.push_back(&lapic); }
    void attach(Ioapic& ioapic) { ioapic_ = &ioapic; }
    /// An engine has the local APICs. Before any message; `chips` outlives the bus's use.
    void set_engine(InterruptChips& chips) { engine_ = &chips; }
    const std::vector<Lapic*>& lapics() const { return lapics_; }

    /// The 8259 pair's INTR output, wired to LINT0 of every local APIC.
    void set_lint0(bool level);
    /// The NMI wire: LINT1 of every local APIC.
    void set_lint1(bool level);

    /// Delivers to every LAPIC the destination names (one of them for lowest priority); `broadcast`
    /// is the destination that means all: 0xff for 8-bit senders, ~0 for x2APIC ICRs.
    /// False when no LAPIC accepted it.
    bool deliver(const ApicMessage& message, u32 broadcast = 0xff);

    /// ICR shorthands "all including self" and "all excluding self".
    void deliver_to_all(const ApicMessage& message, const Lapic* except);

    /// An MSI (SDM 3A 11.11): writes outside 0xfeexxxxx are dropped and counted.
    void send(u64 address, u32 data) override;
    u64 dropped() const { return dropped_.load(std::memory_order_relaxed); }

    /// A LAPIC ended a level-triggered interrupt: tells the IOAPIC.
    void broadcast_eoi(u8 vector);

  private:
    std::vector<Lapic*> lapics_;  // in order of attachment; fixed once the machine runs
    Ioapic* ioapic_ = nullptr;
    InterruptChips* engine_ = nullptr;
    std::atomic<u32> round_robin_{0};  // breaks ties of lowest-priority delivery
    std::atomic<u64> dropped_{0};
};

}  // namespace polyvisor::irqchip
