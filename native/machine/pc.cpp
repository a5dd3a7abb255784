#include "machine/pc.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace polyvisor {

std::vector<std::pair<std::string, u64>> PcLayout::values() {
    return {
        {"hole_start", kHoleStart},
        {"hole_end", kHoleEnd},
        {"pci_mmio", kPciMmio},
        {"pci_mmio_end", kPciMmioEnd},
        {"pci_io", kPciIo},
        {"ecam", kEcam},
        {"ecam_size", pci::HostBridge::kEcamSize},
        {"ioapic", kIoapic},
        {"lapic", kLapic},
        {"acpi_pm_event", kAcpiPm + devices::AcpiPm::kEventOffset},
        {"acpi_pm_control", kAcpiPm + devices::AcpiPm::kControlOffset},
        {"acpi_pm_timer", kAcpiPm + devices::AcpiPm::kTimerOffset},
        {"acpi_gpe0", kAcpiPm + devices::AcpiPm::kGpeOffset},
        {"acpi_sleep_type_s5", devices::AcpiPm::kSleepTypeS5},
        {"sci_gsi", kSciGsi},
        {"reset_port", kResetControl},
        {"reset_value", kResetValue},
        {"debug_exit", kDebugExit},
        {"debug_console", kDebugConsole},
    };
}

void add_pc_memory(GuestMemory& memory, u64 size) {
    u64 low = std::min(size, PcLayout::kHoleStart);
    memory.add(Gpa(0), low, "ram");
    if (size > low) memory.add(Gpa(PcLayout::kHoleEnd), size - low, "ram-high");
}

Pc::Pc(const PcConfig& config, Clock& clock, Bus& pio, Bus& mmio, Log& log,
       std::function<void(StopInfo)> end)
    : ioapic_(std::make_shared<irqchip::Ioapic>(apic_bus_)),
      pic_(std::make_shared<irqchip::Pic>([this](bool level) { apic_bus_.set_lint0(level); })),
      router_(pic_.get(), ioapic_.get()) {
    if (config.serial_ports > PcLayout::kMaxSerial) {
        throw ConfigError("serial_ports", "a PC has at most 4 serial ports, not " +
                                              std::to_string(config.serial_ports));
    }
    auto line = [this](unsigned gsi) -> IrqLine& {
        lines_.push_back(router_.line(gsi));
        return *lines_.back();
    };

    for (u32 cpu = 0; cpu < config.cpus; ++cpu) {
        irqchip::Lapic::Config lapic;
        lapic.id = cpu;
        lapic.bsp = cpu == 0;
        lapic.x2apic = config.x2apic;
        lapic.tsc_deadline = config.tsc_deadline;
        lapic.physical_bits = config.physical_bits;
        lapics_.push_back(std::make_unique<irqchip::Lapic>(lapic, clock, apic_bus_, &log));
        lapics_.back()->set_ext_int_source(pic_.get());
    }
    apic_bus_.attach(*ioapic_);
    claim(mmio, PcLayout::kIoapic, kPageSize, ioapic_);
    claim(pio, 0x20, 2, pic_);
    claim(pio, 0xa0, 2, pic_, 2);
    claim(pio, 0x4d0, 2, pic_, 4);

    pit_ = std::make_shared<irqchip::Pit>(clock, line(0));
    claim(pio, 0x40, 4, pit_);
    claim(pio, 0x61, 1, pit_, 4);

    for (unsigned port = 0; port < config.serial_ports; ++port) {
        consoles_.push_back(std::make_shared<SerialConsole>());
        auto serial = std::make_shared<devices::Serial>(clock, line(PcLayout::kSerialIrq[port]),
                                                        consoles_.back().get());
        consoles_.back()->attach(*serial);
        claim(pio, PcLayout::kSerial[port], 8, serial);
        serial_.push_back(std::move(serial));
    }
    debug_output_ = std::make_shared<SerialConsole>();
    debug_console_ = std::make_shared<devices::DebugConsole>(clock, debug_output_.get());
    claim(pio, PcLayout::kDebugConsole, 1, debug_console_);
    claim(pio, PcLayout::kDebugExit, 4, std::make_shared<devices::DebugExit>([end](u32 status) {
              end({StopReason::kDebugExit, status, "", 0});
          }));

    acpi_ = std::make_shared<devices::AcpiPm>(clock, line(PcLayout::kSciGsi),
                                              [end] { end({StopReason::kPowerOff, 0, "", 0}); });
    claim(pio, PcLayout::kAcpiPm, devices::AcpiPm::kPorts, acpi_);

    reset_control_ = std::make_shared<devices::ResetControl>(
        [end] { end({StopReason::kReset, 0, "the guest wrote to port 0xcf9", 0}); });
    port92_ = std::make_shared<devices::SystemControlA>(
        [](bool) {},  // A20 is always open: see docs/quirks.md
        [end] { end({StopReason::kReset, 0, "the guest wrote to port 0x92", 0}); });
    claim(pio, 0x92, 1, port92_);

    host_bridge_ = std::make_unique<pci::HostBridge>(pio, mmio);
    config_ports_ = std::make_shared<pci::ConfigPorts>(*host_bridge_, reset_control_);
    claim(pio, PcLayout::kPciConfig, 8, config_ports_);
    claim(mmio, PcLayout::kEcam, pci::HostBridge::kEcamSize,
          std::make_shared<pci::Ecam>(*host_bridge_));
    for (unsigned pin = 0; pin < PcLayout::kPciIrqs.size(); ++pin) {
        router_.route_pci(16 + pin, PcLayout::kPciIrqs[pin]);
    }
}

void Pc::claim(Bus& bus, u64 start, u64 size, std::shared_ptr<Device> device, u64 base) {
    bus.attach(start, size, std::move(device), base);
    claims_.emplace_back(&bus, start);
}

Pc::~Pc() {
    // The buses live longer and share the chips, which must not outlive what they are wired to.
    for (auto& [bus, start] : claims_) bus->detach(start);
    for (auto& [bus, start] : claims_) bus->release_detached();
    for (auto& [bus, start] : claims_) bus->release_detached();
    for (auto& console : consoles_) console->detach();
    for (auto& lapic : lapics_) lapic->disconnect();
}

void Pc::finish_wiring() {
    if (wired_) return;
    wired_ = true;
    lapics_[0]->set_virtual_wire();
    host_bridge_->assign(PcLayout::kPciIo, PcLayout::kPciMmio, PcLayout::kPciMmioEnd,
                         PcLayout::kPciIrqs);
}

void Pc::flush() {
    for (auto& serial : serial_) serial->flush();
    debug_console_->flush();
}

std::vector<Pc::Part> Pc::parts() {
    std::vector<Part> parts;
    auto add = [&parts](std::string name, auto* chip) {
        const Device* device = nullptr;
        if constexpr (std::is_base_of_v<Device, std::remove_pointer_t<decltype(chip)>>) {
            device = chip;
        }
        parts.push_back({std::move(name), device, [chip] { return chip->save(); },
                         [chip](std::span<const u8> state) { chip->restore(state); }});
    };
    for (auto& lapic : lapics_) add("lapic" + std::to_string(lapic->id()), lapic.get());
    add("ioapic", ioapic_.get());
    add("pic", pic_.get());
    add("pit", pit_.get());
    for (unsigned port = 0; port < serial_.size(); ++port) {
        add("serial" + std::to_string(port), serial_[port].get());
    }
    add("acpi-pm", acpi_.get());
    add("reset-control", reset_control_.get());
    add("port92", port92_.get());
    add("pci-config-ports", config_ports_.get());
    add("pci", host_bridge_.get());
    return parts;
}

}  // namespace polyvisor
