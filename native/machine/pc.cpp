#include "machine/pc.hpp"

#include <algorithm>
#include <atomic>

#include "base/error.hpp"
#include "bus/pod_state.hpp"
#include "virtio/transport_mmio.hpp"

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
        {"virtio_mmio", kVirtioMmio},
        {"virtio_mmio_size", virtio::MmioTransport::kSize},
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

void add_pc_memory(GuestMemory& memory, u64 size, HugePages huge) {
    u64 low = std::min(size, PcLayout::kHoleStart);
    memory.add(Gpa(0), low, "ram", false, huge);
    if (size > low) memory.add(Gpa(PcLayout::kHoleEnd), size - low, "ram-high", false, huge);
}

// The 8259 pair's INTR output where no local APIC of ours passes it on: straight to CPU 0, whose
// in-kernel local APIC decides whether its LINT0 lets it through.
class Pc::IntrWire final : public LocalInterrupts {
  public:
    explicit IntrWire(irqchip::Pic& pic) : pic_(pic) {}
    /// With the 8259s' mutex held.
    void set(bool level) {
        level_.store(level, std::memory_order_release);
        CpuSignals* cpu = cpu_.load(std::memory_order_acquire);
        if (level && cpu != nullptr) cpu->interrupt();
    }
    void connect(CpuSignals* cpu) {
        cpu_.store(cpu, std::memory_order_release);
        if (cpu != nullptr && pending()) cpu->interrupt();
    }

    bool pending() const override { return level_.load(std::memory_order_acquire); }
    int acknowledge() override { return pic_.acknowledge(); }
    u8 cr8() const override { return 0; }
    void set_cr8(u8) override {}
    bool read_msr(u32, u64&) override { return false; }
    bool write_msr(u32, u64) override { return false; }
    u64 mmio_base() const override { return ~u64{0}; }
    void mmio_read(u32, std::span<u8> data) override { std::fill(data.begin(), data.end(), 0xff); }
    void mmio_write(u32, std::span<const u8>) override {}
    void reset(bool) override {}

  private:
    irqchip::Pic& pic_;
    std::atomic<bool> level_{false};
    std::atomic<CpuSignals*> cpu_{nullptr};
};

namespace {

using Kind = InterruptChips::Kind;

bool is_ours(const PcConfig& config, Kind kind) {
    return config.chips == nullptr || !config.chips->has(kind);
}

}  // namespace

Pc::Pc(const PcConfig& config, Clock& clock, Bus& pio, Bus& mmio, Log& log,
       std::function<void(StopInfo)> end)
    : cpus_(config.cpus),
      chips_(config.chips),
      ioapic_(is_ours(config, Kind::kIoapic) ? std::make_shared<irqchip::Ioapic>(apic_bus_)
                                             : nullptr),
      pic_(is_ours(config, Kind::kPic) ? std::make_shared<irqchip::Pic>([this](bool level) {
          if (intr_ != nullptr) intr_->set(level);
          apic_bus_.set_lint0(level);
      })
                                       : nullptr),
      router_(pic_.get(), ioapic_.get(), ioapic_ == nullptr ? config.chips : nullptr) {
    if (config.serial_ports > PcLayout::kMaxSerial) {
        throw ConfigError("serial_ports", "a PC has at most 4 serial ports, not " +
                                              std::to_string(config.serial_ports));
    }
    build_chips(config, clock, pio, mmio, log);

    for (unsigned port = 0; port < config.serial_ports; ++port) {
        consoles_.push_back(std::make_shared<devices::HostConsole>());
        auto serial = std::make_shared<devices::Serial>(clock, line(PcLayout::kSerialIrq[port]),
                                                        consoles_.back().get());
        consoles_.back()->attach(*serial);
        claim(pio, PcLayout::kSerial[port], 8, serial);
        serial_.push_back(std::move(serial));
    }
    debug_output_ = std::make_shared<devices::HostConsole>();
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

// Interrupt chips and PIT, as far as they are ours.
void Pc::build_chips(const PcConfig& config, Clock& clock, Bus& pio, Bus& mmio, Log& log) {
    if (chips_ != nullptr) apic_bus_.set_engine(*chips_);
    for (u32 cpu = 0; is_ours(config, Kind::kLapic) && cpu < config.cpus; ++cpu) {
        irqchip::Lapic::Config lapic;
        lapic.id = cpu;
        lapic.bsp = cpu == 0;
        lapic.x2apic = config.x2apic;
        lapic.tsc_deadline = config.tsc_deadline;
        lapic.physical_bits = config.physical_bits;
        lapics_.push_back(std::make_unique<irqchip::Lapic>(lapic, clock, apic_bus_, &log));
        lapics_.back()->set_ext_int_source(pic_.get());
    }
    if (ioapic_ != nullptr) {
        apic_bus_.attach(*ioapic_);
        claim(mmio, PcLayout::kIoapic, kPageSize, ioapic_);
    }
    if (pic_ != nullptr) {
        claim(pio, 0x20, 2, pic_);
        claim(pio, 0xa0, 2, pic_, 2);
        claim(pio, 0x4d0, 2, pic_, 4);
    }
    if (is_ours(config, Kind::kPit)) {
        pit_ = std::make_shared<irqchip::Pit>(clock, line(0));
        claim(pio, 0x40, 4, pit_);
        claim(pio, 0x61, 1, pit_, 4);
    }
    if (chips_ == nullptr || ioapic_ == nullptr) return;
    // Split: the engine has to know what our chips send, and to tell when it was served.
    intr_ = std::make_unique<IntrWire>(*pic_);
    ioapic_->set_observer([this](unsigned pin, const irqchip::ApicMessage* message) {
        irqchip::Msi msi;
        if (message != nullptr) msi = irqchip::to_msi(*message);
        chips_->set_ioapic_pin(pin, msi.address, msi.data, message != nullptr);
    });
    chips_->set_eoi_handler([this](u8 vector) { ioapic_->eoi(vector); });
}

IrqLine& Pc::line(unsigned gsi) {
    lines_.push_back(router_.line(gsi));
    return *lines_.back();
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
    if (intr_ != nullptr) {
        intr_->connect(nullptr);
        ioapic_->set_observer({});
        chips_->set_eoi_handler({});
    }
}

LocalInterrupts* Pc::interrupts(u32 cpu) {
    if (!lapics_.empty()) return lapics_[cpu].get();
    return cpu == 0 ? intr_.get() : nullptr;
}

void Pc::connect(u32 cpu, CpuSignals& signals) {
    if (!lapics_.empty()) {
        lapics_[cpu]->connect(signals);
    } else if (cpu == 0 && intr_ != nullptr) {
        intr_->connect(&signals);
    }
}

// The level of the 8259 pair's output, LINT0 of every local APIC.
bool Pc::intr() const {
    if (pic_ != nullptr) return pic_->output();
    auto state = load_pod<irqchip::Pic::State>(chips_->save(Kind::kPic, 0), "pic");
    return irqchip::Pic::settle(state);
}

// Every one is set, changed or not: KVM's table of APIC ids has those CPUs only that existed when
// it was last computed, and without this, start-up IPIs to the others are lost.
void Pc::wire_engine_lapics() {
    for (u32 cpu = 0; cpu < cpus_; ++cpu) {
        auto state = load_pod<irqchip::Lapic::State>(chips_->save(Kind::kLapic, cpu), "lapic");
        if (cpu == 0) irqchip::Lapic::set_virtual_wire(state);
        chips_->restore(Kind::kLapic, cpu, save_pod(state));
    }
}

void Pc::finish_wiring() {
    if (wired_) return;
    wired_ = true;
    if (lapics_.empty()) {
        wire_engine_lapics();
    } else {
        lapics_[0]->set_virtual_wire();
    }
    host_bridge_->assign(PcLayout::kPciIo, PcLayout::kPciMmio, PcLayout::kPciMmioEnd,
                         PcLayout::kPciIrqs);
}

void Pc::flush() {
    for (auto& serial : serial_) serial->flush();
    debug_console_->flush();
}

// With the level of its LINT0 wire, which an engine's local APIC does not keep.
std::vector<u8> Pc::save_engine_lapic(u32 cpu) const {
    auto state = load_pod<irqchip::Lapic::State>(chips_->save(Kind::kLapic, cpu), "lapic");
    state.lint = intr();
    return save_pod(state);
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
    auto add_engine = [this, &parts](std::string name, Kind kind) {
        parts.push_back(
            {std::move(name), nullptr, [this, kind] { return chips_->save(kind, 0); },
             [this, kind](std::span<const u8> state) { chips_->restore(kind, 0, state); }});
    };
    for (auto& lapic : lapics_) add("lapic" + std::to_string(lapic->id()), lapic.get());
    for (u32 cpu = 0; lapics_.empty() && cpu < cpus_; ++cpu) {
        parts.push_back({"lapic" + std::to_string(cpu), nullptr,
                         [this, cpu] { return save_engine_lapic(cpu); },
                         [this, cpu](std::span<const u8> state) {
                             chips_->restore(Kind::kLapic, cpu, state);
                         }});
    }
    if (ioapic_ != nullptr) {
        add("ioapic", ioapic_.get());
        add("pic", pic_.get());
        add("pit", pit_.get());
    } else {
        add_engine("ioapic", Kind::kIoapic);
        add_engine("pic", Kind::kPic);
        add_engine("pit", Kind::kPit);
    }
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
