#include "py_virtio.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <bit>

#include "base/error.hpp"

namespace polyvisor::python {

namespace {

constexpr const char* kNames[] = {"serve",   "accept",    "start",          "stop", "stop_queue",
                                  "quiesce", "unquiesce", "config_written", "save", "restore"};

// The queues that this thread holds, the last one last. Those of one device only, in the order of
// their numbers: so no two threads wait for each other.
struct Taken {
    const Ring* ring;
    const void* device;
    bool alive;
};
thread_local std::vector<Taken> taken;

bool bad_size(u16 size) {
    return !std::has_single_bit(size) || size > virtio::Chain::kMost;
}

[[noreturn]] void refuse(const std::string& device, const char* field, const std::string& why) {
    throw ConfigError(field, "'" + std::string(field) + "' of virtio device " + device + " " + why);
}

template <class T>
T attribute(const py::object& object, const char* name, const std::string& device,
            const char* what) {
    try {
        return object.attr(name).cast<T>();
    } catch (const py::cast_error&) {
        refuse(device, name, std::string("must be ") + what);
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_AttributeError)) throw;
        refuse(device, name, "is missing; derive it from polyvisor.virtio.VirtioDevice");
    }
}

virtio::Description describe(const py::object& object) {
    const auto kind = py::cast<std::string>(py::type::of(object).attr("__name__"));
    virtio::Description result;
    result.name = attribute<std::string>(object, "name", kind, "a str");
    result.type = attribute<u16>(object, "device_type", kind, "a number up to 65535");
    result.features = attribute<u64>(object, "features", kind, "an int of 64 bits");
    result.pci_class = attribute<u32>(object, "pci_class", kind, "an int of 24 bits");
    result.queue_sizes =
        attribute<std::vector<u16>>(object, "queue_sizes", kind, "a sequence of sizes");
    const auto config = attribute<py::object>(object, "config", kind, "bytes");
    if (!py::isinstance<py::bytes>(config)) refuse(kind, "config", "must be bytes");
    result.config_size = static_cast<u32>(py::len(config));
    if (result.type == 0) refuse(kind, "device_type", "cannot be 0");
    if ((result.features & (~bit(24) + 1) & (bit(50) - 1)) != 0) {
        refuse(kind, "features", "has bits of 24 to 49, which are the transport's (virtio 1.2, 6)");
    }
    if (std::ranges::any_of(result.queue_sizes, bad_size)) {
        refuse(kind, "queue_sizes", "must be powers of two, at most 1024");
    }
    return result;
}

}  // namespace

bool holds_queues() {
    return !taken.empty();
}

// --- A queue
// ---------------------------------------------------------------------------------------

class PyRing final : public Ring {
  public:
    PyRing(PyVirtioDevice& device, std::shared_ptr<GuestMemory> memory, std::weak_ptr<void> owner,
           unsigned index)
        : Ring(std::move(memory), device.name(), index),
          owned_(std::move(owner)),
          native_(&device) {}

    std::string take() noexcept override {
        for (const Taken& other : taken) {
            if (other.device == native_ && other.ring->index() < index()) continue;
            return "this thread holds queue " + std::to_string(other.ring->index()) + " of " +
                   other.ring->device() + ", so it cannot wait for queue " +
                   std::to_string(index()) + " of " + device() +
                   "; hold queues of one device, in the order of their numbers";
        }
        auto owner = owned_.lock();
        if (!owner) return "the machine of this " + device() + " is closed";
        auto held = native_->hold(index());
        const bool alive = static_cast<bool>(held);
        if (alive) {
            held_.emplace(std::move(held));
            keep_ = std::move(owner);
            begin(held_->queue());
        }
        taken.push_back({this, native_, alive});
        return {};
    }

    void give() noexcept override {
        auto mine = std::ranges::find(taken, static_cast<const Ring*>(this), &Taken::ring);
        if (mine == taken.end()) return;
        const bool alive = mine->alive;
        taken.erase(mine);
        if (!alive) return;
        end();
        // The next one may come as soon as the queue is let go of, and bring its own of each.
        auto keep = std::move(keep_);
        auto held = std::move(*held_);
        held_.reset();
    }

    bool taken_dead() const noexcept override {
        auto mine = std::ranges::find(taken, static_cast<const Ring*>(this), &Taken::ring);
        return mine != taken.end() && !mine->alive;
    }

    /// Around a handler, which is called with the queue held.
    class Serving {
      public:
        Serving(PyRing& ring, virtio::Queue& queue) : ring_(ring) {
            taken.push_back({&ring, ring.native_, true});
            ring.begin(queue);
        }
        ~Serving() {
            ring_.end();
            std::erase_if(taken, [this](const Taken& other) { return other.ring == &ring_; });
        }
        Serving(const Serving&) = delete;
        Serving& operator=(const Serving&) = delete;

      private:
        PyRing& ring_;
    };

  private:
    std::weak_ptr<void> owned_;
    PyVirtioDevice* native_;      // as long as the owner lives
    std::shared_ptr<void> keep_;  // the owner, and what follows: of who took it
    std::optional<virtio::Device::Held> held_;
};

// --- The device
// ------------------------------------------------------------------------------------

PyVirtioDevice::PyVirtioDevice(const virtio::Environment& environment,
                               std::shared_ptr<GuestMemory> memory, std::weak_ptr<void> owner,
                               const py::object& object, Failed failed)
    : Device(environment, describe(object)),
      failed_(std::move(failed)),
      guest_memory_(std::move(memory)),
      object_(object) {
    const auto config = object.attr("config").cast<std::string>();
    set_config(0, {reinterpret_cast<const u8*>(config.data()), config.size()});
    writable_ = attribute<std::vector<std::pair<u32, u32>>>(object, "writable_config", name(),
                                                            "a sequence of (offset, size)");
    auto make = py::module_::import("polyvisor._ring").attr("_queue");
    for (unsigned i = 0; i < queues(); ++i) {
        rings_.push_back(std::make_shared<PyRing>(*this, guest_memory_, owner, i));
        std::shared_ptr<Ring> ring = rings_.back();
        queues_.push_back(make(py::capsule(&ring, "polyvisor.Ring")));
    }
    for (int i = 0; i < kMethods; ++i) {
        py::object found = py::getattr(object, kNames[i], py::none());
        if (!found.is_none()) methods_[i] = found.release().ptr();
    }
}

PyVirtioDevice::~PyVirtioDevice() {
    Gil gil;  // the last reference may go on any thread
    let_go();
}

void PyVirtioDevice::release() {
    call(kStop);
    let_go();
}

void PyVirtioDevice::let_go() {
    for (PyObject*& method : methods_) Py_CLEAR(method);
    queues_.clear();
    object_ = py::object();
}

py::object PyVirtioDevice::queue(unsigned index) const {
    if (index < queues_.size()) return queues_[index];
    throw ConfigError("index", name() + " has no queue " + std::to_string(index) + ", only " +
                                   std::to_string(queues_.size()));
}

void PyVirtioDevice::raised(const char* kind, u64 where) const {
    failed_({name(), kind, where});
}

void PyVirtioDevice::serve(unsigned index, virtio::Queue& queue) {
    bool good = true;
    {
        Gil gil;
        if (PV_UNLIKELY(methods_[kServe] == nullptr)) return;
        // (Another thread may release() this meanwhile.)
        auto handler = py::reinterpret_borrow<py::object>(methods_[kServe]);
        py::object argument = queues_[index];
        PyRing::Serving serving(*rings_[index], queue);
        PyObject* args[2] = {nullptr, argument.ptr()};
        PyObject* result = PyObject_Vectorcall(handler.ptr(), args + 1,
                                               1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
        good = result != nullptr;
        if (PV_UNLIKELY(!good)) raised("serve", index);
        Py_XDECREF(result);
    }
    if (!good) fail("its device raised an exception");  // (may wait for a transport: no GIL)
}

template <class... Arguments>
bool PyVirtioDevice::call(Method method, Arguments... arguments) {
    bool answer = false;
    {
        Gil gil;
        if (methods_[method] == nullptr) return true;
        try {
            auto handler = py::reinterpret_borrow<py::object>(methods_[method]);
            answer = py::cast<bool>(py::bool_(handler(arguments...)));
            return answer;
        } catch (py::error_already_set& error) {
            error.restore();
            raised(kNames[method]);
        }
    }
    fail("its device raised an exception");
    return false;
}

bool PyVirtioDevice::accept(u64 features) {
    return call(kAccept, features);
}

void PyVirtioDevice::start(u64 features) {
    call(kStart, features);
}

void PyVirtioDevice::stop() {
    for (auto& ring : rings_) ring->forget();
    call(kStop);
}

void PyVirtioDevice::stop_queue(unsigned index) {
    rings_[index]->forget();
    call(kStopQueue, index);
}

void PyVirtioDevice::quiesce() {
    call(kQuiesce);
}

void PyVirtioDevice::unquiesce() {
    call(kUnquiesce);
}

void PyVirtioDevice::config_written(u32 offset, u32 size) {
    call(kConfigWritten, offset, size);
}

bool PyVirtioDevice::config_writable(u32 offset) const {
    return std::ranges::any_of(writable_, [&](const auto& range) {
        return offset >= range.first && offset - range.first < range.second;
    });
}

std::vector<u8> PyVirtioDevice::save_device() const {
    Gil gil;
    if (methods_[kSave] == nullptr) return {};
    std::string refused;
    try {
        auto bytes = py::reinterpret_borrow<py::object>(methods_[kSave])().cast<std::string>();
        return {bytes.begin(), bytes.end()};
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::cast_error&) {
        PyErr_Format(PyExc_TypeError, "%s.save() must return bytes", name().c_str());
    }
    raised("save");
    return {};
}

void PyVirtioDevice::restore_device(std::span<const u8> state) {
    std::string refused;
    {
        Gil gil;
        if (methods_[kRestore] == nullptr) return;
        try {
            py::reinterpret_borrow<py::object>(methods_[kRestore])(
                py::bytes(reinterpret_cast<const char*>(state.data()), state.size()));
            return;
        } catch (py::error_already_set& error) {
            refused = error.what();
        }
    }
    throw StateError(name(), "device " + name() + ": " + refused);
}

std::shared_ptr<PyVirtioDevice> make_virtio(const virtio::Environment& environment,
                                            std::shared_ptr<GuestMemory> memory,
                                            const std::shared_ptr<void>& owner,
                                            const py::object& object,
                                            PyVirtioDevice::Failed failed) {
    if (!py::getattr(object, "port", py::none()).is_none()) {
        throw ConfigError("device", "this " + py::cast<std::string>(py::str(object.attr("name"))) +
                                        " is plugged in somewhere already; make another one");
    }
    auto device = std::make_shared<PyVirtioDevice>(environment, std::move(memory), owner, object,
                                                   std::move(failed));
    object.attr("port") = VirtioPort(owner, device);
    return device;
}

}  // namespace polyvisor::python
