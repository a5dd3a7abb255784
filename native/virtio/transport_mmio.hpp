// virtio over MMIO (virtio 1.2, 4.2), version 2: one block of registers and one level-triggered
// wire for each device.
#pragma once

#include <memory>
#include <mutex>

#include "bus/device.hpp"
#include "virtio/device.hpp"
#include "virtio/doorbells.hpp"

namespace polyvisor::virtio {

class MmioTransport final : public polyvisor::Device, private DriverSignals {
  public:
    static constexpr u32 kSize = 0x1000;
    static constexpr u32 kConfig = 0x100;

    MmioTransport(std::shared_ptr<virtio::Device> device, std::unique_ptr<IrqLine> line,
                  EventLoop& loop);
    ~MmioTransport() override;

    const std::shared_ptr<virtio::Device>& device() const { return device_; }

    std::string_view name() const override { return device_->name(); }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;
    std::vector<Doorbell> doorbells() const override;

  private:
    struct Selected {
        u32 device_features = 0, driver_features = 0;  // which 32 bits
        u32 queue = 0;
        u32 interrupts = 0;  // InterruptStatus
    };

    void queue_used(unsigned queue) override;
    void config_changed() override;
    void interrupt(u32 why);
    void acknowledge(u32 which);
    Selected selected() const;
    u32 read_register(u32 offset);
    void write_register(u32 offset, u32 value);

    std::shared_ptr<virtio::Device> device_;
    std::unique_ptr<IrqLine> line_;
    mutable Doorbells doorbells_;
    mutable std::mutex mutex_;  // of what follows and the line; before interrupt chips'
    Selected selected_;
};

}  // namespace polyvisor::virtio
