// Disks: the stores they are on, and virtio-blk. A store may be an object of Python's.
#include <pybind11/stl.h>

#include <cerrno>

#include "bindings.hpp"
#include "block/open.hpp"
#include "block/overlay_store.hpp"
#include "virtio/blk.hpp"
#include "virtio_handle.hpp"

namespace polyvisor::python {

namespace {

using block::Operation;
using block::Request;
using block::Store;
using virtio::Blk;

// read(offset, size) -> bytes, write(offset, data), flush(), called on one thread of the disk's
// own. An OSError with an errno is the request's error; any other exception is EIO, and told to
// sys.unraisablehook.
class PyStore final : public Store {
  public:
    PyStore(const py::object& object, u64 size, bool read_only)
        : object_(object),
          name_(py::cast<std::string>(py::type::of(object).attr("__name__"))),
          size_(size),
          writable_(!read_only && py::hasattr(object, "write")),
          flushes_(py::hasattr(object, "flush")) {
        if (!py::hasattr(object, "read")) {
            throw ConfigError("path", "a " + name_ +
                                          " cannot be a disk: it is no path, and has no "
                                          "read(offset, size)");
        }
        if (size == 0 || size % block::kSectorSize != 0) {
            throw ConfigError("path", "a disk has a multiple of 512 bytes; the size of this " +
                                          name_ + " is " + std::to_string(size));
        }
    }
    ~PyStore() override {
        Gil gil;  // the last reference may go on any thread
        object_ = py::object();
    }

    Info info() const override { return {.size = size_, .read_only = !writable_, .threads = 1}; }
    std::string name() const override { return name_; }

    int perform(Request& request) override {
        Gil gil;
        try {
            return call(request);
        } catch (py::error_already_set& error) {
            return errno_of(error);
        } catch (const py::cast_error&) {
            return EIO;
        }
    }

  private:
    int call(Request& request) {
        switch (request.operation) {
            case Operation::kRead: {
                py::object data = object_.attr("read")(request.offset, request.size);
                BufferView view(data, false);
                if (view.bytes().size() != request.size) {
                    PyErr_Format(PyExc_ValueError, "read(%llu, %llu) of a disk gave %zu bytes",
                                 static_cast<unsigned long long>(request.offset),
                                 static_cast<unsigned long long>(request.size),
                                 view.bytes().size());
                    throw py::error_already_set();
                }
                block::scatter(request.buffers, view.bytes());
                return 0;
            }
            case Operation::kWrite: {
                std::string data(request.size, '\0');
                block::gather(request.buffers, {reinterpret_cast<u8*>(data.data()), data.size()});
                object_.attr("write")(request.offset, py::bytes(data));
                break;
            }
            case Operation::kWriteZeroes: {
                constexpr u64 kPiece = 1 << 20;
                const py::bytes zeroes(std::string(std::min(request.size, kPiece), '\0'));
                for (u64 done = 0; done < request.size; done += kPiece) {
                    const u64 size = std::min(request.size - done, kPiece);
                    object_.attr("write")(request.offset + done,
                                          zeroes[py::slice(0, static_cast<py::ssize_t>(size), 1)]);
                }
                break;
            }
            case Operation::kDiscard:
                return 0;  // only advice
            case Operation::kFlush:
                break;
        }
        if (flushes_ && (request.operation == Operation::kFlush || request.durable)) {
            object_.attr("flush")();
        }
        return 0;
    }

    static int errno_of(py::error_already_set& error) {
        if (error.matches(PyExc_OSError)) {
            const py::object code = py::getattr(error.value(), "errno", py::none());
            if (py::isinstance<py::int_>(code)) return std::max(code.cast<int>(), 1);
        }
        error.discard_as_unraisable("a disk written in Python");
        return EIO;
    }

    py::object object_;
    const std::string name_;
    const u64 size_;
    const bool writable_, flushes_;
};

std::shared_ptr<Store> open_image(const std::string& path, const std::string& format,
                                  bool read_only, const std::string& cache, bool snapshot) {
    const block::ImageOptions options{format, read_only, block::parse_cache(cache), snapshot};
    py::gil_scoped_release release;
    return block::open_image(path, options);
}

py::dict to_dict(const Blk::Statistics& statistics) {
    py::dict result;
    auto add = [&](const char* name, const Blk::Count& count) {
        py::dict entry;
        entry["requests"] = count.requests;
        entry["bytes"] = count.bytes;
        entry["errors"] = count.errors;
        result[name] = entry;
    };
    add("read", statistics.read);
    add("write", statistics.write);
    add("flush", statistics.flush);
    add("discard", statistics.discard);
    add("write_zeroes", statistics.write_zeroes);
    result["other"] = statistics.other;
    return result;
}

}  // namespace

void bind_block(py::module_& module) {
    py::class_<Store, std::shared_ptr<Store>>(module, "BlockStore")
        .def_property_readonly("name", &Store::name)
        .def_property_readonly("size", [](const Store& store) { return store.info().size; })
        .def_property_readonly("read_only",
                               [](const Store& store) { return store.info().read_only; });
    module.def("open_image", open_image, py::arg("path"), py::kw_only(), py::arg("image_format"),
               py::arg("read_only"), py::arg("cache"), py::arg("snapshot"));
    module.def(
        "block_object",
        [](const py::object& object, u64 size, bool read_only,
           bool snapshot) -> std::shared_ptr<Store> {
            auto store = std::make_shared<PyStore>(object, size, read_only || snapshot);
            if (!snapshot) return store;
            return std::make_shared<block::OverlayStore>(std::move(store));
        },
        py::arg("source"), py::kw_only(), py::arg("size"), py::arg("read_only"),
        py::arg("snapshot"));

    py::class_<Virtio<Blk>, VirtioHandle>(module, "VirtioBlk")
        .def(py::init([](const PyMachine& machine, const std::shared_ptr<Store>& store,
                         const std::string& io, unsigned queues, const std::string& serial,
                         u64 bytes_per_second, u64 operations_per_second,
                         const std::string& transport, bool packed) {
                 auto core = machine.core();
                 Blk::Config config{.store = store,
                                    .io = block::parse_io(io),
                                    .queues = queues,
                                    .serial = serial,
                                    .rates = {bytes_per_second, operations_per_second}};
                 config.synchronous = core->machine().clock().mode() == Clock::Mode::kDeterministic;
                 return plug<Blk>(core, std::make_shared<Blk>(environment(*core), config),
                                  transport, packed);
             }),
             py::arg("machine"), py::arg("store"), py::kw_only(), py::arg("io"), py::arg("queues"),
             py::arg("serial"), py::arg("bytes_per_second"), py::arg("operations_per_second"),
             py::arg("transport"), py::arg("packed"))
        .def_property_readonly(
            "size",
            [](const Virtio<Blk>& self) { return self.use([](Blk& d) { return d.capacity(); }); })
        .def_property_readonly(
            "io", [](const Virtio<Blk>& self) { return self.use([](Blk& d) { return d.io(); }); })
        .def(
            "resize",
            [](const Virtio<Blk>& self, u64 size) { self.use([&](Blk& d) { d.resize(size); }); },
            py::arg("size"))
        .def("refresh",
             [](const Virtio<Blk>& self) { self.use([](Blk& d) { d.refresh_capacity(); }); })
        .def("statistics", [](const Virtio<Blk>& self) {
            return to_dict(self.use([](Blk& d) { return d.statistics(); }));
        });
}

}  // namespace polyvisor::python
