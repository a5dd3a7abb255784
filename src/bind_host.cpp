// Programs in namespaces of their own: what is launched, and what runs.
#include <pybind11/stl.h>

#include "base/error.hpp"
#include "bindings.hpp"
#include "host/launch.hpp"

namespace polyvisor::python {

namespace {

using host::Launched;
using host::LaunchSpec;
using host::Mount;
using Ids = std::vector<std::tuple<u32, u32, u32>>;
using Limits = std::vector<std::tuple<u64, u64, u64>>;

host::Filter filter(const std::string& name) {
    if (name == "default") return host::Filter::kDefault;
    if (name == "system") return host::Filter::kSystem;
    if (name == "none") return host::Filter::kNone;
    throw ConfigError("seccomp", "seccomp must be default, system or none, not '" + name + "'");
}

host::IdMap id_map(const Ids& ids) {
    host::IdMap map;
    for (auto [inside, outside, count] : ids) map.push_back({inside, outside, count});
    return map;
}

LaunchSpec make_spec(std::vector<std::string> argv, std::vector<std::string> env, std::string cwd,
                     std::string root, std::vector<std::string> lower, std::string upper,
                     std::string work, bool idmapped, bool read_only_root,
                     std::vector<Mount> mounts, std::vector<std::string> masked,
                     std::vector<std::string> read_only_paths, u64 namespaces, const Ids& uid_map,
                     const Ids& gid_map, std::string hostname, u32 uid, u32 gid,
                     std::vector<u32> groups, u64 capabilities, bool no_new_privs,
                     const std::string& seccomp, const Limits& rlimits,
                     std::optional<int> oom_score_adj, std::vector<int> cgroups, bool init,
                     bool terminal, std::optional<int> in, std::optional<int> out,
                     std::optional<int> error, bool detached) {
    LaunchSpec spec{.argv = std::move(argv),
                    .env = std::move(env),
                    .cwd = std::move(cwd),
                    .root = std::move(root),
                    .lower = std::move(lower),
                    .upper = std::move(upper),
                    .work = std::move(work),
                    .idmapped = idmapped,
                    .read_only_root = read_only_root,
                    .mounts = std::move(mounts),
                    .masked = std::move(masked),
                    .read_only_paths = std::move(read_only_paths),
                    .namespaces = namespaces,
                    .uid_map = id_map(uid_map),
                    .gid_map = id_map(gid_map),
                    .hostname = std::move(hostname),
                    .uid = uid,
                    .gid = gid,
                    .groups = std::move(groups),
                    .capabilities = capabilities,
                    .no_new_privs = no_new_privs,
                    .seccomp = filter(seccomp),
                    .rlimits = {},
                    .oom_score_adj = oom_score_adj,
                    .cgroups = std::move(cgroups),
                    .init = init,
                    .terminal = terminal,
                    .standard = {in.value_or(-1), out.value_or(-1), error.value_or(-1)},
                    .detached = detached};
    for (auto [resource, soft, hard] : rlimits) spec.rlimits.push_back({resource, soft, hard});
    return spec;
}

/// go(), interruptible; whatever is in the way, nothing is left.
void go(Launched& launched) {
    try {
        launched.send();
        wait_interruptibly({}, [&](auto slice) { return launched.started(slice); });
    } catch (const StateMismatch&) {
        throw;
    } catch (...) {
        py::gil_scoped_release release;
        launched.kill();
        throw;
    }
}

std::optional<int> wait(Launched& launched, std::optional<double> timeout) {
    std::optional<int> status;
    wait_interruptibly(timeout, [&](auto slice) {
        status = launched.wait(slice);
        return status.has_value();
    });
    return status;
}

/// close() ends its descriptors, and what was not to outlive it.
class PyLaunched {
  public:
    explicit PyLaunched(Launched launched) : launched_(std::move(launched)) {}

    Launched& get() {
        if (!launched_) throw StateMismatch("this sandbox is closed");
        return *launched_;
    }
    void close() {
        py::gil_scoped_release release;
        launched_.reset();
    }

  private:
    std::optional<Launched> launched_;
};

std::unique_ptr<PyLaunched> released(const LaunchSpec& spec, int target) {
    py::gil_scoped_release release;
    return std::make_unique<PyLaunched>(target < 0 ? host::launch(spec)
                                                   : host::attach(target, spec));
}

/// All in one: the wait status, or None and everything killed when `timeout` is over.
std::optional<int> run(const LaunchSpec& spec, std::optional<double> timeout) {
    Launched launched = [&] {
        py::gil_scoped_release release;
        return host::launch(spec);
    }();
    go(launched);
    try {
        const std::optional<int> status = wait(launched, timeout);
        py::gil_scoped_release release;
        if (!status) launched.kill();
        return status;
    } catch (...) {
        py::gil_scoped_release release;
        launched.kill();
        throw;
    }
}

}  // namespace

void bind_host(py::module_& module) {
    using py::literals::operator""_a;
    py::class_<Mount>(module, "Mount")
        .def(
            py::init([](std::string type, std::string source, std::string target, bool read_only,
                        bool nosuid, bool nodev, bool noexec, std::string options) {
                return Mount{
                    std::move(type), std::move(source), std::move(target), read_only, nosuid, nodev,
                    noexec,          std::move(options)};
            }),
            "type"_a, "source"_a = "", "target"_a = "", "read_only"_a = false, "nosuid"_a = true,
            "nodev"_a = true, "noexec"_a = false, "options"_a = "")
        .def_readonly("type", &Mount::type)
        .def_readonly("source", &Mount::source)
        .def_readonly("target", &Mount::target)
        .def_readonly("read_only", &Mount::read_only);

    const std::vector<std::string> none;
    py::class_<LaunchSpec>(module, "LaunchSpec")
        .def(py::init(&make_spec), "argv"_a, py::kw_only(), "env"_a = none, "cwd"_a = "/",
             "root"_a = "", "lower"_a = none, "upper"_a = "", "work"_a = "", "idmapped"_a = false,
             "read_only_root"_a = false, "mounts"_a = std::vector<Mount>(), "masked"_a = none,
             "read_only_paths"_a = none, "namespaces"_a = host::kAllNamespaces, "uid_map"_a = Ids(),
             "gid_map"_a = Ids(), "hostname"_a = "", "uid"_a = 0, "gid"_a = 0,
             "groups"_a = std::vector<u32>(), "capabilities"_a = 0, "no_new_privs"_a = true,
             "seccomp"_a = "default", "rlimits"_a = Limits(), "oom_score_adj"_a = py::none(),
             "cgroups"_a = std::vector<int>(), "init"_a = true, "terminal"_a = false,
             "stdin"_a = py::none(), "stdout"_a = py::none(), "stderr"_a = py::none(),
             "detached"_a = false);

    py::class_<PyLaunched>(module, "Launched")
        .def_property_readonly("pid", [](PyLaunched& self) { return self.get().pid(); })
        .def_property_readonly("pidfd", [](PyLaunched& self) { return self.get().pidfd(); })
        .def_property_readonly("terminal",
                               [](PyLaunched& self) -> std::optional<int> {
                                   const int fd = self.get().terminal();
                                   return fd < 0 ? std::nullopt : std::optional(fd);
                               })
        .def(
            "namespace",
            [](PyLaunched& self, const std::string& kind) {
                return self.get().open_namespace(kind);
            },
            "kind"_a)
        .def("go", [](PyLaunched& self) { go(self.get()); })
        .def(
            "wait",
            [](PyLaunched& self, std::optional<double> timeout) {
                return wait(self.get(), timeout);
            },
            "timeout"_a = py::none())
        .def("kill",
             [](PyLaunched& self) {
                 Launched& launched = self.get();
                 py::gil_scoped_release release;
                 launched.kill();
             })
        .def("close", &PyLaunched::close)
        .def("__enter__", [](py::object self) { return self; })
        .def("__exit__", [](PyLaunched& self, const py::args&) { self.close(); });

    module.def("launch", [](const LaunchSpec& spec) { return released(spec, -1); }, "spec"_a);
    module.def(
        "attach",
        [](int pidfd, const LaunchSpec& spec) {
            if (pidfd < 0) {
                throw ConfigError("pidfd", "attach() needs a descriptor of a process");
            }
            return released(spec, pidfd);
        },
        "pidfd"_a, "spec"_a);
    module.def("run", &run, "spec"_a, "timeout"_a = py::none());
}

}  // namespace polyvisor::python
