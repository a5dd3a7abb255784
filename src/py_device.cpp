#include "py_device.hpp"

#include <fcntl.h>
#include <pybind11/stl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "base/error.hpp"
#include "py_virtio.hpp"

namespace polyvisor::python {

namespace {

// What this thread asked for with keep_thread_state(), and has made since.
thread_local bool keep_wanted = false;
thread_local PyThreadState* kept_state = nullptr;

PyObject* method(const py::object& object, const char* name) {
    py::object found = py::getattr(object, name, py::none());
    return found.is_none() ? nullptr : found.release().ptr();
}

// Only its name in /proc tells: to try a write would spoil any other file.
bool is_eventfd(int fd) {
    char target[32];
    std::string link = "/proc/self/fd/" + std::to_string(fd);
    ssize_t size = ::readlink(link.c_str(), target, sizeof target);
    return size > 0 &&
           std::string_view(target, static_cast<std::size_t>(size)) == "anon_inode:[eventfd]";
}

}  // namespace

void Gil::keep_thread_state() {
    keep_wanted = true;
}

void Gil::drop_thread_state() {
    keep_wanted = false;
    if (kept_state == nullptr) return;
    PyEval_RestoreThread(kept_state);
    kept_state = nullptr;
    PyGILState_Release(PyGILState_UNLOCKED);  // the one that Gil() left open
}

Gil::Gil() {
    if (PV_UNLIKELY(keep_wanted)) {
        keep_wanted = false;
        PyGILState_Ensure();
        kept_state = PyEval_SaveThread();
    }
    state_ = PyGILState_Ensure();
}

Gil::~Gil() {
    PyGILState_Release(state_);
}

Core::Core(MachineConfig config) {
    config.log = [this](std::string_view line) {
        std::lock_guard lock(log_mutex_);
        if (log_.size() < kLogLines) log_.emplace_back(line);
    };
    config.thread_hooks = {Gil::keep_thread_state, Gil::drop_thread_state};
    machine_ = std::make_unique<Machine>(std::move(config));
}

Core::~Core() {
    // Everything that may call into Python went with release(); what is left are C++ threads.
    machine_.reset();
}

std::shared_ptr<PyDevice> Core::device(const py::object& object) {
    auto& device = devices_[object.ptr()];
    if (!device) {
        try {
            device = std::make_shared<PyDevice>(*this, object);
        } catch (...) {
            devices_.erase(object.ptr());
            throw;
        }
    }
    return device;
}

void Core::detached(Bus& bus, u64 start) {
    std::erase(claims_, std::pair{&bus, start});
}

void Core::release() {
    for (auto& [bus, start] : std::exchange(claims_, {})) bus->detach(start);
    machine_->pio().release_detached();
    machine_->mmio().release_detached();
    for (PyTimer* timer : std::set(timers_)) timer->release();
    std::exchange(devices_, {}).clear();
    for (const auto& plugged : std::exchange(virtio_, {})) {
        if (auto device = plugged.lock()) device->release();
    }
    exception_ = py::object();  // what is left of a Core is destroyed without the GIL
}

void Core::fail(const Access& access) {
    using py::literals::operator""_a;
    py::error_already_set error;
    py::object value = error.value();
    if (error.trace()) PyException_SetTraceback(value.ptr(), error.trace().ptr());
    std::string where = "device " + access.device + " raised in " + access.kind;
    if (access.size != 0) {
        where += py::str("(offset {:#x}, {} bytes)").format(access.offset, access.size);
    }
    if (exception_.is_none()) {
        exception_ = value;
        // Only exceptions with slots have no place for this, and then there are no details.
        py::dict details("device"_a = access.device, "access"_a = access.kind,
                         "offset"_a = access.offset, "size"_a = access.size);
        if (PyObject_SetAttrString(value.ptr(), "__polyvisor_access__", details.ptr()) != 0) {
            PyErr_Clear();
        }
    }
    machine_->request_end({StopReason::kDeviceError, 0, where, 0});
}

std::vector<std::string> Core::log() const {
    std::lock_guard lock(log_mutex_);
    return log_;
}

PyDevice::PyDevice(Core& core, const py::object& object)
    : core_(core),
      name_(py::cast<std::string>(py::type::of(object).attr("__name__"))),
      object_(object),
      read_(method(object, "read")),
      write_(method(object, "write")) {
    if (read_ == nullptr && write_ == nullptr) {
        throw ConfigError("device", "a " + name_ +
                                        " cannot be a device: it has neither read(offset, size) "
                                        "nor write(offset, size, value)");
    }
    take_doorbells();
}

// Reads the attribute once, while the GIL is here: engines ask for doorbells with a bus locked.
void PyDevice::take_doorbells() {
    auto refuse = [this](const std::string& why) {
        return ConfigError(
            "doorbells",
            "doorbells of a " + name_ + " must be (offset, size, value or None, eventfd): " + why);
    };
    py::object given = py::getattr(object_, "doorbells", py::none());
    if (given.is_none()) return;
    try {
        for (py::handle entry : given) {
            auto [offset, size, value, file] =
                entry.cast<std::tuple<u64, u8, std::optional<u64>, py::object>>();
            if (size > 8 || (size & (size - 1)) != 0) throw refuse("size is 0 (any), 1, 2, 4 or 8");
            if (value && size < 8 && size != 0 && *value >> (8 * size) != 0) {
                throw refuse("the value is too large for the size");
            }
            int fd = PyObject_AsFileDescriptor(file.ptr());
            if (fd < 0) throw py::error_already_set();
            OwnedFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
            if (!copy || !is_eventfd(copy.get())) {
                throw refuse("file descriptor " + std::to_string(fd) +
                             " is no eventfd (os.eventfd makes one)");
            }
            bells_.push_back({offset, size, value.has_value(), value.value_or(0), copy.get()});
            bell_fds_.push_back(std::move(copy));
        }
    } catch (const py::cast_error&) {
        throw refuse("this is something else");
    } catch (const py::error_already_set& error) {
        throw refuse(error.what());
    }
}

// What an engine that knows no doorbells has to do itself.
bool PyDevice::ring(u64 offset, std::span<const u8> data) const {
    for (const Doorbell& bell : bells_) {
        if (bell.offset != offset || (bell.size != 0 && bell.size != data.size())) continue;
        u64 value = 0;
        std::copy_n(data.begin(), std::min<std::size_t>(data.size(), 8),
                    reinterpret_cast<u8*>(&value));
        if (bell.matches && bell.value != value) continue;
        return ::eventfd_write(bell.event_fd, 1) == 0;
    }
    return false;
}

PyDevice::~PyDevice() {
    Gil gil;  // the last reference may go on any thread
    Py_XDECREF(read_);
    Py_XDECREF(write_);
    object_ = py::object();
}

template <class Body>
void PyDevice::enter(const Access& access, Body body) const {
    std::lock_guard lock(mutex_);
    Gil gil;
    if (!body()) core_.fail(access);
}

void PyDevice::read(u64 offset, std::span<u8> data) {
    if (read_ == nullptr) {
        std::ranges::fill(data, u8{0xff});
        return;
    }
    bool served = false;
    enter({name_, "read", offset, data.size()}, [&] {
        PyObject* args[3] = {nullptr, PyLong_FromUnsignedLongLong(offset),
                             PyLong_FromSize_t(data.size())};
        PyObject* result = nullptr;
        if (PV_LIKELY(args[1] != nullptr && args[2] != nullptr)) {
            result =
                PyObject_Vectorcall(read_, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
        }
        Py_XDECREF(args[1]);
        Py_XDECREF(args[2]);
        if (PV_UNLIKELY(result == nullptr)) return false;
        if (PV_UNLIKELY(!PyLong_Check(result))) {
            PyErr_Format(PyExc_TypeError, "%s.read() must return an int, not %.80s", name_.c_str(),
                         Py_TYPE(result)->tp_name);
        } else if (data.size() <= 8) {
            u64 value = PyLong_AsUnsignedLongLongMask(result);
            std::copy_n(reinterpret_cast<const u8*>(&value), data.size(), data.data());
            served = true;
        } else {  // AVX and bulk accesses to memory
            try {
                auto width = py::int_(8 * data.size());
                py::object low = py::reinterpret_borrow<py::int_>(result) &
                                 ((py::int_(1) << width) - py::int_(1));
                auto bytes = low.attr("to_bytes")(data.size(), "little").cast<std::string>();
                std::copy(bytes.begin(), bytes.end(), data.begin());
                served = true;
            } catch (py::error_already_set& error) {
                error.restore();
            }
        }
        Py_DECREF(result);
        return served;
    });
    if (!served) std::ranges::fill(data, u8{0xff});
}

void PyDevice::write(u64 offset, std::span<const u8> data) {
    if (PV_UNLIKELY(!bells_.empty()) && ring(offset, data)) return;
    if (write_ == nullptr) return;
    enter({name_, "write", offset, data.size()}, [&] {
        PyObject* number;
        if (PV_LIKELY(data.size() <= 8)) {
            u64 value = 0;
            std::copy(data.begin(), data.end(), reinterpret_cast<u8*>(&value));
            number = PyLong_FromUnsignedLongLong(value);
        } else {
            number = PyObject_CallMethod(reinterpret_cast<PyObject*>(&PyLong_Type), "from_bytes",
                                         "y#s", reinterpret_cast<const char*>(data.data()),
                                         static_cast<Py_ssize_t>(data.size()), "little");
        }
        PyObject* args[4] = {nullptr, PyLong_FromUnsignedLongLong(offset),
                             PyLong_FromSize_t(data.size()), number};
        PyObject* result = nullptr;
        if (PV_LIKELY(args[1] != nullptr && args[2] != nullptr && number != nullptr)) {
            result =
                PyObject_Vectorcall(write_, args + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
        }
        for (PyObject* arg : args) Py_XDECREF(arg);
        Py_XDECREF(result);
        return result != nullptr;
    });
}

void PyDevice::reset() {
    enter({name_, "reset"}, [&] {
        if (!py::hasattr(object_, "reset")) return true;
        PyObject* result = PyObject_CallMethod(object_.ptr(), "reset", nullptr);
        Py_XDECREF(result);
        return result != nullptr;
    });
}

std::vector<u8> PyDevice::save() const {
    std::vector<u8> state;
    enter({name_, "save"}, [&] {
        if (!py::hasattr(object_, "save")) return true;
        try {
            auto bytes = object_.attr("save")().cast<std::string>();
            state.assign(bytes.begin(), bytes.end());
            return true;
        } catch (py::error_already_set& error) {
            error.restore();
        } catch (const py::cast_error&) {
            PyErr_Format(PyExc_TypeError, "%s.save() must return bytes", name_.c_str());
        }
        return false;
    });
    return state;
}

void PyDevice::restore(std::span<const u8> state) {
    std::string refused;
    {
        std::lock_guard lock(mutex_);
        Gil gil;
        if (!py::hasattr(object_, "restore")) return;
        try {
            object_.attr("restore")(
                py::bytes(reinterpret_cast<const char*>(state.data()), state.size()));
        } catch (py::error_already_set& error) {
            refused = error.what();
        }
    }
    if (!refused.empty()) throw StateError(name_, "device " + name_ + ": " + refused);
}

PyTimer::PyTimer(std::shared_ptr<Core> core, py::object callback)
    : core_(std::move(core)), callback_(std::move(callback)) {
    if (!PyCallable_Check(callback_.ptr())) {
        throw ConfigError("callback", "a timer's callback must be callable");
    }
    timer_ = std::make_unique<Timer>(core_->machine().clock(), [this] { fire(); });
    core_->timers_.insert(this);
}

PyTimer::~PyTimer() {
    release();
}

Timer& PyTimer::timer() {
    if (!timer_) throw StateMismatch("the machine of this timer is closed");
    return *timer_;
}

void PyTimer::release() {
    if (!timer_) return;
    core_->timers_.erase(this);
    auto timer = std::move(timer_);
    {
        py::gil_scoped_release release;  // a callback in progress wants the GIL
        timer.reset();
    }
    callback_ = py::none();
    core_.reset();
}

void PyTimer::fire() {
    Gil gil;
    py::object callback = callback_;  // the call may drop this timer
    auto core = core_;
    if (!core || callback.is_none()) return;
    std::string name = py::str(py::getattr(callback, "__qualname__", py::str("callback")));
    PyObject* result = PyObject_CallNoArgs(callback.ptr());
    if (result == nullptr) core->fail({name, "timer"});
    Py_XDECREF(result);
}

}  // namespace polyvisor::python
