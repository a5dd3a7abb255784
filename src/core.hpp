// What all Python objects of one machine share: the machine, the devices and timers that are
// written in Python, and the first exception that came out of one of them.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "machine/machine.hpp"

namespace polyvisor::python {

class PyDevice;
class PyTimer;
class PyVirtioDevice;

/// Where in which device something happened.
struct Access {
    const std::string& device;
    const char* kind;  ///< the method: "read", "write", "serve"...; or "timer"
    u64 offset = 0;
    u64 size = 0;
};

class Core {
  public:
    explicit Core(MachineConfig config);
    ~Core();
    Core(const Core&) = delete;
    Core& operator=(const Core&) = delete;

    Machine& machine() { return *machine_; }
    /// The one trampoline of a Python object, made when it is first attached.
    std::shared_ptr<PyDevice> device(const py::object& object);
    void attached(Bus& bus, u64 start) { claims_.emplace_back(&bus, start); }
    void detached(Bus& bus, u64 start);
    void plugged(std::weak_ptr<PyVirtioDevice> device) { virtio_.push_back(std::move(device)); }
    /// Lets go of all Python objects, which may in turn hold this machine. It must have ended.
    void release();

    /// Takes the pending Python exception, remembers it if it is the first, and ends the machine.
    void fail(const Access& access);
    /// The exception; it stays the first.
    py::object exception() const { return exception_; }
    std::vector<std::string> log() const;

  private:
    friend class PyTimer;
    static constexpr std::size_t kLogLines = 1000;

    mutable std::mutex log_mutex_;
    std::vector<std::string> log_;
    py::object exception_ = py::none();  // the GIL guards it and what follows
    std::map<PyObject*, std::shared_ptr<PyDevice>> devices_;
    std::vector<std::pair<Bus*, u64>> claims_;
    std::set<PyTimer*> timers_;
    std::vector<std::weak_ptr<PyVirtioDevice>> virtio_;
    std::unique_ptr<Machine> machine_;
};

}  // namespace polyvisor::python
