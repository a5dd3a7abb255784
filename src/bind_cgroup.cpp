// Cgroups; polyvisor.vps.limits is the interface meant for people.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "host/cgroup.hpp"

namespace polyvisor::python {

namespace {

using host::Cgroup;
using host::CgroupLimits;
using host::CgroupTree;
using Tree = std::shared_ptr<CgroupTree>;

constexpr auto kSlice = std::chrono::milliseconds(50);

// (type, major or None, minor or None, access)
using Rule = std::tuple<std::string, std::optional<u32>, std::optional<u32>, std::string>;
// (major, minor, read or None, write or None)
using Rate = std::tuple<u32, u32, std::optional<u64>, std::optional<u64>>;

CgroupLimits make_limits(std::optional<u64> memory, std::optional<u64> swap,
                         std::optional<u64> cpu_quota, u64 cpu_period, u64 cpu_burst,
                         std::optional<u64> cpu_shares, std::optional<u64> pids,
                         const std::string& cpuset, const std::vector<Rate>& io,
                         const std::optional<std::vector<Rule>>& devices) {
    CgroupLimits limits{memory, swap, cpu_quota, cpu_period, cpu_burst, cpu_shares, pids, cpuset};
    for (const auto& [major, minor, read, write] : io) {
        limits.io.push_back({major, minor, read, write});
    }
    if (devices) {
        limits.devices.emplace();
        for (const auto& [type, major, minor, access] : *devices) {
            auto may = [&](char letter) { return access.find(letter) != std::string::npos; };
            limits.devices->push_back(
                {type == "b" ? 'b' : 'c', major, minor, may('r'), may('w'), may('m')});
        }
    }
    return limits;
}

py::dict to_dict(const host::CgroupStats& from) {
    using py::literals::operator""_a;
    return py::dict("memory"_a = from.memory, "memory_peak"_a = from.memory_peak,
                    "memory_cache"_a = from.memory_cache, "oom_kills"_a = from.oom_kills,
                    "cpu_us"_a = from.cpu_us, "throttled_us"_a = from.throttled_us,
                    "pids"_a = from.pids, "io_read"_a = from.io_read,
                    "io_written"_a = from.io_written);
}

Tree tree_from(const std::string& name, const std::optional<std::string>& mountinfo,
               const std::string& own) {
    if (!mountinfo) return std::make_shared<CgroupTree>(name);
    return std::make_shared<CgroupTree>(name, host::find_hierarchies(*mountinfo, own));
}

py::list hierarchies(CgroupTree& tree) {
    py::list result;
    for (const host::Hierarchy* hierarchy : tree.all()) {
        result.append(py::make_tuple(hierarchy->v2, hierarchy->parent, hierarchy->controllers));
    }
    return result;
}

}  // namespace

void bind_cgroup(py::module_& module) {
    py::class_<CgroupLimits>(module, "CgroupLimits")
        .def(py::init(&make_limits), py::kw_only(), py::arg("memory") = py::none(),
             py::arg("swap") = py::none(), py::arg("cpu_quota") = py::none(),
             py::arg("cpu_period") = 100'000, py::arg("cpu_burst") = 0,
             py::arg("cpu_shares") = py::none(), py::arg("pids") = py::none(),
             py::arg("cpuset") = "", py::arg("io") = std::vector<Rate>(),
             py::arg("devices") = py::none());
    py::class_<CgroupTree, Tree>(module, "CgroupTree")
        .def(py::init(&tree_from), py::arg("name") = "polyvisor", py::arg("mountinfo") = py::none(),
             py::arg("own") = "")
        .def("hierarchies", &hierarchies)
        .def("names", [](CgroupTree& tree) { return Cgroup::names(tree); });
    using Nogil = py::call_guard<py::gil_scoped_release>;
    py::class_<Cgroup>(module, "Cgroup")
        .def_static("create", &Cgroup::create, py::arg("tree"), py::arg("name"), py::arg("limits"),
                    py::arg("complete"), Nogil())
        .def_static("open", &Cgroup::open, py::arg("tree"), py::arg("name"))
        .def_property_readonly("name", &Cgroup::name)
        .def_property_readonly("unified", &Cgroup::unified)
        .def("fds", &Cgroup::fds)
        .def("change", &Cgroup::change, py::arg("limits"), Nogil())
        .def("stats", [](const Cgroup& cgroup) { return to_dict(cgroup.stats()); })
        .def("processes", &Cgroup::processes)
        .def("attach", &Cgroup::attach, py::arg("pid"), Nogil())
        .def("delegate", &Cgroup::delegate, py::arg("uid"), py::arg("gid"))
        .def(
            "freeze",
            [](const Cgroup& cgroup, bool frozen, double timeout) {
                return wait_interruptibly(timeout,
                                          [&](auto) { return cgroup.freeze(frozen, kSlice); });
            },
            py::arg("frozen"), py::arg("timeout"))
        .def(
            "kill",
            [](const Cgroup& cgroup, double timeout) {
                return wait_interruptibly(timeout, [&](auto) { return cgroup.kill(kSlice); });
            },
            py::arg("timeout"))
        .def("remove", &Cgroup::remove, Nogil());
}

}  // namespace polyvisor::python
