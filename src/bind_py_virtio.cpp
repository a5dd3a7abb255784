// Virtio devices written in Python: their port to the native side, their place in a machine, and a
// driver to test them with.
#include <pybind11/stl.h>

#include <utility>

#include "base/error.hpp"
#include "bindings.hpp"
#include "py_virtio.hpp"
#include "virtio/fake_guest.hpp"
#include "virtio_handle.hpp"

namespace polyvisor::python {

namespace {

using virtio::FakeDriver;
using virtio::FakeGuest;

py::bytes to_bytes(std::span<const u8> data) {
    return {reinterpret_cast<const char*>(data.data()), data.size()};
}

void bind_port(py::module_& module) {
    py::class_<VirtioPort>(module, "VirtioPort")
        .def(
            "queue",
            [](const VirtioPort& port, unsigned index) {
                return port.use([&](PyVirtioDevice& device) { return device.queue(index); });
            },
            py::arg("index"))
        .def(
            "set_config",
            [](const VirtioPort& port, u32 offset, const py::bytes& data) {
                std::string bytes = data;
                port.use([&](PyVirtioDevice& device) {
                    if (offset + bytes.size() > device.description().config_size) {
                        throw ConfigError(
                            "offset", "the configuration space of " + device.name() + " has only " +
                                          std::to_string(device.description().config_size) +
                                          " bytes");
                    }
                    py::gil_scoped_release release;
                    device.set_config(offset,
                                      {reinterpret_cast<const u8*>(bytes.data()), bytes.size()});
                });
            },
            py::arg("offset"), py::arg("data"))
        .def(
            "config",
            [](const VirtioPort& port, u32 offset, u32 size) {
                return port.use([&](PyVirtioDevice& device) {
                    std::vector<u8> data(std::min(size, device.description().config_size));
                    device.read_config(offset, data);
                    return to_bytes(data);
                });
            },
            py::arg("offset"), py::arg("size"))
        .def(
            "fail",
            [](const VirtioPort& port, const std::string& why) {
                port.use([&](PyVirtioDevice& device) {
                    py::gil_scoped_release release;
                    device.fail(why);
                });
            },
            py::arg("why"))
        .def_property_readonly(
            "memory",
            [](const VirtioPort& port) {
                return port.use([](PyVirtioDevice& device) { return device.guest_memory(); });
            })
        .def_property_readonly(
            "features",
            [](const VirtioPort& port) {
                return port.use([](PyVirtioDevice& device) { return device.driver_features(); });
            })
        .def_property_readonly(
            "status",
            [](const VirtioPort& port) {
                return port.use([](PyVirtioDevice& device) { return device.status(); });
            })
        .def_property_readonly("failure", [](const VirtioPort& port) {
            return port.use([](PyVirtioDevice& device) { return device.failure(); });
        });
}

// A device, memory and a driver, and no machine around them.
class PyFakeGuest {
  public:
    PyFakeGuest(const py::object& device, u64 memory, u64 features, bool packed, u32 queue_size)
        : parts_(std::make_shared<Parts>()) {
        Parts& parts = *parts_;
        parts.memory->add(Gpa(0), memory, "ram");
        parts.loop.start();
        parts.device = make_virtio({*parts.memory, parts.loop}, parts.memory, parts_, device,
                                   [&parts](const Access&) { parts.take_exception(); });
        parts.device->offer_packed(packed);
        options_ = {.features = features, .queue_size = queue_size, .seconds = 0};
        object_ = device;
        try {
            restart();
        } catch (...) {
            close();
            throw;
        }
    }
    ~PyFakeGuest() { close(); }

    void restart() {
        Parts& parts = this->parts();
        {
            py::gil_scoped_release release;
            parts.guest.reset();
            parts.guest = std::make_unique<FakeGuest>(*parts.device, *parts.memory, options_);
        }
        parts.raise();
    }

    void close() {
        auto parts = std::move(parts_);
        if (!parts) return;
        {
            py::gil_scoped_release release;
            parts->guest.reset();
        }
        std::exchange(object_, py::object()).attr("port") = py::none();
        parts->device->release();
        parts->exception = py::object();
        py::gil_scoped_release release;
        parts.reset();
    }

    u16 offer(unsigned queue, const std::vector<py::bytes>& out, const std::vector<u32>& into) {
        FakeGuest& guest = this->guest(queue);
        std::vector<FakeDriver::Segment> segments;
        Answer answer;
        for (const std::string bytes : out) {
            std::span data(reinterpret_cast<const u8*>(bytes.data()), bytes.size());
            segments.push_back({guest.buffer(data), static_cast<u32>(bytes.size()), false});
        }
        for (u32 size : into) {
            segments.push_back({guest.buffer(size), size, true});
            answer.push_back({segments.back().gpa, size});
        }
        auto id = guest.driver(queue).add(segments);
        if (!id) throw StateMismatch("queue " + std::to_string(queue) + " is full");
        answers_[{queue, *id}] = std::move(answer);
        return *id;
    }

    void kick(unsigned queue) {
        FakeGuest& guest = this->guest(queue);
        {
            auto keep = parts_;
            py::gil_scoped_release release;
            guest.kick(queue);
        }
        parts().raise();
    }

    py::object wait(unsigned queue, std::optional<double> timeout) {
        FakeGuest& guest = this->guest(queue);
        auto keep = parts_;
        std::optional<FakeDriver::Used> used;
        wait_interruptibly(timeout, [&](RunControl::Duration slice) {
            used = guest.wait(queue, slice);
            return used.has_value() || keep->raised.load();
        });
        keep->raise();
        if (!used) return py::none();
        std::vector<u8> bytes;
        u32 left = used->written;
        for (auto [gpa, size] : std::exchange(answers_[{queue, used->id}], {})) {
            const u32 here = std::min(left, size);
            auto part = guest.bytes(gpa, here);
            bytes.insert(bytes.end(), part.begin(), part.end());
            left -= here;
        }
        if (guest.driver(queue).outstanding() == 0 && idle()) guest.free_buffers();
        return py::make_tuple(used->id, to_bytes(bytes), used->written);
    }

    // For benchmarks: many equal chains at once, and away with all that came back.
    u32 offer_many(unsigned queue, u32 chains, u32 readable, u32 writable) {
        FakeGuest& guest = this->guest(queue);
        const u64 out = readable != 0 ? guest.buffer(readable) : 0;
        const u64 in = writable != 0 ? guest.buffer(writable) : 0;
        std::vector<FakeDriver::Segment> segments;
        if (readable != 0) segments.push_back({out, readable, false});
        if (writable != 0) segments.push_back({in, writable, true});
        u32 added = 0;
        while (added < chains && guest.driver(queue).add(segments)) ++added;
        return added;
    }
    u32 discard_used(unsigned queue) {
        FakeGuest& guest = this->guest(queue);
        u32 count = 0;
        while (guest.driver(queue).get()) ++count;
        if (idle()) guest.free_buffers();
        return count;
    }

    FakeGuest& guest(unsigned queue) {
        if (holds_queues()) {
            throw StateMismatch("a thread that holds a queue cannot be the driver too");
        }
        Parts& parts = this->parts();
        if (queue >= parts.device->queues()) parts.device->queue(queue);  // throws
        return *parts.guest;
    }
    virtio::Device& device() { return *parts().device; }
    const std::shared_ptr<GuestMemory>& memory() { return parts().memory; }
    void raise() { parts().raise(); }

  private:
    using Answer = std::vector<std::pair<u64, u32>>;

    struct Parts {
        std::shared_ptr<GuestMemory> memory = std::make_shared<GuestMemory>();
        Clock clock;
        EventLoop loop{clock};
        std::shared_ptr<PyVirtioDevice> device;
        std::unique_ptr<FakeGuest> guest;
        py::object exception;  // the GIL guards it
        std::atomic<bool> raised{false};

        void take_exception() {
            py::error_already_set error;
            if (exception) return;
            exception = error.value();
            raised = true;
        }
        void raise() {
            if (!raised.exchange(false)) return;
            py::object first = std::exchange(exception, py::object());
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(first.ptr())), first.ptr());
            throw py::error_already_set();
        }
    };

    Parts& parts() const {
        if (!parts_) throw StateMismatch("this FakeGuest is closed");
        return *parts_;
    }
    bool idle() const {
        for (unsigned i = 0; i < parts_->device->queues(); ++i) {
            if (parts_->guest->driver(i).outstanding() != 0) return false;
        }
        return true;
    }

    std::shared_ptr<Parts> parts_;
    FakeGuest::Options options_;
    py::object object_;
    std::map<std::pair<unsigned, u16>, Answer> answers_;
};

void bind_fake_guest(py::module_& module) {
    py::class_<PyFakeGuest>(module, "FakeGuest")
        .def(py::init<const py::object&, u64, u64, bool, u32>(), py::arg("device"),
             py::arg("memory"), py::arg("features"), py::arg("packed"), py::arg("queue_size"))
        .def("offer", &PyFakeGuest::offer, py::arg("queue"), py::arg("out"), py::arg("into"))
        .def("kick", &PyFakeGuest::kick, py::arg("queue"))
        .def("wait", &PyFakeGuest::wait, py::arg("queue"), py::arg("timeout"))
        .def("offer_many", &PyFakeGuest::offer_many, py::arg("queue"), py::arg("chains"),
             py::arg("readable"), py::arg("writable"))
        .def("discard_used", &PyFakeGuest::discard_used, py::arg("queue"))
        .def("restart", &PyFakeGuest::restart)
        .def("close", &PyFakeGuest::close)
        .def(
            "interrupts",
            [](PyFakeGuest& self, unsigned queue) { return self.guest(queue).interrupts(queue); },
            py::arg("queue"))
        .def_property_readonly("config_interrupts",
                               [](PyFakeGuest& self) { return self.guest(0).config_interrupts(); })
        .def(
            "read_config",
            [](PyFakeGuest& self, u32 offset, u32 size) {
                std::vector<u8> data(std::min(size, 4096u));
                self.device().read_config(offset, data);
                return to_bytes(data);
            },
            py::arg("offset"), py::arg("size"))
        .def(
            "write_config",
            [](PyFakeGuest& self, u32 offset, const std::string& data) {
                {
                    py::gil_scoped_release release;
                    self.device().write_config(
                        offset, {reinterpret_cast<const u8*>(data.data()), data.size()});
                }
                self.raise();
            },
            py::arg("offset"), py::arg("data"))
        .def(
            "reset_queue",
            [](PyFakeGuest& self, unsigned queue) {
                self.guest(queue);
                {
                    py::gil_scoped_release release;
                    self.device().reset_queue(queue);
                }
                self.raise();
            },
            py::arg("queue"))
        .def("pause",
             [](PyFakeGuest& self) {
                 {
                     py::gil_scoped_release release;
                     self.device().pause();
                 }
                 self.raise();
             })
        .def("resume",
             [](PyFakeGuest& self) {
                 {
                     py::gil_scoped_release release;
                     self.device().resume();
                 }
                 self.raise();
             })
        .def("save",
             [](PyFakeGuest& self) {
                 std::vector<u8> state;
                 {
                     py::gil_scoped_release release;
                     state = self.device().save();
                 }
                 self.raise();
                 return to_bytes(state);
             })
        .def(
            "restore",
            [](PyFakeGuest& self, const std::string& state) {
                py::gil_scoped_release release;
                self.device().restore({reinterpret_cast<const u8*>(state.data()), state.size()});
            },
            py::arg("state"))
        .def_property_readonly("memory", &PyFakeGuest::memory)
        .def_property_readonly("features",
                               [](PyFakeGuest& self) { return self.device().driver_features(); })
        .def_property_readonly("status", [](PyFakeGuest& self) { return self.device().status(); })
        .def_property_readonly("failure",
                               [](PyFakeGuest& self) { return self.device().failure(); });
}

}  // namespace

void bind_py_virtio(py::module_& module) {
    bind_port(module);
    bind_fake_guest(module);
    py::class_<Virtio<PyVirtioDevice>, VirtioHandle>(module, "VirtioPython")
        .def(py::init([](const PyMachine& machine, const py::object& object,
                         const std::string& transport, bool packed) {
                 auto core = machine.core();
                 auto device =
                     make_virtio(environment(*core), core->machine().memory(), core, object,
                                 [core = core.get()](const Access& access) { core->fail(access); });
                 try {
                     auto handle = plug<PyVirtioDevice>(core, device, transport, packed);
                     core->plugged(device);
                     return handle;
                 } catch (...) {
                     object.attr("port") = py::none();
                     throw;
                 }
             }),
             py::arg("machine"), py::arg("device"), py::arg("transport"), py::arg("packed"));
}

}  // namespace polyvisor::python
