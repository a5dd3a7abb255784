// The machine: making it, running it, looking at it. Everything that blocks gives the GIL up.
#include <pybind11/stl.h>

#include "base/error.hpp"
#include "bindings.hpp"
#include "handles.hpp"
#include "machine/snapshot.hpp"
#include "py_device.hpp"
#include "py_virtio.hpp"
#include "virtio_handle.hpp"

namespace polyvisor::python {

namespace {

using devices::HostConsole;
using Phase = RunControl::Phase;

// Serial ports hold no GIL-protected data of Python's: their calls may all let others run.
using Release = py::call_guard<py::gil_scoped_release>;

const char* state(const PyMachine& self) {
    if (self.closed()) return "closed";
    switch (self.core()->machine().phase()) {
        case Phase::kCreated:
            return "created";
        case Phase::kRunning:
            return "running";
        case Phase::kPaused:
            return "paused";
        case Phase::kEnded:
            break;
    }
    return "ended";
}

// Runs `step(machine)` without the GIL; the machine lives meanwhile, whoever closes it.
template <class Step>
auto unlocked(const PyMachine& self, Step step) {
    auto core = self.core();
    if (holds_queues() && !core->machine().on_own_thread()) {
        throw StateMismatch("this thread holds a virtio queue, for which machine '" + self.name() +
                            "' would have to wait; let go of it first");
    }
    py::gil_scoped_release release;
    return step(core->machine());
}

py::object wait(const PyMachine& self, std::optional<double> timeout) {
    if (self.closed()) return py::cast(self.stop_info());
    auto core = self.core();
    bool ended = wait_interruptibly(
        timeout, [&](RunControl::Duration slice) { return core->machine().wait(slice); });
    return ended ? py::cast(core->machine().stop_info()) : py::object(py::none());
}

void step(const PyMachine& self, u32 index, u64 instructions) {
    auto core = self.core();
    // A few milliseconds between looks at signals. Single steps take some microseconds each.
    const u64 chunk = core->machine().engine().caps().instruction_budget ? 2'000'000 : 500;
    while (instructions > 0) {
        u64 now = std::min(instructions, chunk);
        {
            py::gil_scoped_release release;
            core->machine().step(index, now);
        }
        instructions -= now;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (core->machine().phase() == Phase::kEnded) return;
    }
}

void add_device(const PyMachine& self, bool port, u64 start, u64 size, const py::object& object,
                u64 base) {
    auto core = self.core();
    if (size == 0) throw ConfigError("size", "a device needs at least one address");
    Bus& bus = port ? core->machine().pio() : core->machine().mmio();
    bus.attach(start, size, core->device(object), base);
    core->attached(bus, start);
}

void remove_device(const PyMachine& self, bool port, u64 start) {
    auto core = self.core();
    Bus& bus = port ? core->machine().pio() : core->machine().mmio();
    bus.detach(start);
    core->detached(bus, start);
}

py::list ranges(const PyMachine& self) {
    auto core = self.core();
    py::list result;
    for (Bus* bus : {&core->machine().pio(), &core->machine().mmio()}) {
        for (const Bus::Range& range : bus->ranges()) {
            result.append(py::make_tuple(bus->name(), range.start, range.size,
                                         std::string(range.device->name())));
        }
    }
    return result;
}

void bind_serial(py::module_& module) {
    py::class_<HostConsole, std::shared_ptr<HostConsole>>(module, "SerialPort")
        .def_property_readonly("size", &HostConsole::size)
        .def_property_readonly("closed", &HostConsole::closed)
        .def_property_readonly("unsent", &HostConsole::unsent)
        .def(
            "read",
            [](HostConsole& port, u64 offset, u64 limit) {
                std::string bytes;
                u64 next;
                {
                    py::gil_scoped_release release;
                    next = port.read(offset, limit, bytes);
                }
                return py::make_tuple(next, py::bytes(bytes));
            },
            py::arg("offset"), py::arg("limit") = ~u64{0} >> 1)
        .def(
            "wait",
            [](const std::shared_ptr<HostConsole>& self, u64 offset,
               std::optional<double> timeout) {
                auto port = self;
                bool output = false;
                wait_interruptibly(timeout, [&](RunControl::Duration slice) {
                    output = port->wait(offset, slice);
                    return output || port->closed();
                });
                return output;
            },
            py::arg("offset"), py::arg("timeout") = py::none())
        .def(
            "send",
            [](HostConsole& port, const py::object& data) {
                BufferView view(data, false);
                py::gil_scoped_release release;
                port.send(view.bytes());
            },
            py::arg("data"))
        .def("set_flow_control", &HostConsole::set_flow_control, py::arg("on"), Release());
}

}  // namespace

PyMachine::PyMachine(MachineConfig config) : name_(config.name) {
    {
        py::gil_scoped_release release;
        core_ = std::make_shared<Core>(std::move(config));
    }
    Machine& machine = core_->machine();
    engine_ = machine.engine_name();
    for (unsigned i = 0; i < machine.pc().serial_ports(); ++i) {
        consoles_.push_back(machine.pc().console(i));
    }
    debug_console_ = machine.pc().debug_console();
}

PyMachine::~PyMachine() {
    try {
        close();
    } catch (const std::exception&) {
        // A device still has not returned, or this is the collector at work on the machine's own
        // thread: that thread uses the machine, so it must stay. It stops as soon as it can.
        core_->machine().request_end({StopReason::kStopped, 0, "", 0});
        new std::shared_ptr<Core>(core_);
    }
}

std::optional<StopInfo> PyMachine::stop_info() const {
    if (!core_ || forked()) return stop_;
    if (core_->machine().phase() != Phase::kEnded) return std::nullopt;
    return core_->machine().stop_info();
}

std::shared_ptr<Core> PyMachine::core() const {
    if (!core_) throw StateMismatch("machine '" + name_ + "' is closed");
    if (forked()) {
        throw StateMismatch("machine '" + name_ + "' belongs to process " + std::to_string(pid_) +
                            ", from which this one was forked; make a machine of its own here");
    }
    return core_;
}

const std::shared_ptr<devices::HostConsole>& PyMachine::serial(unsigned index) const {
    if (index >= consoles_.size()) {
        throw ConfigError("index", "machine '" + name_ + "' has no serial port " +
                                       std::to_string(index) + ", only " +
                                       std::to_string(consoles_.size()));
    }
    return consoles_[index];
}

py::dict PyMachine::counters() const {
    if (!core_) return counters_;
    py::dict result;
    for (const auto& counter : core()->machine().counters()) {
        result[counter.name.c_str()] = counter.value;
    }
    return result;
}

void PyMachine::close() {
    auto core = core_;
    if (!core) return;
    if (forked()) {
        new std::shared_ptr<Core>(std::move(core_));  // nothing of it may be touched here
        return;
    }
    if (core->machine().on_own_thread()) {
        throw StateMismatch("a device or timer cannot close its own machine; use stop()");
    }
    {
        py::gil_scoped_release release;
        core->machine().stop();
    }
    if (!core_) return;  // another thread was quicker
    counters_ = counters();
    statistics_ = statistics();
    log_ = core->log();
    now_ = core->machine().clock().now();
    stop_ = core->machine().stop_info();
    exception_ = core->exception();
    core_.reset();
    core->release();
    py::gil_scoped_release release;
    core.reset();
}

void bind_machine(py::module_& module) {
    bind_serial(module);

    py::class_<StopInfo>(module, "StopInfo")
        .def_property_readonly("reason", [](const StopInfo& i) { return to_string(i.reason); })
        .def_readonly("status", &StopInfo::status)
        .def_readonly("detail", &StopInfo::detail)
        .def_readonly("cpu", &StopInfo::cpu);

    py::class_<Snapshot, std::shared_ptr<Snapshot>>(module, "Snapshot")
        .def_property_readonly("now", [](const Snapshot& s) { return s.now; })
        .def_property_readonly("memory_bytes", &Snapshot::memory_bytes)
        .def_property_readonly("cpus", [](const Snapshot& s) { return s.cpus; })
        .def_property_readonly("parts", [](const Snapshot& s) {
            py::dict parts;
            for (const auto& part : s.parts) {
                parts[part.name.c_str()] =
                    py::bytes(reinterpret_cast<const char*>(part.state.data()), part.state.size());
            }
            return parts;
        });

    py::class_<PyMachine>(module, "Machine")
        .def(py::init([](u64 memory, u32 cpus, const std::string& engine,
                         const std::string& cpu_model, bool deterministic, u64 tsc_khz,
                         u64 ns_per_1000_instructions, unsigned serial_ports,
                         const std::string& irqchip, const py::dict& cpu_features, bool portable,
                         const std::string& hugepages, u32 dirty_ring, const std::string& name) {
                 MachineConfig config;
                 config.memory = memory;
                 config.cpus = cpus;
                 config.engine = engine;
                 config.cpu_model = cpu_model;
                 config.deterministic = deterministic;
                 config.tsc_khz = tsc_khz;
                 config.ns_per_1000_instructions = ns_per_1000_instructions;
                 config.serial_ports = serial_ports;
                 config.irqchip = irqchip;
                 for (const auto& [feature, on] : cpu_features) {
                     config.cpu_features.emplace_back(py::cast<std::string>(feature),
                                                      py::cast<bool>(on));
                 }
                 config.portable = portable;
                 config.hugepages = hugepages;
                 config.dirty_ring = dirty_ring;
                 config.name = name;
                 return std::make_unique<PyMachine>(std::move(config));
             }),
             py::kw_only(), py::arg("memory"), py::arg("cpus") = 1, py::arg("engine") = "auto",
             py::arg("cpu_model") = "host", py::arg("deterministic") = false,
             py::arg("tsc_khz") = 0, py::arg("ns_per_1000_instructions") = 1000,
             py::arg("serial_ports") = 2, py::arg("irqchip") = "auto",
             py::arg("cpu_features") = py::dict(), py::arg("portable") = false,
             py::arg("hugepages") = "auto", py::arg("dirty_ring") = 0, py::arg("name") = "machine")
        .def_property_readonly("memory",
                               [](const PyMachine& m) { return m.core()->machine().memory(); })
        .def("dirty_log",
             [](const PyMachine& m) { return std::make_unique<PyDirtyLog>(m.core(), m.name()); })
        .def_property_readonly("engine", &PyMachine::engine)
        .def_property_readonly(
            "tsc_khz", [](const PyMachine& m) { return m.core()->machine().clock().tsc_khz(); })
        .def_property_readonly(
            "physical_bits", [](const PyMachine& m) { return m.core()->machine().physical_bits(); })
        .def_property_readonly("state", &state)
        .def_property_readonly("now", &PyMachine::now)
        .def_property_readonly("exception", &PyMachine::exception)
        .def_property_readonly("stop_info", &PyMachine::stop_info)

        .def("start",
             [](const PyMachine& m) { unlocked(m, [](Machine& machine) { machine.start(); }); })
        .def("pause",
             [](const PyMachine& m) { unlocked(m, [](Machine& machine) { machine.pause(); }); })
        .def("resume",
             [](const PyMachine& m) { unlocked(m, [](Machine& machine) { machine.resume(); }); })
        .def("stop",
             [](const PyMachine& m) {
                 if (!m.closed()) unlocked(m, [](Machine& machine) { machine.stop(); });
             })
        .def("close", &PyMachine::close)
        .def("wait", &wait, py::arg("timeout") = py::none())
        .def(
            "request_end",
            [](const PyMachine& m, const std::string& reason, u32 status, std::string detail) {
                StopInfo info{stop_reason(reason), status, std::move(detail), 0};
                auto core = m.core();
                py::gil_scoped_release release;
                core->machine().request_end(std::move(info));
            },
            py::arg("reason"), py::arg("status") = 0, py::arg("detail") = "")

        .def(
            "save_cpu",
            [](const PyMachine& m, u32 index) { return m.core()->machine().vcpu(index).save(); },
            py::arg("index"))
        .def(
            "restore_cpu",
            [](const PyMachine& m, u32 index, const CpuState& state) {
                validate(state);
                m.core()->machine().vcpu(index).restore(state);
            },
            py::arg("index"), py::arg("state"))
        .def(
            "translate",
            [](const PyMachine& m, u32 index, u64 gva) -> std::optional<u64> {
                u64 gpa = 0;
                if (!m.core()->machine().vcpu(index).translate(gva, gpa)) return std::nullopt;
                return gpa;
            },
            py::arg("index"), py::arg("gva"))
        .def("step", &step, py::arg("index"), py::arg("instructions"))
        .def(
            "nmi", [](const PyMachine& m, u32 index) { m.core()->machine().nmi(index); },
            py::arg("index"))

        .def("virtio_places",
             [](const PyMachine& m) {
                 auto core = m.core();
                 std::vector<std::unique_ptr<VirtioHandle>> places;
                 for (const auto& place : core->machine().virtio().places()) {
                     places.push_back(std::make_unique<VirtioHandle>(core, place));
                 }
                 return places;
             })

        .def(
            "add_port_device",
            [](const PyMachine& m, u64 port, u64 size, const py::object& device, u64 base) {
                add_device(m, true, port, size, device, base);
            },
            py::arg("port"), py::arg("size"), py::arg("device"), py::arg("base") = 0)
        .def(
            "add_memory_device",
            [](const PyMachine& m, u64 gpa, u64 size, const py::object& device, u64 base) {
                add_device(m, false, gpa, size, device, base);
            },
            py::arg("gpa"), py::arg("size"), py::arg("device"), py::arg("base") = 0)
        .def(
            "remove_port_device",
            [](const PyMachine& m, u64 port) { remove_device(m, true, port); }, py::arg("port"))
        .def(
            "remove_memory_device",
            [](const PyMachine& m, u64 gpa) { remove_device(m, false, gpa); }, py::arg("gpa"))
        .def(
            "irq",
            [](const PyMachine& m, unsigned gsi) {
                return std::make_unique<PyIrqLine>(m.core(), gsi);
            },
            py::arg("gsi"))
        .def(
            "timer",
            [](const PyMachine& m, const py::object& callback) {
                return std::make_unique<PyTimer>(m.core(), callback);
            },
            py::arg("callback"))
        .def("power_button",
             [](const PyMachine& m) {
                 unlocked(m, [](Machine& machine) { machine.pc().acpi().press_power_button(); });
             })

        .def("snapshot",
             [](const PyMachine& m) {
                 return unlocked(m, [](Machine& machine) {
                     return std::make_shared<Snapshot>(take_snapshot(machine));
                 });
             })
        .def(
            "restore",
            [](const PyMachine& m, const std::shared_ptr<Snapshot>& snapshot) {
                unlocked(m, [&](Machine& machine) { restore_snapshot(machine, *snapshot); });
            },
            py::arg("snapshot"))

        .def("serial", &PyMachine::serial, py::arg("index") = 0)
        .def_property_readonly("debug_console", &PyMachine::debug_console)
        .def("ranges", &ranges)
        .def("counters", &PyMachine::counters)
        .def("log", &PyMachine::log);
}

}  // namespace polyvisor::python
