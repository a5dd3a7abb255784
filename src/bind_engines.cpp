// The engines, and how fast they are, as plain tuples.
#include "bindings.hpp"
#include "machine/engines.hpp"

namespace polyvisor::python {

void bind_engines(py::module_& module) {
    module.def("engines", [] {
        py::list result;
        for (const EngineStatus& engine : engines()) {
            result.append(py::make_tuple(engine.name, engine.reason, engine.message));
        }
        return result;
    });
    module.def(
        "choose_engine",
        [](const std::string& name, bool deterministic) {
            EngineChoice choice;
            {
                py::gil_scoped_release release;
                choice = choose_engine(name, deterministic);
            }
            return py::make_tuple(choice.name, choice.note);
        },
        py::arg("name"), py::arg("deterministic") = false);
    module.def("engine_speed", &engine_speed, py::arg("name"),
               py::call_guard<py::gil_scoped_release>());
    module.def(
        "probe_kvm",
        [](const std::string& path, bool measure) {
            KvmProbe probe;
            {
                py::gil_scoped_release release;
                probe = probe_kvm_device(path, measure);
            }
            return py::make_tuple(probe.status.reason, probe.status.message, probe.speed);
        },
        py::arg("path"), py::arg("measure") = true);
}

}  // namespace polyvisor::python
