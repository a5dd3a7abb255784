// virtio over PCI (virtio 1.2, 4.1), modern devices only: the register blocks in BAR 0, which
// vendor capabilities find, MSI-X in BAR 1, and shared memory in BAR 2 where a device has some.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "pci/function.hpp"
#include "pci/msix.hpp"
#include "virtio/device.hpp"
#include "virtio/doorbells.hpp"

namespace polyvisor::virtio {

class PciTransport final : public pci::Function, private DriverSignals {
  public:
    static constexpr u16 kVendor = 0x1af4, kFirstDevice = 0x1040;
    /// Offsets in BAR 0. A page each, so that a notification can be mapped apart.
    static constexpr u32 kCommon = 0x0000, kIsr = 0x1000, kConfig = 0x2000, kNotify = 0x3000;
    static constexpr u32 kBlock = 0x1000, kCommonBytes = 0x3c;
    static constexpr u32 kNotifyStep = 4;  ///< queue n is notified at kNotify + 4 n
    static constexpr u16 kNoVector = 0xffff;

    /// One MSI-X vector for each queue, and one for the configuration. `msi` outlives it; `line`
    /// is the wire of INTA. Throws ConfigError.
    PciTransport(std::shared_ptr<Device> device, MsiSink& msi, EventLoop& loop);
    ~PciTransport() override;

    const std::shared_ptr<Device>& device() const { return device_; }

  protected:
    void config_about_to_read(u16 offset, unsigned size) override;
    void config_written(u16 offset, unsigned size) override;
    void reset_device() override;
    std::vector<u8> save_device() const override;
    void restore_device(std::span<const u8> state) override;

  private:
    class Registers;
    class SharedMemory;
    struct Selected {
        u32 device_features = 0, driver_features = 0;  // which 32 bits
        u16 queue = 0;
        u16 padding = 0;
    };

    void queue_used(unsigned queue) override;
    void config_changed() override;
    void interrupt(u16 vector, u8 isr);
    u8 take_isr();

    void add_registers();
    void add_shared_memory();
    u16 add_capability(u8 type, u8 bar, u32 offset, u32 length, std::span<const u8> more = {},
                       u8 id = 0);
    void read_common(u32 offset, std::span<u8> data);
    void write_common(u32 offset, u32 value, unsigned size);
    u64 common(u32 offset);
    void set_queue_address(u32 offset, u32 value);
    void read_registers(u64 offset, std::span<u8> data);
    void write_registers(u64 offset, std::span<const u8> data);
    u16 valid_vector(u32 value) const;

    std::shared_ptr<Device> device_;
    std::shared_ptr<pci::Msix> msix_;
    u16 msix_capability_ = 0, window_capability_ = 0;
    Doorbells doorbells_;
    mutable std::mutex select_mutex_;  // a leaf
    Selected selected_;
    std::atomic<u8> isr_{0};
    std::atomic<u16> config_vector_{kNoVector};
    std::vector<std::atomic<u16>> queue_vectors_;
};

}  // namespace polyvisor::virtio
