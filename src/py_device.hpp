// Devices and timers that are written in Python.
#pragma once

#include <mutex>

#include "base/fd.hpp"
#include "bus/device.hpp"
#include "core.hpp"

namespace polyvisor::python {

/// Stands on the bus for a Python object with read(offset, size) -> int and/or
/// write(offset, size, value), called on the vCPU's thread. Accesses to one object take turns. An
/// exception ends the machine; the guest's read gives ones.
class PyDevice final : public Device {
  public:
    /// Looks the methods up once. Throws ConfigError when the object has neither.
    PyDevice(Core& core, const py::object& object);
    ~PyDevice() override;

    std::string_view name() const override { return name_; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    void reset() override;
    std::vector<u8> save() const override;
    void restore(std::span<const u8> state) override;
    std::vector<Doorbell> doorbells() const override { return bells_; }

  private:
    void take_doorbells();
    bool ring(u64 offset, std::span<const u8> data) const;
    template <class Body>
    void enter(const Access& access, Body body) const;

    Core& core_;
    std::string name_;
    py::object object_;
    PyObject* read_ = nullptr;  // bound methods, nullptr for none
    PyObject* write_ = nullptr;
    std::vector<Doorbell> bells_;
    std::vector<OwnedFd> bell_fds_;       // the device may close its own
    mutable std::recursive_mutex mutex_;  // before the GIL
};

/// A Timer whose callback is Python's.
class PyTimer {
  public:
    PyTimer(std::shared_ptr<Core> core, py::object callback);
    ~PyTimer();
    Timer& timer();
    /// The machine is being closed: never calls back again.
    void release();

  private:
    void fire();

    std::shared_ptr<Core> core_;
    py::object callback_;
    std::unique_ptr<Timer> timer_;
};

}  // namespace polyvisor::python
