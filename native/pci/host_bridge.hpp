// The root of PCI bus 0: which function answers at which device number, and the two ways to its
// configuration space, the ports 0xcf8/0xcfc and the memory-mapped ECAM.
//
// The bridge itself is device 0, a class 0600 function that is no particular chipset's.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "bus/bus.hpp"
#include "pci/function.hpp"

namespace polyvisor::pci {

class HostBridge {
  public:
    static constexpr unsigned kSlots = 32;
    static constexpr u64 kEcamSize = 1 << 20;  ///< bus 0: 32 devices x 8 functions x 4 KiB
    static constexpr Identity kIdentity{0x1b36, 0x0008, 0x060000, 0, 0x1af4, 0x1100};

    /// BARs are attached to these buses, which outlive the bridge.
    HostBridge(Bus& pio, Bus& mmio);
    ~HostBridge();

    /// Puts `function` at device `slot` (1..31; -1: the first free one). Returns the slot. Throws
    /// ConfigError when it is taken or none is free. Also while the machine runs.
    unsigned plug(std::shared_ptr<Function> function, int slot = -1);
    std::shared_ptr<Function> function(unsigned slot) const;
    /// The slot that plug() would choose; kSlots when all are taken.
    unsigned free_slot() const;
    /// Which GSI the function at `slot` uses for `pin` (1..4): 16 + the usual swizzle.
    static constexpr unsigned gsi(unsigned slot, u8 pin) { return 16 + (slot + pin - 1) % 4; }

    u32 config_read(unsigned bus, unsigned slot, unsigned function, u16 offset, unsigned size);
    void config_write(unsigned bus, unsigned slot, unsigned function, u16 offset, u32 value,
                      unsigned size);

    /// What firmware does on a PC without any: places every BAR (ports from `pio_base`, memory in
    /// [mmio_base, mmio_end)), turns decoding on and writes the interrupt line registers. Throws
    /// ConfigError when a BAR does not fit.
    void assign(u64 pio_base, u64 mmio_base, u64 mmio_end, const std::array<u8, 4>& pic_irqs);

    void reset();
    std::vector<u8> save() const;
    void restore(std::span<const u8> state);

  private:
    Bus& pio_;
    Bus& mmio_;
    mutable std::mutex mutex_;  // guards slots_; a Function's is taken after it was released
    std::array<std::shared_ptr<Function>, kSlots> slots_;
};

/// Configuration mechanism #1: attach 8 ports at 0xcf8. Byte accesses to 0xcf9 go to
/// `reset_control`.
class ConfigPorts final : public Device {
  public:
    explicit ConfigPorts(HostBridge& bridge, std::shared_ptr<Device> reset_control = {});
    std::string_view name() const override { return "pci-config-ports"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    /// The address may wait for the access to the data port; a reset not for long.
    std::vector<PostedRange> posted() const override { return {{0, 4, kResetDelay}}; }
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;

  private:
    // ns. Linux gives the reset control 50 us and then tries other ways, none of which ends worse.
    static constexpr u64 kResetDelay = 2'000'000;

    HostBridge& bridge_;
    std::shared_ptr<Device> reset_control_;
    std::atomic<u32> address_{0};
};

/// The memory-mapped configuration space: attach kEcamSize bytes (MCFG names the address, bus 0
/// only).
class Ecam final : public Device {
  public:
    explicit Ecam(HostBridge& bridge) : bridge_(bridge) {}
    std::string_view name() const override { return "pci-ecam"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;

  private:
    HostBridge& bridge_;
};

}  // namespace polyvisor::pci
