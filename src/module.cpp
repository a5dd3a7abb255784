// polyvisor._native: the table of contents. Each bind_<topic>.cpp converts one topic and nothing
// else.
#include "bindings.hpp"
#include "machine/pc.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
    module.doc() =
        "The C++ core of polyvisor; polyvisor.Machine is the interface meant for people.";
    module.attr("__version__") = PV_VERSION;
    module.def("pc_layout", [] {
        py::dict result;
        for (const auto& [name, value] : polyvisor::PcLayout::values())
            result[name.c_str()] = value;
        return result;
    });
    polyvisor::python::bind_errors(module);
    polyvisor::python::bind_engines(module);
    polyvisor::python::bind_process(module);
    polyvisor::python::bind_host(module);
    polyvisor::python::bind_memory(module);
    polyvisor::python::bind_mmu(module);
    polyvisor::python::bind_cpu(module);
    polyvisor::python::bind_bus(module);
    polyvisor::python::bind_machine(module);
    polyvisor::python::bind_mmu_bulk(module);
    polyvisor::python::bind_debug(module);
    polyvisor::python::bind_statistics(module);
    polyvisor::python::bind_virtio(module);
    polyvisor::python::bind_block(module);
    polyvisor::python::bind_net(module);
    polyvisor::python::bind_py_virtio(module);
    polyvisor::python::bind_console(module);
    polyvisor::python::bind_cgroup(module);
}
