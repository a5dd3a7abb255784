// Process VMs: one Linux program in a vCPU, its system calls served here. It runs on a thread of
// its own while Python waits without the GIL.
#include <fcntl.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <atomic>
#include <cinttypes>

#include "base/error.hpp"
#include "bindings.hpp"
#include "machine/engines.hpp"
#include "process/image.hpp"
#include "process/trace.hpp"
#include "process/vm_pool.hpp"
#include "process_hooks.hpp"

namespace polyvisor::python {

namespace {

using process::End;
using process::Kernel;
using process::KernelConfig;
using process::Stop;

// "auto" is not what a whole machine takes: a program needs no ring 0, which is all that an
// emulating KVM is slow at.
std::string choose(const std::string& name) {
    if (name != "auto") return choose_engine(name).name;
    for (const EngineStatus& engine : engines()) {
        if (engine.name == "kvm" && engine.reason.empty()) return engine.name;
    }
    return choose_engine("soft").name;
}

const char* to_string(End::Reason reason) {
    switch (reason) {
        case End::Reason::kExited:
            return "exited";
        case End::Reason::kSignal:
            return "signal";
        case End::Reason::kInstructions:
            return "instructions";
        case End::Reason::kCpuTime:
            return "cpu";
        case End::Reason::kMemory:
            return "memory";
        case End::Reason::kFailed:
            break;
    }
    return "engine_failure";
}

MemoryRangeError no_memory(u64 address, u64 size) {
    char text[96];
    std::snprintf(text, sizeof text, "the program has no %" PRIu64 " bytes of memory at 0x%" PRIx64,
                  size, address);
    return MemoryRangeError(address, size, text);
}

void use_engine(process::VmConfig& config, const std::string& engine) {
    config.offer = engine_offer(engine);
    config.make_engine = [engine](const EngineConfig& wanted) {
        return create_engine(engine, wanted);
    };
}

class PyProcess {
  public:
    PyProcess(KernelConfig config, process::StandardFiles standard, const std::string& engine)
        : engine_(choose(engine)) {
        use_engine(config.vm, engine_);
        kernel_ = std::make_shared<Kernel>(std::move(config), std::move(standard));
    }
    PyProcess(std::unique_ptr<Kernel> kernel, std::string engine)
        : engine_(std::move(engine)), kernel_(std::move(kernel)) {}
    ~PyProcess() { close(); }

    Kernel& get() const {
        if (!kernel_) throw StateMismatch("this process is closed");
        return *kernel_;
    }
    const std::string& engine() const { return engine_; }
    double cpu_seconds() const { return static_cast<double>(get().cpu_time()) * 1e-9; }

    using Outcome = std::variant<std::monostate, End, Stop>;
    /// Until its end, a place where it is to stop, or `timeout`: then None. `hook` is shown the
    /// system calls that are watched.
    Outcome run(std::optional<double> timeout, const py::object& hook) {
        get();
        const std::shared_ptr<Kernel> held = kernel_;  // a hook may close this
        Kernel& kernel = *held;
        if (running_.exchange(true)) throw StateMismatch("this process is running already");
        using Clk = std::chrono::steady_clock;
        const auto begin = Clk::now();
        const auto left = [&] {
            const std::chrono::duration<double> spent = Clk::now() - begin;
            return timeout ? std::optional(std::max(0.0, *timeout - spent.count())) : timeout;
        };
        try {
            kernel.resume();
            while (wait_interruptibly(left(), [&](auto slice) { return kernel.wait(slice); }) &&
                   serve_inquiry(kernel, hook)) {
            }
        } catch (...) {
            stop(kernel);
            throw;
        }
        stop(kernel);
        if (auto at = kernel.stop()) return *at;
        if (auto end = kernel.end()) return *end;
        return {};
    }

    /// The function's RAX and what became of the copies; or how else it ended.
    std::pair<Outcome, std::vector<py::bytes>> call(u64 address, const py::sequence& arguments,
                                                    std::optional<double> timeout,
                                                    const py::object& hook) {
        std::vector<u64> words;
        std::vector<Kernel::Copy> copies;
        for (py::handle argument : arguments) {
            if (py::isinstance<py::int_>(argument)) {
                words.push_back(py::cast<py::int_>(argument & py::int_(~u64{0})).cast<u64>());
                continue;
            }
            const auto buffer = argument.cast<py::buffer>().request();
            const auto* bytes = static_cast<const u8*>(buffer.ptr);
            const auto size = static_cast<std::size_t>(buffer.size * buffer.itemsize);
            Kernel::Copy copy{words.size(), {bytes, bytes + size}};
            copy.bytes.push_back(0);
            copies.push_back(std::move(copy));
            words.push_back(0);
        }
        Kernel& kernel = get();
        kernel.call(address, std::move(words), copies);
        Outcome outcome = run(timeout, hook);
        std::vector<py::bytes> after;
        if (std::holds_alternative<Stop>(outcome)) {
            for (Kernel::Copy& copy : copies) {
                kernel.read_memory(copy.address, copy.bytes);
                after.emplace_back(reinterpret_cast<const char*>(copy.bytes.data()),
                                   copy.bytes.size() - 1);
            }
        }
        return {std::move(outcome), std::move(after)};
    }

    py::bytes read(u64 address, u64 size) const {
        constexpr u64 kMost = u64{1} << 30;
        if (size > kMost) throw ConfigError("size", "at most 1 GiB can be read at a time");
        std::vector<u8> bytes(size);
        if (!get().read_memory(address, bytes)) throw no_memory(address, size);
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }
    void write(u64 address, const py::buffer& from) {
        const auto buffer = from.request();
        const std::span<const u8> bytes(static_cast<const u8*>(buffer.ptr),
                                        static_cast<std::size_t>(buffer.size * buffer.itemsize));
        if (!get().write_memory(address, bytes)) throw no_memory(address, bytes.size());
    }

    /// Ends the program; run(), if it goes on with it, returns.
    void close() {
        py::gil_scoped_release release;
        if (kernel_) kernel_->kill({.reason = End::Reason::kSignal, .signal = SIGKILL});
        kernel_.reset();
    }

  private:
    void stop(Kernel& kernel) {
        py::gil_scoped_release release;
        kernel.pause();
        running_ = false;
    }

    std::string engine_;
    std::shared_ptr<Kernel> kernel_;
    std::atomic<bool> running_{false};
};

// A copy, so that the caller may close its own.
OwnedFd copy_fd(int fd) {
    if (fd < 0) return OwnedFd();
    OwnedFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
    if (!copy) throw_errno("cannot pass a file descriptor to a process");
    return copy;
}

process::StandardFiles copies_of(const std::array<int, 3>& fds) {
    process::StandardFiles copies;
    for (std::size_t n = 0; n < fds.size(); ++n) copies[n] = copy_fd(fds[n]);
    return copies;
}

using Mounts = std::vector<std::tuple<std::string, std::string, bool>>;

std::vector<process::Tree::Mount> mounts_of(const Mounts& mounts) {
    std::vector<process::Tree::Mount> result;
    for (const auto& [at, host, writable] : mounts) result.push_back({at, host, writable});
    return result;
}

// What any number of copies are made from.
struct PyImage {
    std::shared_ptr<const process::KernelImage> image;
    std::string engine;
};

}  // namespace

void bind_process(py::module_& module) {
    bind_process_hooks(module);
    py::class_<End>(module, "ProcessEnd")
        .def_property_readonly("reason", [](const End& e) { return to_string(e.reason); })
        .def_readonly("status", &End::status)
        .def_readonly("signal", &End::signal)
        .def_readonly("address", &End::address)
        .def_readonly("text", &End::text);

    py::class_<Stop>(module, "ProcessStop")
        .def_property_readonly("kind",
                               [](const Stop& stop) {
                                   return stop.kind == Stop::Kind::kSystemCall ? "system call"
                                          : stop.kind == Stop::Kind::kAddress  ? "address"
                                                                               : "returned";
                               })
        .def_property_readonly("name",
                               [](const Stop& stop) {
                                   return stop.kind == Stop::Kind::kSystemCall
                                              ? process::system_call_name(stop.number)
                                              : "";
                               })
        .def_readonly("pid", &Stop::pid)
        .def_readonly("tid", &Stop::tid)
        .def_readonly("address", &Stop::address)
        .def_property_readonly("value",
                               [](const Stop& stop) { return static_cast<s64>(stop.value); });
    module.def("system_call_number", &process::system_call_number, py::arg("name"));

    using process::VmPool;
    py::class_<VmPool, std::shared_ptr<VmPool>>(module, "ProcessPool")
        .def(py::init([](u64 memory, std::size_t count, const std::string& engine) {
                 process::VmConfig config;
                 config.memory = memory;
                 use_engine(config, choose(engine));
                 return std::make_shared<VmPool>(std::move(config), count);
             }),
             py::kw_only(), py::arg("memory"), py::arg("count"), py::arg("engine"))
        .def_property_readonly("idle", &VmPool::idle)
        .def("close", &VmPool::close, py::call_guard<py::gil_scoped_release>());
    module.def("process_engine", &choose, py::arg("name"));

    py::class_<PyProcess>(module, "Process")
        .def(py::init([](std::vector<std::string> arguments, std::vector<std::string> environment,
                         const std::string& directory, const Mounts& mounts, u64 memory, u64 output,
                         std::optional<u64> writes, std::optional<u64> instructions,
                         std::optional<double> cpu, u32 files, u32 threads, bool network,
                         bool confine, int trace, bool trace_json, std::size_t events,
                         std::optional<u64> seed, const std::array<int, 3>& standard,
                         const std::string& engine, std::shared_ptr<process::VmPool> pool) {
                 KernelConfig config;
                 config.arguments = std::move(arguments);
                 config.environment = std::move(environment);
                 config.directory = directory;
                 config.mounts = mounts_of(mounts);
                 config.vm.memory = memory;
                 config.vm.pool = std::move(pool);
                 config.output = output;
                 if (writes) config.writes = *writes;
                 config.seed = seed;
                 if (instructions) config.instructions = *instructions;
                 if (cpu) config.cpu_time = static_cast<u64>(std::min(*cpu, 1e9) * 1e9);
                 config.files = files;
                 config.threads = threads;
                 config.network = network;
                 config.confine = confine;
                 process::TraceConfig record{copy_fd(trace), trace_json, events};
                 process::StandardFiles opened = copies_of(standard);
                 py::gil_scoped_release release;
                 auto made =
                     std::make_unique<PyProcess>(std::move(config), std::move(opened), engine);
                 if (record.fd || events != 0) {
                     made->get().observer.record(
                         std::make_unique<process::Trace>(std::move(record)));
                 }
                 return made;
             }),
             py::kw_only(), py::arg("arguments"), py::arg("environment"), py::arg("directory"),
             py::arg("mounts"), py::arg("memory"), py::arg("output"), py::arg("writes"),
             py::arg("instructions"), py::arg("cpu"), py::arg("files"), py::arg("threads"),
             py::arg("network"), py::arg("confine"), py::arg("trace"), py::arg("trace_json"),
             py::arg("events"), py::arg("seed"), py::arg("standard"), py::arg("engine"),
             py::arg("pool"))
        .def_property_readonly("engine", &PyProcess::engine)
        .def_property_readonly("cpu_seconds", &PyProcess::cpu_seconds)
        .def("run", &PyProcess::run, py::arg("timeout") = py::none(), py::arg("hook") = py::none())
        .def(
            "watch",
            [](const PyProcess& p, u32 number, bool after) { watch(p.get(), number, after); },
            py::arg("number"), py::arg("after"))
        .def("events", [](const PyProcess& p) { return take_events(p.get()); })
        .def_property_readonly("events_lost",
                               [](const PyProcess& p) { return lost_events(p.get()); })
        .def("usage", [](const PyProcess& p) { return usage(p.get()); })
        .def("symbol",
             [](const PyProcess& p, const std::string& name) { return p.get().symbol(name); })
        .def(
            "stop_before_call", [](const PyProcess& p, u32 number) { p.get().stop_before(number); },
            py::arg("number"))
        .def(
            "stop_before_address",
            [](const PyProcess& p, u64 address) { return p.get().stop_before_address(address); },
            py::arg("address"))
        .def("freeze",
             [](const PyProcess& p) {
                 py::gil_scoped_release release;
                 return PyImage{std::make_shared<process::KernelImage>(p.get()), p.engine()};
             })
        .def("reset",
             [](const PyProcess& p) {
                 py::gil_scoped_release release;
                 p.get().reset();
             })
        .def("registers",
             [](const PyProcess& p) {
                 static constexpr const char* kNames[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp",
                                                          "rsi", "rdi", "r8",  "r9",  "r10", "r11",
                                                          "r12", "r13", "r14", "r15"};
                 const GeneralRegisters& registers = p.get().first_thread().registers;
                 py::dict result;
                 for (std::size_t n = 0; n < registers.gpr.size(); ++n) {
                     result[kNames[n]] = registers.gpr[n];
                 }
                 result["rip"] = registers.rip;
                 result["rflags"] = registers.rflags;
                 return result;
             })
        .def("clear_stops", [](const PyProcess& p) { p.get().clear_stops(); })
        .def("call", &PyProcess::call, py::arg("address"), py::arg("arguments"),
             py::arg("timeout") = py::none(), py::arg("hook") = py::none())
        .def("read", &PyProcess::read, py::arg("address"), py::arg("size"))
        .def("write", &PyProcess::write, py::arg("address"), py::arg("data"))
        .def("counts",
             [](const PyProcess& p) {
                 py::dict result;
                 for (const auto& [number, count] : p.get().counts()) {
                     result[process::system_call_name(number).c_str()] =
                         py::make_tuple(count.calls, count.errors);
                 }
                 return result;
             })
        .def("close", &PyProcess::close);

    py::class_<PyImage>(module, "ProcessImage")
        .def(
            "start",
            [](const PyImage& self, const Mounts& mounts, const std::array<int, 3>& standard) {
                process::StandardFiles files = copies_of(standard);
                py::gil_scoped_release release;
                return std::make_unique<PyProcess>(
                    std::make_unique<Kernel>(self.image, mounts_of(mounts), std::move(files)),
                    self.engine);
            },
            py::arg("mounts"), py::arg("standard"));
}

}  // namespace polyvisor::python
