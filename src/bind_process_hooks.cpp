// System calls of a process VM, as Python sees them: while a hook looks at one, and as events.
#include "process_hooks.hpp"

#include <fcntl.h>
#include <pybind11/stl.h>

#include "base/error.hpp"
#include "process/signatures.hpp"
#include "process/thread.hpp"
#include "process/trace.hpp"

namespace polyvisor::python {

namespace {

using process::Arguments;
using process::Event;
using process::Inquiry;
using process::Kernel;
using process::Thread;

py::str file_name(const std::string& bytes) {
    PyObject* text =
        PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<py::ssize_t>(bytes.size()));
    if (text == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(text);
}

/// A hook's argument. What it was called with stays; the program can be reached through it only
/// until the hook returns.
class SystemCall {
  public:
    SystemCall(Kernel& kernel, std::shared_ptr<Inquiry> inquiry)
        : number(inquiry->number),
          arguments(inquiry->arguments),
          after(inquiry->when == Inquiry::When::kAfter),
          result(inquiry->result),
          nanoseconds(inquiry->nanoseconds),
          pid(inquiry->pid),
          tid(inquiry->tid),
          kernel_(&kernel),
          inquiry_(std::move(inquiry)) {}

    void close() { inquiry_.reset(); }

    u64 argument(std::size_t n) const {
        if (n >= arguments.size()) throw py::index_error("a system call has arguments 0 to 5");
        return arguments[n];
    }

    py::str string(std::size_t n) const {
        const u64 address = argument(n);
        std::optional<std::string> found;
        with_thread([&](Thread& thread) { found = thread.show_string(address); });
        if (!found) throw_fault("there is no string of less than 4096 bytes", address);
        return file_name(*found);
    }

    py::str path(std::size_t n) const {
        const u64 address = argument(n);
        std::optional<std::string> found;
        with_thread([&](Thread& thread) {
            found = thread.show_string(address);
            if (found) *found = resolve(thread, n, std::move(*found));
        });
        if (!found) throw_fault("there is no path of less than 4096 bytes", address);
        return file_name(*found);
    }

    std::optional<py::str> fd_path(s64 number) const {
        std::optional<std::string> found;
        with_thread([&](Thread& thread) {
            auto* entry = thread.descriptors().find(static_cast<u64>(number));
            if (entry != nullptr) found = entry->file->path;
        });
        if (!found) return std::nullopt;
        return file_name(*found);
    }

    py::bytes read(u64 address, u64 size) const {
        std::string bytes;
        bool good = false;
        with_thread([&](Thread& thread) {
            // All of it is there before as much memory is taken as a program may have named.
            std::vector<iovec> parts;
            if (!thread.space().spans(address, size, false, parts)) return;
            bytes.resize(size);
            good = thread.space().copy_in(address, {reinterpret_cast<u8*>(bytes.data()), size});
        });
        if (!good) throw_fault(std::to_string(size) + " bytes cannot be read", address);
        return py::bytes(bytes);
    }

    void write(u64 address, const py::buffer& data) const {
        const BufferView view(data, false);
        bool good = false;
        with_thread([&](Thread& thread) { good = thread.space().copy_out(address, view.bytes()); });
        if (!good) {
            throw_fault(std::to_string(view.bytes().size()) + " bytes cannot be written", address);
        }
    }

    const u32 number;
    const Arguments arguments;
    const bool after;
    const s64 result;
    const u64 nanoseconds;
    const int pid, tid;

  private:
    template <class Use>
    void with_thread(Use use) const {
        if (!inquiry_) {
            throw StateMismatch(
                "this system call is over: its program can be reached only until the hook returns");
        }
        py::gil_scoped_release release;
        std::lock_guard lock(kernel_->mutex());
        if (inquiry_->thread == nullptr) {
            throw StateMismatch("the thread of this system call was ended while a hook looked");
        }
        use(*inquiry_->thread);
    }

    // Where it leads in the program's tree, or if that is nowhere, what it says.
    std::string resolve(Thread& thread, std::size_t n, std::string path) const {
        if (path.empty()) return path;
        const process::Signature* signature = process::find_signature(number);
        std::string from = thread.process().directory;
        if (path.front() != '/' && n > 0 && signature != nullptr &&
            signature->kinds[n - 1] == process::Kind::kFolder &&
            static_cast<s32>(arguments[n - 1]) != AT_FDCWD) {
            const u64 folder = static_cast<u32>(arguments[n - 1]);
            auto* entry = thread.descriptors().find(folder);
            if (entry == nullptr || !entry->file->path.starts_with('/')) return path;
            from = entry->file->path;
        }
        process::Tree::Place place;
        if (thread.kernel().tree().walk(from, path, process::Tree::kFollow, place) == 0) {
            return place.path;
        }
        return path.front() == '/' ? path : from + (from.ends_with('/') ? "" : "/") + path;
    }

    [[noreturn]] static void throw_fault(const std::string& what, u64 address) {
        const py::object fault = py::module_::import("polyvisor.errors").attr("MemoryFault");
        const std::string where = process::hexadecimal(address);
        py::object error =
            fault(what + " at the program's address " + where, py::arg("gva") = address);
        PyErr_SetObject(fault.ptr(), error.ptr());
        throw py::error_already_set();
    }

    Kernel* kernel_;
    std::shared_ptr<Inquiry> inquiry_;
};

s64 deny(const SystemCall&, int error) {
    if (error <= 0 || error >= 4096) {
        throw ConfigError("errno",
                          "a system call is denied with an errno, such as errno.EACCES, "
                          "not with " +
                              std::to_string(error));
    }
    return -error;
}

std::optional<s64> to_answer(const SystemCall& call, const py::object& answer) {
    if (answer.is_none()) return std::nullopt;
    const std::string name = process::system_call_name(call.number);
    if (call.after) {
        throw py::type_error("a hook that sees the result of " + name + " must return None");
    }
    if (!PyLong_Check(answer.ptr()) || PyBool_Check(answer.ptr())) {
        throw py::type_error("a hook of " + name +
                             " must return None, an int, or call.deny(errno), "
                             "not " +
                             py::repr(answer).cast<std::string>());
    }
    int overflow = 0;
    const s64 result = PyLong_AsLongLongAndOverflow(answer.ptr(), &overflow);
    if (overflow == 0) return result;
    const u64 unsigned_result = PyLong_AsUnsignedLongLong(answer.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return static_cast<s64>(unsigned_result);
}

}  // namespace

namespace {

bool is_over(Kernel& kernel, const Inquiry& inquiry) {
    py::gil_scoped_release release;
    std::lock_guard lock(kernel.mutex());
    return inquiry.thread == nullptr;
}

}  // namespace

bool serve_inquiry(Kernel& kernel, py::handle hook) {
    std::shared_ptr<Inquiry> inquiry;
    {
        py::gil_scoped_release release;
        std::lock_guard lock(kernel.mutex());
        inquiry = kernel.observer.next();
    }
    if (!inquiry) return false;
    if (hook.is_none()) throw StateMismatch("a system call is watched, but nobody looks at it");
    auto call = std::make_shared<SystemCall>(kernel, inquiry);
    std::optional<s64> answer;
    try {
        answer = to_answer(*call, hook(call));
    } catch (py::error_already_set& error) {
        call->close();
        // What the program does meanwhile (it ends) is no mistake of the hook's.
        const py::object ended = py::module_::import("polyvisor.errors").attr("StateMismatch");
        if (is_over(kernel, *inquiry) && error.matches(ended)) return true;
        throw;
    }
    call->close();
    py::gil_scoped_release release;
    std::lock_guard lock(kernel.mutex());
    kernel.observer.answer(*inquiry, answer);
    return true;
}

void watch(Kernel& kernel, u32 number, bool after) {
    py::gil_scoped_release release;
    std::lock_guard lock(kernel.mutex());
    kernel.observer.watch(number, after ? Inquiry::When::kAfter : Inquiry::When::kBefore);
}

u64 lost_events(Kernel& kernel) {
    py::gil_scoped_release release;
    std::lock_guard lock(kernel.mutex());
    return kernel.observer.trace() == nullptr ? 0 : kernel.observer.trace()->lost();
}

py::dict usage(Kernel& kernel) {
    constexpr const char* kLimits[] = {"memory", "cpu",     "instructions", "output",
                                       "files",  "threads", "writes"};
    process::Usage used;
    u64 cpu_time = 0, output = 0, written = 0;
    {
        py::gil_scoped_release release;
        used = kernel.usage();
        cpu_time = kernel.cpu_time();
        std::lock_guard lock(kernel.mutex());
        output = kernel.config().output - kernel.output_left;
        written = kernel.config().writes - kernel.writes_left;
    }
    py::list limits;
    for (unsigned n = 0; n < std::size(kLimits); ++n) {
        if (used.limits & bit(n)) limits.append(kLimits[n]);
    }
    py::dict result;
    result["cpu_seconds"] = static_cast<double>(cpu_time) * 1e-9;
    result["instructions"] = used.instructions;
    result["output"] = output;
    result["written"] = written;
    result["processes"] = used.processes;
    result["threads"] = used.threads;
    result["limits"] = py::tuple(limits);
    return result;
}

py::list take_events(Kernel& kernel) {
    std::deque<Event> events;
    {
        py::gil_scoped_release release;
        std::lock_guard lock(kernel.mutex());
        if (kernel.observer.trace() != nullptr) events = kernel.observer.trace()->take();
    }
    constexpr const char* kKinds[] = {"call", "signal", "end"};
    py::list list;
    for (const Event& event : events) {
        const bool is_call = event.kind == Event::Kind::kCall;
        const bool failed = event.finished && event.result < 0 && event.result > -4096;
        py::dict strings;
        for (const auto& [n, bytes] : event.strings) strings[py::int_(n)] = file_name(bytes);
        py::dict fields;
        fields["kind"] = kKinds[static_cast<unsigned>(event.kind)];
        fields["pid"] = event.pid;
        fields["tid"] = event.tid;
        fields["start"] = static_cast<double>(event.start) * 1e-9;
        fields["duration"] = static_cast<double>(event.nanoseconds) * 1e-9;
        fields["name"] = is_call ? process::system_call_name(event.number) : "";
        fields["args"] = is_call ? py::object(py::tuple(py::cast(event.arguments))) : py::tuple();
        fields["text"] = py::tuple(py::cast(event.texts));
        fields["strings"] = strings;
        fields["result"] = event.finished ? py::object(py::int_(event.result)) : py::none();
        fields["errno"] = failed ? -event.result : 0;
        fields["line"] = event.line();
        list.append(std::move(fields));
    }
    return list;
}

void bind_process_hooks(py::module_& module) {
    py::class_<SystemCall, std::shared_ptr<SystemCall>>(module, "SystemCall")
        .def_readonly("number", &SystemCall::number)
        .def_property_readonly(
            "name", [](const SystemCall& c) { return process::system_call_name(c.number); })
        .def_property_readonly("args",
                               [](const SystemCall& c) { return py::tuple(py::cast(c.arguments)); })
        .def_readonly("pid", &SystemCall::pid)
        .def_readonly("tid", &SystemCall::tid)
        .def_property_readonly("result",
                               [](const SystemCall& c) {
                                   return c.after ? py::object(py::int_(c.result)) : py::none();
                               })
        .def_property_readonly(
            "duration",
            [](const SystemCall& c) { return static_cast<double>(c.nanoseconds) * 1e-9; })
        .def("string", &SystemCall::string, py::arg("argument"))
        .def("path", &SystemCall::path, py::arg("argument"))
        .def("fd_path", &SystemCall::fd_path, py::arg("number"))
        .def("read", &SystemCall::read, py::arg("address"), py::arg("size"))
        .def("write", &SystemCall::write, py::arg("address"), py::arg("data"))
        .def("deny", &deny, py::arg("errno"));
}

}  // namespace polyvisor::python
