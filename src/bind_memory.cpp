// Guest memory: copies by address, and regions that support the buffer protocol.
#include <pybind11/stl.h>

#include "base/error.hpp"
#include "bindings.hpp"
#include "handles.hpp"
#include "memory/guest_memory.hpp"

namespace polyvisor::python {

namespace {

// A region together with the memory it is part of, which a memoryview therefore keeps alive.
struct Region {
    std::shared_ptr<GuestMemory> memory;
    const GuestMemory::Region* region;
};

// Copies larger than this let other threads run meanwhile.
constexpr std::size_t kLongCopy = 256 * 1024;

template <class Copy>
void copy(std::size_t size, Copy step) {
    if (size < kLongCopy) return step();
    py::gil_scoped_release release;
    step();
}

py::bytes read(const GuestMemory& memory, u64 gpa, u64 size) {
    // Asks first: a wild size must fail as a range, not as an allocation.
    if (size > memory.total_size()) memory.checked(Gpa(gpa), size);
    py::bytes result(nullptr, static_cast<std::size_t>(size));
    auto* data = reinterpret_cast<u8*>(PyBytes_AS_STRING(result.ptr()));
    copy(size, [&] { memory.read(Gpa(gpa), {data, static_cast<std::size_t>(size)}); });
    return result;
}

}  // namespace

BufferView::BufferView(py::handle object, bool writable) {
    int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
}

void bind_memory(py::module_& module) {
    py::class_<Region>(module, "Region", py::buffer_protocol())
        .def_property_readonly("start", [](const Region& r) { return r.region->start.value; })
        .def_property_readonly("size", [](const Region& r) { return r.region->size; })
        .def_property_readonly("name", [](const Region& r) { return r.region->name; })
        .def_property_readonly("read_only", [](const Region& r) { return r.region->read_only; })
        .def("__len__", [](const Region& r) { return r.region->size; })
        .def_buffer([](Region& r) {
            return py::buffer_info(r.region->mapping.data(), 1, "B", 1,
                                   {static_cast<py::ssize_t>(r.region->size)}, {py::ssize_t{1}},
                                   r.region->sealed);
        });

    py::class_<PyDirtyLog>(module, "DirtyLog")
        .def_property_readonly("active", &PyDirtyLog::active)
        .def_property_readonly("method", &PyDirtyLog::method)
        .def("fetch", &PyDirtyLog::fetch)
        .def("stop", &PyDirtyLog::stop);

    py::class_<GuestMemory, std::shared_ptr<GuestMemory>>(module, "GuestMemory")
        .def(py::init([](const std::vector<std::pair<u64, u64>>& regions) {
                 auto memory = std::make_shared<GuestMemory>();
                 for (auto [start, size] : regions) memory->add(Gpa(start), size, "ram");
                 return memory;
             }),
             py::arg("regions"))
        .def_property_readonly("regions",
                               [](const std::shared_ptr<GuestMemory>& memory) {
                                   std::vector<Region> result;
                                   for (const auto& region : memory->regions()) {
                                       result.push_back({memory, region.get()});
                                   }
                                   return result;
                               })
        .def_property_readonly("total_size", &GuestMemory::total_size)
        .def("read", &read, py::arg("gpa"), py::arg("size"))
        .def(
            "read_into",
            [](const GuestMemory& memory, u64 gpa, const py::object& buffer) {
                BufferView view(buffer, true);
                copy(view.bytes().size(), [&] { memory.read(Gpa(gpa), view.bytes()); });
            },
            py::arg("gpa"), py::arg("buffer"))
        .def(
            "write",
            [](GuestMemory& memory, u64 gpa, const py::object& data) {
                BufferView view(data, false);
                copy(view.bytes().size(), [&] { memory.write(Gpa(gpa), view.bytes()); });
            },
            py::arg("gpa"), py::arg("data"))
        .def(
            "discard",
            [](GuestMemory& memory, u64 gpa, u64 size) {
                py::gil_scoped_release release;
                return memory.discard(Gpa(gpa), size);
            },
            py::arg("gpa"), py::arg("size"))
        .def(
            "note_write",
            [](GuestMemory& memory, u64 gpa, u64 size) {
                if (size != 0) memory.checked(Gpa(gpa), size);
                memory.note_write(Gpa(gpa), size);
            },
            py::arg("gpa"), py::arg("size"));
}

}  // namespace polyvisor::python
