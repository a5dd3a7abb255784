// MSI-X (PCI Local Bus 3.0, 6.8.2): a table of (address, data, mask) and pending bits in a BAR, and
// the capability that finds them.
//
//     msix_ = std::make_shared<Msix>(msi_sink, 4);
//     add_bar(1, BarKind::kMemory32, msix_->bar_size(), msix_);
//     msix_capability_ = add_capability(kCapMsix, msix_->capability(1), Msix::kCapabilityWritable);
//     ... config_written(): msix_->set_control(space().get16(msix_capability_ + 2));
//     ... msix_->notify(vector);
#pragma once

#include <array>
#include <mutex>
#include <vector>

#include "bus/device.hpp"

namespace polyvisor::pci {

inline constexpr u8 kCapMsix = 0x11, kCapVendor = 0x09;

class Msix final : public Device {
  public:
    static constexpr u16 kEnable = 0x8000, kFunctionMask = 0x4000;
    static constexpr unsigned kMaxVectors = 2048;
    static constexpr std::array<u8, 10> kCapabilityWritable{0x00, 0xc0};

    struct Entry {
        u64 address = 0;
        u32 data = 0;
        u32 control = 1;  ///< bit 0: masked
    };

    /// Throws ConfigError when `vectors` is not 1..2048. `sink` outlives it.
    Msix(MsiSink& sink, unsigned vectors);

    std::string_view name() const override { return "msix"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;

    unsigned vectors() const { return static_cast<unsigned>(entries_.size()); }
    u64 pba_offset() const;
    /// Bytes of BAR that hold table and PBA (a power of two, >= 4096).
    u64 bar_size() const;
    /// The 10 bytes after id and next: message control, table and PBA in `bar`.
    std::array<u8, 10> capability(u8 bar) const;
    /// Message control as the guest wrote it.
    void set_control(u16 control);
    bool enabled() const;
    /// Sends vector's message, or remembers it while masked. Ignored when disabled or out of range.
    void notify(unsigned vector);

  private:
    bool masked(unsigned vector) const;
    void flush(std::unique_lock<std::mutex>& lock);

    MsiSink& sink_;
    mutable std::mutex mutex_;  // released before the sink is called
    std::vector<Entry> entries_;
    std::vector<u64> pending_;
    u16 control_ = 0;
};

}  // namespace polyvisor::pci
