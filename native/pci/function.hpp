// A PCI function: configuration space, BARs that follow the guest's writes on the buses, and INTx.
//
// To add a PCI device: derive Function, give the identity, call add_bar() with a Device that serves
// the registers, add_capability()/Msix as needed, and plug it into the HostBridge. The function
// never sees an address: HostBridge attaches its BARs to the buses where the guest puts them.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>

#include "bus/bus.hpp"
#include "bus/device.hpp"
#include "pci/config_space.hpp"

namespace polyvisor::pci {

/// What a function says it is. `class_code` is base, sub-class and interface: 0x060000.
struct Identity {
    u16 vendor = 0;
    u16 device = 0;
    u32 class_code = 0;
    u8 revision = 0;
    u16 subsystem_vendor = 0;
    u16 subsystem = 0;
};

enum class BarKind : u8 { kIo, kMemory32, kMemory64, kMemory64Prefetchable };

class Function {
  public:
    static constexpr unsigned kBars = 6;

    Function(std::string name, const Identity& identity);
    virtual ~Function();
    Function(const Function&) = delete;
    Function& operator=(const Function&) = delete;

    const std::string& name() const { return name_; }

    /// BAR `index` (a 64-bit one takes index+1 too) of `size` bytes, a power of two (>= 4 for
    /// ports,
    /// >= 16 for memory), served by `target`. Before plugging. Throws ConfigError.
    void add_bar(unsigned index, BarKind kind, u64 size, std::shared_ptr<Device> target);
    /// The interrupt pin (1 = INTA .. 4) and its wire. Before plugging.
    void set_interrupt(u8 pin, std::unique_ptr<IrqLine> line);
    u16 add_capability(u8 id, std::span<const u8> body, std::span<const u8> writable = {});

    /// Drives INTx, honouring the command register's disable bit. Any thread, whatever is held but
    /// interrupt chips.
    void set_intx(bool level);

    u32 config_read(u16 offset, unsigned size);
    void config_write(u16 offset, u32 value, unsigned size);
    /// Base address of a BAR and whether it is decoded now.
    struct BarAddress {
        u64 address;
        bool mapped;
    };
    BarAddress bar(unsigned index) const;
    /// Places a BAR as firmware would.
    void set_bar(unsigned index, u64 address);
    u64 bar_size(unsigned index) const { return bars_[index].size; }
    BarKind bar_kind(unsigned index) const { return bars_[index].kind; }
    u16 command() const;
    u8 interrupt_pin() const;

    void reset();
    std::vector<u8> save() const;
    void restore(std::span<const u8> state);

  protected:
    /// After a guest's write to [offset, offset+size) changed the space (capabilities). The
    /// function's mutex is held.
    virtual void config_written(u16 offset, unsigned size) { (void)offset, (void)size; }
    virtual void config_about_to_read(u16 offset, unsigned size) { (void)offset, (void)size; }
    virtual void reset_device() {}
    virtual std::vector<u8> save_device() const { return {}; }
    virtual void restore_device(std::span<const u8> state) { (void)state; }

    ConfigSpace& space() { return space_; }
    const ConfigSpace& space() const { return space_; }
    mutable std::recursive_mutex mutex_;  // before Bus's and the IrqRouter's

  private:
    friend class HostBridge;
    struct Bar {
        u64 size = 0;
        BarKind kind = BarKind::kMemory32;
        std::shared_ptr<Device> target;
        bool mapped = false;
        u64 at = 0;
    };
    void plug(Bus* pio, Bus* mmio);
    void unplug();
    void update_bars();
    void update_intx();
    bool intx() const;
    u64 bar_register(unsigned index) const;

    std::string name_;
    Bus* pio_ = nullptr;
    Bus* mmio_ = nullptr;
    ConfigSpace space_;
    ConfigSpace::State power_on_;
    std::array<Bar, kBars> bars_;
    mutable std::mutex intx_mutex_;  // guards what follows; before the IrqRouter's
    std::unique_ptr<IrqLine> intx_line_;
    bool intx_ = false;
    bool intx_disabled_ = false;
};

}  // namespace polyvisor::pci
