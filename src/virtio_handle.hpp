// Python's handles on virtio devices. The machine owns the device; a handle outlives both, and says
// so when it is used then.
#pragma once

#include <memory>
#include <string>

#include "base/error.hpp"
#include "handles.hpp"
#include "machine/virtio_slots.hpp"

namespace polyvisor::python {

class VirtioHandle {
  public:
    VirtioHandle(const std::shared_ptr<Core>& core, const VirtioSlots::Place& place)
        : core_(core),
          device_(place.device),
          name_(place.device->name()),
          transport_(place.transport),
          slot_(place.slot),
          gpa_(place.gpa),
          gsi_(place.gsi) {}

    /// Both keep alive what they give. Throw StateMismatch when the machine is closed.
    std::shared_ptr<Core> core() const { return lock(core_); }
    std::shared_ptr<virtio::Device> device() const { return lock(device_); }
    const std::string& name() const { return name_; }
    VirtioTransport transport() const { return transport_; }
    unsigned slot() const { return slot_; }
    u64 gpa() const { return gpa_; }
    u32 gsi() const { return gsi_; }

  private:
    template <class T>
    std::shared_ptr<T> lock(const std::weak_ptr<T>& owned) const {
        auto locked = owned.lock();
        if (!locked) throw StateMismatch("the machine of this " + name_ + " is closed");
        return locked;
    }

    std::weak_ptr<Core> core_;
    std::weak_ptr<virtio::Device> device_;
    std::string name_;
    VirtioTransport transport_;
    unsigned slot_;
    u64 gpa_;
    u32 gsi_;
};

/// A handle on a device of class T: the base of what a bind_*.cpp offers of it.
///
///     py::class_<Virtio<virtio::Blk>, VirtioHandle>(module, "VirtioBlk")
///         .def(py::init([](const PyMachine& machine, ..., const std::string& transport, bool
///         packed) {
///             auto core = machine.core();
///             auto device = std::make_shared<virtio::Blk>(environment(*core), config);
///             return plug<virtio::Blk>(core, device, transport, packed);
///         }), ...)
///         .def_property_readonly("capacity", [](const Virtio<virtio::Blk>& self) {
///             return self.use([](virtio::Blk& blk) { return blk.capacity(); });
///         });
template <class T>
class Virtio : public VirtioHandle {
  public:
    using VirtioHandle::VirtioHandle;
    /// Calls with the device, without the GIL.
    template <class Step>
    auto use(Step step) const {
        auto core = this->core();
        auto device = this->device();
        pybind11::gil_scoped_release release;
        return step(static_cast<T&>(*device));
    }
};

inline virtio::Environment environment(Core& core) {
    return core.machine().virtio_environment();
}

template <class T>
std::unique_ptr<Virtio<T>> plug(const std::shared_ptr<Core>& core, std::shared_ptr<T> device,
                                const std::string& transport, bool packed) {
    device->offer_packed(packed);
    auto place =
        core->machine().virtio().plug(std::move(device), parse_virtio_transport(transport));
    return std::make_unique<Virtio<T>>(core, place);
}

}  // namespace polyvisor::python
