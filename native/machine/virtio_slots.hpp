// The virtio devices of a machine, and where each is plugged: a PCI function, or a block of
// registers in memory (virtio-mmio) that ACPI and the kernel's command line tell of.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "virtio/device.hpp"

namespace polyvisor {

class Machine;

enum class VirtioTransport : u8 { kPci, kMmio };
/// "pci" or "mmio". Throws ConfigError.
VirtioTransport parse_virtio_transport(const std::string& name);

class VirtioSlots {
  public:
    static constexpr unsigned kMmioSlots = 32;

    explicit VirtioSlots(Machine& machine) : machine_(machine) {}
    ~VirtioSlots();
    VirtioSlots(const VirtioSlots&) = delete;
    VirtioSlots& operator=(const VirtioSlots&) = delete;

    struct Place {
        std::shared_ptr<virtio::Device> device;
        VirtioTransport transport;
        unsigned slot;  ///< PCI device number, or the number of the register block
        u64 gpa;        ///< of the register block; 0 for PCI
        u32 gsi;        ///< of the register block; 0 for PCI
    };
    /// Before the machine starts. Throws StateMismatch afterwards, ConfigError when no place is
    /// free.
    Place plug(std::shared_ptr<virtio::Device> device, VirtioTransport transport);
    const std::vector<Place>& places() const { return places_; }

    /// See virtio::Device::pause().
    void pause();
    void resume();

  private:
    Machine& machine_;
    std::vector<Place> places_;
};

}  // namespace polyvisor
