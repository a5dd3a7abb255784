// Virtio devices that are written in Python (polyvisor.virtio.base tells how to write one).
//
// A handler is called with its queue held: the queue's mutex first, then the GIL. So whoever has
// the GIL and wants a queue gives the GIL up before it waits, and so it does for everything that
// may reach a transport or the chips.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "core.hpp"
#include "ring.hpp"
#include "virtio/device.hpp"

namespace polyvisor::python {

class PyRing;

class PyVirtioDevice final : public virtio::Device {
  public:
    /// What becomes of a Python exception, which is pending: called with the GIL, on any thread.
    using Failed = std::function<void(const Access&)>;

    /// Reads the object's attributes and looks its methods up, once. Throws ConfigError. `owner` is
    /// what has the environment, the memory and (by and by) this device.
    PyVirtioDevice(const virtio::Environment& environment, std::shared_ptr<GuestMemory> memory,
                   std::weak_ptr<void> owner, const py::object& object, Failed failed);
    ~PyVirtioDevice() override;
    /// Stops the Python object and lets go of it; it is called no more. With the GIL.
    void release();

    /// polyvisor._ring.Queue. Throws ConfigError.
    py::object queue(unsigned index) const;
    const std::shared_ptr<GuestMemory>& guest_memory() const { return guest_memory_; }

    using virtio::Device::fail;
    using virtio::Device::set_config;

  private:
    enum Method {
        kServe,
        kAccept,
        kStart,
        kStop,
        kStopQueue,
        kQuiesce,
        kUnquiesce,
        kConfigWritten,
        kSave,
        kRestore,
        kMethods
    };

    void serve(unsigned index, virtio::Queue& queue) override;
    bool accept(u64 features) override;
    void start(u64 features) override;
    void stop() override;
    void stop_queue(unsigned index) override;
    void quiesce() override;
    void unquiesce() override;
    void config_written(u32 offset, u32 size) override;
    bool config_writable(u32 offset) const override;
    std::vector<u8> save_device() const override;
    void restore_device(std::span<const u8> state) override;

    template <class... Arguments>
    bool call(Method method, Arguments... arguments);
    void let_go();
    void raised(const char* kind, u64 where = 0) const;

    Failed failed_;
    std::shared_ptr<GuestMemory> guest_memory_;
    py::object object_;
    PyObject* methods_[kMethods] = {};  // bound; nullptr for none. The GIL guards them.
    std::vector<std::pair<u32, u32>> writable_;
    std::vector<std::shared_ptr<PyRing>> rings_;
    std::vector<py::object> queues_;
};

/// What a device's Python object knows of its native side, wherever that is plugged.
class VirtioPort {
  public:
    VirtioPort(std::weak_ptr<void> owner, std::weak_ptr<PyVirtioDevice> device)
        : owner_(std::move(owner)), device_(std::move(device)) {}
    /// Calls with the device. Throws StateMismatch when what it was plugged into is closed.
    template <class Step>
    auto use(Step step) const {
        auto owner = owner_.lock();
        auto device = device_.lock();
        if (!owner || !device) throw StateMismatch("the machine of this device is closed");
        return step(*device);
    }

  private:
    std::weak_ptr<void> owner_;
    std::weak_ptr<PyVirtioDevice> device_;
};

/// The calling thread holds queues of a device, so it must not wait for what may want them.
bool holds_queues();

/// Makes the native side of `object` and tells it of its port. Throws ConfigError.
std::shared_ptr<PyVirtioDevice> make_virtio(const virtio::Environment& environment,
                                            std::shared_ptr<GuestMemory> memory,
                                            const std::shared_ptr<void>& owner,
                                            const py::object& object,
                                            PyVirtioDevice::Failed failed);

}  // namespace polyvisor::python
