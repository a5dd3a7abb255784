// virtio devices, whatever they are: where they are plugged and how their driver is doing. Each
// kind of device is bound in a file of its own.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "virtio_handle.hpp"

namespace polyvisor::python {

namespace {

const char* name_of(VirtioTransport transport) {
    return transport == VirtioTransport::kPci ? "pci" : "mmio";
}

}  // namespace

void bind_virtio(py::module_& module) {
    py::class_<VirtioHandle>(module, "VirtioHandle")
        .def_property_readonly("name", &VirtioHandle::name)
        .def_property_readonly("transport",
                               [](const VirtioHandle& h) { return name_of(h.transport()); })
        .def_property_readonly("slot", &VirtioHandle::slot)
        .def_property_readonly("gpa", &VirtioHandle::gpa)
        .def_property_readonly("gsi", &VirtioHandle::gsi)
        .def_property_readonly("type",
                               [](const VirtioHandle& h) { return h.device()->description().type; })
        .def_property_readonly("status", [](const VirtioHandle& h) { return h.device()->status(); })
        .def_property_readonly("offered_features",
                               [](const VirtioHandle& h) { return h.device()->offered_features(); })
        .def_property_readonly("driver_features",
                               [](const VirtioHandle& h) { return h.device()->driver_features(); })
        .def_property_readonly("failure",
                               [](const VirtioHandle& h) { return h.device()->failure(); });
}

}  // namespace polyvisor::python
