// Interrupt chips that an engine runs itself (KVM's in-kernel ones), as the rest of the machine
// sees them: wires and messages in, the same State as our own chips' out and in.
//
// GSIs are the PC's: 0..15 drive the 8259 input and the IOAPIC pin (0 drives pin 2), 16..23 the
// IOAPIC pin alone.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "base/types.hpp"

namespace polyvisor {

/// Who plays the interrupt chips of a machine.
enum class IrqchipMode : u8 {
    kUser,    ///< all of them are ours (native/irqchip)
    kSplit,   ///< local APICs in the engine; IOAPIC, 8259s and PIT ours
    kKernel,  ///< local APICs, IOAPIC, 8259s and PIT in the engine
};
const char* to_string(IrqchipMode mode);

/// All calls are safe from any thread, but save() and restore(): they need the vCPUs to stand
/// still.
class InterruptChips {
  public:
    enum class Kind : u8 { kLapic, kIoapic, kPic, kPit };

    virtual ~InterruptChips() = default;
    virtual IrqchipMode mode() const = 0;
    bool has(Kind kind) const { return kind == Kind::kLapic || mode() == IrqchipMode::kKernel; }

    /// kKernel only. The wire of a GSI (all its sources or'ed), or of an 8259 input alone, for PCI
    /// interrupts that share one.
    virtual void set_gsi(unsigned gsi, bool level) = 0;
    virtual void set_pic(unsigned irq, bool level) = 0;
    /// An interrupt message: MSI, or what our own IOAPIC sends. False: no CPU took it.
    virtual bool send_msi(u64 address, u32 data) = 0;
    /// The event file descriptor raises this message whenever it is written, until disconnected,
    /// without a thread of ours. Throws HostError. `fd` is not owned.
    virtual void connect_msi(int fd, u64 address, u32 data) = 0;
    virtual void disconnect_msi(int fd) = 0;

    /// kSplit only. What our IOAPIC's pin sends, so that the end of a level-triggered interrupt is
    /// reported: the handler gets the vector, on a vCPU thread. `enabled` false: nothing.
    virtual void set_ioapic_pin(unsigned pin, u64 address, u32 data, bool enabled) = 0;
    virtual void set_eoi_handler(std::function<void(u8 vector)> handler) = 0;

    /// The State of our own chip of that kind (irqchip::Lapic::State, ...) as save_pod() bytes.
    /// `index`: the CPU of a LAPIC, else 0. restore() throws StateError before changing anything.
    virtual std::vector<u8> save(Kind kind, u32 index) const = 0;
    virtual void restore(Kind kind, u32 index, std::span<const u8> state) = 0;
};

}  // namespace polyvisor
