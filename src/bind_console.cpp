// virtio-console and virtio-vsock.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "virtio/console.hpp"
#include "virtio/vsock.hpp"
#include "virtio_handle.hpp"

namespace polyvisor::python {

namespace {

using virtio::Console;
using virtio::Vsock;

std::unique_ptr<Virtio<Console>> make_console(
    const PyMachine& machine, const std::vector<std::pair<std::string, bool>>& ports, u32 max_ports,
    const std::optional<std::pair<u16, u16>>& size, const std::string& transport, bool packed) {
    auto core = machine.core();
    Console::Config config;
    for (const auto& [name, console] : ports) config.ports.push_back({name, console});
    config.max_ports = max_ports;
    if (size) config.size = Console::Size{size->first, size->second};
    return plug<Console>(core, std::make_shared<Console>(environment(*core), std::move(config)),
                         transport, packed);
}

void bind_ports(py::module_& module) {
    using Handle = Virtio<Console>;
    py::class_<Handle, VirtioHandle>(module, "VirtioConsole")
        .def(py::init(&make_console), py::arg("machine"), py::arg("ports"), py::kw_only(),
             py::arg("max_ports"), py::arg("size"), py::arg("transport"), py::arg("packed"))
        .def_property_readonly(
            "max_ports",
            [](const Handle& self) { return self.use([](Console& d) { return d.max_ports(); }); })
        .def(
            "present",
            [](const Handle& self, u32 id) {
                return self.use([&](Console& d) { return d.present(id); });
            },
            py::arg("number"))
        .def(
            "port",
            [](const Handle& self, u32 id) {
                return self.use([&](Console& d) { return d.console(id); });
            },
            py::arg("number"))
        .def(
            "guest_open",
            [](const Handle& self, u32 id) {
                return self.use([&](Console& d) { return d.guest_open(id); });
            },
            py::arg("number"))
        .def(
            "set_host_open",
            [](const Handle& self, u32 id, bool open) {
                self.use([&](Console& d) { d.set_host_open(id, open); });
            },
            py::arg("number"), py::arg("connected"))
        .def(
            "resize",
            [](const Handle& self, u16 rows, u16 columns) {
                self.use([&](Console& d) { d.resize({rows, columns}); });
            },
            py::arg("rows"), py::arg("columns"))
        .def(
            "add_port",
            [](const Handle& self, const std::string& name, bool console) {
                return self.use([&](Console& d) { return d.add_port({name, console}); });
            },
            py::arg("name"), py::arg("console"))
        .def(
            "remove_port",
            [](const Handle& self, u32 id) { self.use([&](Console& d) { d.remove_port(id); }); },
            py::arg("number"));
}

void bind_vsock(py::module_& module) {
    using Handle = Virtio<Vsock>;
    py::class_<Handle, VirtioHandle>(module, "VirtioVsock")
        .def(py::init([](const PyMachine& machine, u64 cid, const std::string& path,
                         const std::string& transport, bool packed) {
                 auto core = machine.core();
                 auto device =
                     std::make_shared<Vsock>(environment(*core), Vsock::Config{cid, path});
                 return plug<Vsock>(core, std::move(device), transport, packed);
             }),
             py::arg("machine"), py::kw_only(), py::arg("cid"), py::arg("path"),
             py::arg("transport"), py::arg("packed"))
        .def_property_readonly(
            "cid", [](const Handle& self) { return self.use([](Vsock& d) { return d.cid(); }); })
        .def_property_readonly(
            "path", [](const Handle& self) { return self.use([](Vsock& d) { return d.path(); }); })
        .def_property_readonly(
            "connections",
            [](const Handle& self) { return self.use([](Vsock& d) { return d.connections(); }); })
        .def(
            "connect",
            [](const Handle& self, u32 port) {
                return self.use([&](Vsock& d) { return d.connect(port).release(); });
            },
            py::arg("port"))
        .def(
            "listen",
            [](const Handle& self, u32 port, int descriptor) {
                self.use([&](Vsock& d) { d.listen(port, OwnedFd(descriptor)); });
            },
            py::arg("port"), py::arg("descriptor"));
}

}  // namespace

void bind_console(py::module_& module) {
    bind_ports(module);
    bind_vsock(module);
}

}  // namespace polyvisor::python
