// From a GSI to the chips' pins, as a PC wires them:
//
//     GSI 0..15   the ISA interrupts: 8259 input n and IOAPIC pin n, but the timer (GSI 0, which
//     ACPI
//                 calls GSI 2) is 8259 input 0 and IOAPIC pin 2
//     GSI 16..23  the PCI interrupts: IOAPIC pin n, and the 8259 input set with route_pci()
//
// Several sources may share a GSI: its wire is active while any of them is.
#pragma once

#include <array>
#include <memory>
#include <mutex>

#include "bus/device.hpp"
#include "bus/interrupt_chips.hpp"
#include "irqchip/ioapic.hpp"
#include "irqchip/pic.hpp"

namespace polyvisor::irqchip {

class IrqRouter {
  public:
    static constexpr unsigned kGsis = Ioapic::kPins;

    /// Any of them may be null: a machine without that chip. `engine`: has both chips itself, then
    /// the others are null.
    IrqRouter(Pic* pic, Ioapic* ioapic, InterruptChips* engine = nullptr);

    /// A new source on `gsi`; destroying it releases the wire. The router outlives it. Throws
    /// ConfigError for a GSI that does not exist.
    std::unique_ptr<IrqLine> line(unsigned gsi);
    /// Which 8259 input the PCI interrupt `gsi` (16..23) drives too; 0xff for none.
    void route_pci(unsigned gsi, u8 pic_irq);
    /// After the chips were reset or restored: drives every wire again with its present level.
    void refresh();

  private:
    class Source;
    void change(unsigned pin, bool active);
    void drive(unsigned pin);
    void drive_pic(u8 irq);
    bool pic_level(u8 irq) const;

    Pic* pic_;
    Ioapic* ioapic_;
    InterruptChips* engine_;
    std::mutex mutex_;                 // after a device's, before Pic's and Ioapic's
    std::array<u32, kGsis> active_{};  // by IOAPIC pin: sources that hold the wire
    std::array<u8, kGsis> pic_irq_;    // by IOAPIC pin: 8259 input
};

}  // namespace polyvisor::irqchip
