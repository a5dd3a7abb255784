// The chips of a PC and where they sit. Nothing here decides anything: it builds, wires and
// attaches.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bus/bus.hpp"
#include "bus/clock.hpp"
#include "bus/interrupt_chips.hpp"
#include "devices/acpi_pm.hpp"
#include "devices/debug_ports.hpp"
#include "devices/host_console.hpp"
#include "devices/serial.hpp"
#include "irqchip/apic_bus.hpp"
#include "irqchip/ioapic.hpp"
#include "irqchip/irq_router.hpp"
#include "irqchip/lapic.hpp"
#include "irqchip/pic.hpp"
#include "irqchip/pit.hpp"
#include "machine/stop_info.hpp"
#include "memory/guest_memory.hpp"
#include "pci/host_bridge.hpp"

namespace polyvisor {

/// Addresses and interrupts of the board. Firmware tables are made from the same constants.
struct PcLayout {
    static constexpr u64 kHoleStart = 0xc000'0000;  ///< RAM ends here and goes on at 4 GiB
    static constexpr u64 kHoleEnd = u64{1} << 32;
    static constexpr u64 kPciMmio = 0xc000'0000, kPciMmioEnd = 0xe000'0000;
    static constexpr u64 kPciIo = 0xc000;
    static constexpr u64 kEcam = 0xe000'0000;
    static constexpr u64 kVirtioMmio = 0xfea0'0000;  ///< register blocks of virtio-mmio devices
    static constexpr u32 kVirtioMmioGsi = 20, kVirtioMmioGsis = 4;  ///< which they share
    static constexpr u64 kIoapic = 0xfec0'0000;
    static constexpr u64 kLapic = irqchip::Lapic::kDefaultBase;
    static constexpr u16 kAcpiPm = 0x600;
    static constexpr u32 kSciGsi = 9;
    static constexpr u16 kPciConfig = 0xcf8, kResetControl = 0xcf9;
    static constexpr u8 kResetValue = 6;
    static constexpr u16 kDebugExit = 0xf4, kDebugConsole = 0xe9;
    static constexpr unsigned kMaxSerial = 4;
    static constexpr u16 kSerial[kMaxSerial] = {0x3f8, 0x2f8, 0x3e8, 0x2e8};
    static constexpr u8 kSerialIrq[kMaxSerial] = {4, 3, 4, 3};
    static constexpr std::array<u8, 4> kPciIrqs = {10, 11, 10, 11};  ///< GSI 16..19 at the 8259s

    /// All of them by name, for the tables' makers.
    static std::vector<std::pair<std::string, u64>> values();
};

/// Adds RAM: below the hole, the rest from 4 GiB on. The range 0xa0000..0xfffff is memory too, for
/// tables. Throws ConfigError, HostError.
void add_pc_memory(GuestMemory& memory, u64 size, HugePages huge = HugePages::kNone);

struct PcConfig {
    u32 cpus = 1;
    unsigned serial_ports = 2;
    bool x2apic = true;
    bool tsc_deadline = true;
    u8 physical_bits = 40;
    /// Chips that the engine runs in place of ours; nullptr: none. Outlives the Pc.
    InterruptChips* chips = nullptr;
};

class Pc {
  public:
    /// `end` is called when a chip ends the machine, on the thread of the vCPU that made it do so.
    /// The references outlive the Pc.
    Pc(const PcConfig& config, Clock& clock, Bus& pio, Bus& mmio, Log& log,
       std::function<void(StopInfo)> end);
    ~Pc();

    /// What the vCPU asks for interrupts, for Engine::create_vcpu(): its local APIC; where the
    /// engine has those, the 8259 pair for CPU 0 in mode kSplit, else nullptr.
    LocalInterrupts* interrupts(u32 cpu);
    /// The vCPU that the CPU's interrupts are signalled to.
    void connect(u32 cpu, CpuSignals& signals);
    irqchip::IrqRouter& irqs() { return router_; }
    MsiSink& msi() { return apic_bus_; }
    pci::HostBridge& pci() { return *host_bridge_; }
    devices::AcpiPm& acpi() { return *acpi_; }
    unsigned serial_ports() const { return static_cast<unsigned>(serial_.size()); }
    const std::shared_ptr<devices::HostConsole>& console(unsigned port) { return consoles_[port]; }
    const std::shared_ptr<devices::HostConsole>& debug_console() { return debug_output_; }

    /// What firmware leaves behind: PCI devices placed, the 8259s wired through the boot CPU's
    /// LINT0. Once, when all vCPUs exist and before the machine first runs.
    void finish_wiring();
    /// Passes on all output that chips still collect.
    void flush();
    /// Everything with a State, by a name that is unique in the machine, in the order of restoring.
    struct Part {
        std::string name;
        const Device* device;  ///< nullptr for what is not on a bus
        std::function<std::vector<u8>()> save;
        std::function<void(std::span<const u8>)> restore;
    };
    std::vector<Part> parts();

  private:
    class IntrWire;
    void build_chips(const PcConfig& config, Clock& clock, Bus& pio, Bus& mmio, Log& log);
    void wire_engine_lapics();
    std::vector<u8> save_engine_lapic(u32 cpu) const;
    bool intr() const;
    IrqLine& line(unsigned gsi);
    void claim(Bus& bus, u64 start, u64 size, std::shared_ptr<Device> device, u64 base = 0);

    std::vector<std::pair<Bus*, u64>> claims_;
    const u32 cpus_;
    InterruptChips* const chips_;
    irqchip::ApicBus apic_bus_;
    // Of the interrupt chips, those that the engine has are empty.
    std::vector<std::unique_ptr<irqchip::Lapic>> lapics_;
    std::unique_ptr<IntrWire> intr_;
    std::shared_ptr<irqchip::Ioapic> ioapic_;
    std::shared_ptr<irqchip::Pic> pic_;
    irqchip::IrqRouter router_;
    std::vector<std::unique_ptr<IrqLine>> lines_;
    std::shared_ptr<irqchip::Pit> pit_;
    std::vector<std::shared_ptr<devices::HostConsole>> consoles_;
    std::shared_ptr<devices::HostConsole> debug_output_;
    std::vector<std::shared_ptr<devices::Serial>> serial_;
    std::shared_ptr<devices::DebugConsole> debug_console_;
    std::shared_ptr<devices::AcpiPm> acpi_;
    std::shared_ptr<devices::ResetControl> reset_control_;
    std::shared_ptr<devices::SystemControlA> port92_;
    std::unique_ptr<pci::HostBridge> host_bridge_;
    std::shared_ptr<pci::ConfigPorts> config_ports_;
    bool wired_ = false;
};

}  // namespace polyvisor
