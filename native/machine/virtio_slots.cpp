#include "machine/virtio_slots.hpp"

#include "base/error.hpp"
#include "machine/machine.hpp"
#include "virtio/transport_mmio.hpp"
#include "virtio/transport_pci.hpp"

namespace polyvisor {

VirtioTransport parse_virtio_transport(const std::string& name) {
    if (name == "pci") return VirtioTransport::kPci;
    if (name == "mmio") return VirtioTransport::kMmio;
    throw ConfigError("transport",
                      "there is no virtio transport '" + name + "'; choose one of pci, mmio");
}

// A transport interrupts chips that live no longer than this. Those on PCI go with the board; the
// others would stay with the bus, which lives longer.
VirtioSlots::~VirtioSlots() {
    for (Place& place : places_) {
        place.device->reset();
        place.device->connect(nullptr);
        if (place.transport == VirtioTransport::kMmio) machine_.mmio().detach(place.gpa);
    }
    machine_.mmio().release_detached();
}

VirtioSlots::Place VirtioSlots::plug(std::shared_ptr<virtio::Device> device,
                                     VirtioTransport transport) {
    if (machine_.phase() != RunControl::Phase::kCreated) {
        throw StateMismatch("device '" + device->name() + "' has to be added to machine '" +
                            machine_.config().name + "' before that starts");
    }
    Place place{device, transport, 0, 0, 0};
    device->pause();  // until the machine runs
    if (transport == VirtioTransport::kPci) {
        auto function =
            std::make_shared<virtio::PciTransport>(device, machine_.pc().msi(), machine_.loop());
        constexpr u8 kPin = 1;
        pci::HostBridge& bridge = machine_.pc().pci();
        const unsigned gsi = pci::HostBridge::gsi(bridge.free_slot(), kPin);
        function->set_interrupt(kPin, machine_.pc().irqs().line(gsi));
        place.slot = bridge.plug(function);
    } else {
        while (place.slot < kMmioSlots &&
               machine_.mmio().find(PcLayout::kVirtioMmio +
                                    place.slot * virtio::MmioTransport::kSize) != nullptr) {
            ++place.slot;
        }
        if (place.slot == kMmioSlots) {
            throw ConfigError(
                "transport", "device '" + device->name() + "' finds no free place: there are " +
                                 std::to_string(kMmioSlots) + " for virtio-mmio and all are taken");
        }
        place.gpa = PcLayout::kVirtioMmio + place.slot * virtio::MmioTransport::kSize;
        place.gsi = PcLayout::kVirtioMmioGsi + place.slot % PcLayout::kVirtioMmioGsis;
        machine_.mmio().attach(place.gpa, virtio::MmioTransport::kSize,
                               std::make_shared<virtio::MmioTransport>(
                                   device, machine_.pc().irqs().line(place.gsi), machine_.loop()));
    }
    places_.push_back(place);
    return place;
}

void VirtioSlots::pause() {
    for (Place& place : places_) place.device->pause();
}

void VirtioSlots::resume() {
    for (Place& place : places_) place.device->resume();
}

}  // namespace polyvisor
