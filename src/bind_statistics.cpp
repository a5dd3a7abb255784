// What a machine counts, as plain dicts and lists; polyvisor.statistics gives them their shape.
#include "bindings.hpp"
#include "handles.hpp"
#include "machine/statistics.hpp"

namespace polyvisor::python {

namespace {

py::dict to_dict(const Statistics::Counters& counters) {
    py::dict result;
    for (const auto& counter : counters) result[counter.name.c_str()] = counter.value;
    return result;
}

// (name, kind, unit, base, exponent, bucket_size, values)
py::list to_list(const std::vector<Statistic>& statistics) {
    py::list result;
    for (const Statistic& statistic : statistics) {
        py::list values;
        for (u64 value : statistic.values) values.append(value);
        result.append(py::make_tuple(statistic.name, to_string(statistic.kind),
                                     to_string(statistic.unit), statistic.base, statistic.exponent,
                                     statistic.bucket_size, values));
    }
    return result;
}

py::dict to_dict(const Statistics& from) {
    using py::literals::operator""_a;
    py::list cpus, devices;
    for (const Statistics::Cpu& cpu : from.cpus) {
        cpus.append(py::dict("exits"_a = to_dict(cpu.exits), "returns"_a = to_dict(cpu.returns),
                             "counters"_a = to_dict(cpu.counters), "host"_a = to_list(cpu.host)));
    }
    for (const Statistics::Device& device : from.devices) {
        devices.append(
            py::make_tuple(device.name, device.bus, device.start, device.reads, device.writes));
    }
    py::dict log;
    for (const Log::Count& count : from.log) log[count.topic.c_str()] = count.count;
    return py::dict("engine"_a = from.engine, "counters"_a = to_dict(from.counters),
                    "cpus"_a = cpus, "devices"_a = devices, "host"_a = to_list(from.host),
                    "unclaimed"_a = py::make_tuple(from.unclaimed_ports, from.unclaimed_memory),
                    "log"_a = log);
}

}  // namespace

Statistics PyMachine::statistics() const {
    auto core = core_;
    if (!core) return statistics_;
    py::gil_scoped_release release;
    return core->machine().statistics();
}

void bind_statistics(py::module_& module) {
    module.def(
        "statistics", [](const PyMachine& machine) { return to_dict(machine.statistics()); },
        py::arg("machine"));
}

}  // namespace polyvisor::python
