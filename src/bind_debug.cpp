// Breakpoints and why a machine stands still: polyvisor/debug.py makes them pleasant.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "handles.hpp"

namespace polyvisor::python {

void bind_debug(py::module_& module) {
    auto machine = py::reinterpret_borrow<py::class_<PyMachine>>(module.attr("Machine"));
    machine
        .def(
            "add_breakpoint",
            [](const PyMachine& m, u32 index, u64 address, const std::string& kind, u8 size) {
                auto core = m.core();
                Breakpoint::Kind what = breakpoint_kind(kind);
                py::gil_scoped_release release;
                return core->machine().add_breakpoint(index, address, what, size);
            },
            py::arg("index"), py::arg("address"), py::arg("kind"), py::arg("size"))
        .def(
            "remove_breakpoint",
            [](const PyMachine& m, u64 id) {
                auto core = m.core();
                py::gil_scoped_release release;
                core->machine().remove_breakpoint(id);
            },
            py::arg("number"))
        .def("breakpoints",
             [](const PyMachine& m) {
                 py::list result;
                 for (const Breakpoint& b : m.core()->machine().breakpoints().list()) {
                     result.append(py::make_tuple(b.id, b.address, to_string(b.kind), b.size));
                 }
                 return result;
             })
        .def("debug_stops",
             [](const PyMachine& m) {
                 py::list result;
                 for (const DebugStop& s : m.core()->machine().breakpoints().stops()) {
                     result.append(
                         py::make_tuple(s.cpu, s.breakpoint, to_string(s.kind), s.address));
                 }
                 return result;
             })
        .def(
            "wait_stopped",
            [](const PyMachine& m, std::optional<double> timeout) {
                if (m.closed()) return true;
                auto core = m.core();
                return wait_interruptibly(timeout, [&](RunControl::Duration slice) {
                    return core->machine().wait_stopped(slice);
                });
            },
            py::arg("timeout") = py::none());
}

}  // namespace polyvisor::python
