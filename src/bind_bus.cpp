// Interrupt lines and timers as Python holds them. (Machine hands them out.)
#include "base/error.hpp"
#include "bindings.hpp"
#include "handles.hpp"
#include "py_device.hpp"

namespace polyvisor::python {

void bind_bus(py::module_& module) {
    py::class_<PyIrqLine>(module, "IrqLine")
        .def(
            "set", [](PyIrqLine& line, bool level) { line.get().set(level); }, py::arg("level"))
        .def("pulse", [](PyIrqLine& line) { line.get().pulse(); });

    py::class_<PyTimer>(module, "Timer")
        .def(
            "arm", [](PyTimer& timer, u64 deadline) { timer.timer().arm(deadline); },
            py::arg("deadline_ns"))
        .def("disarm", [](PyTimer& timer) { timer.timer().disarm(); })
        .def_property_readonly("deadline", [](PyTimer& timer) -> py::object {
            Nanoseconds deadline = timer.timer().deadline();
            return deadline == kNever ? py::object(py::none()) : py::int_(deadline);
        });
}

}  // namespace polyvisor::python
