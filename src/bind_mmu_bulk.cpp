// Address spaces in bulk: all their ranges, searches, copies across pages, arrays of addresses; the
// address space of a vCPU; memory that is a Python buffer. polyvisor/virtual.py is the interface
// meant for people.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "bindings.hpp"
#include "handles.hpp"
#include "mmu/bulk.hpp"
#include "mmu/find.hpp"

namespace polyvisor::python {

namespace {

// --- ranges --------------------------------------------------------------------------------------

/// Collecting garbage while many objects are made finds none, and costs more than making them.
class NoGarbageCollection {
  public:
    NoGarbageCollection() : was_(PyGC_Disable()) {}
    ~NoGarbageCollection() {
        if (was_) PyGC_Enable();
    }

  private:
    int was_;
};

/// A named tuple (gva, physical, size, page_size, user, writable, executable, is_global): filled in
/// here, since calling its class costs ten times as much.
py::object make_range(PyTypeObject* type, const MappedRange& range) {
    auto result = py::reinterpret_steal<py::object>(type->tp_alloc(type, 8));
    if (!result) throw py::error_already_set();
    Py_ssize_t at = 0;
    auto add = [&](PyObject* item) {
        if (item == nullptr) throw py::error_already_set();
        PyTuple_SET_ITEM(result.ptr(), at++, item);
    };
    add(PyLong_FromUnsignedLongLong(range.gva));
    add(PyLong_FromUnsignedLongLong(range.physical));
    add(PyLong_FromUnsignedLongLong(range.size));
    add(PyLong_FromUnsignedLongLong(bit(range.shift)));
    for (bool right : {range.user, range.writable, range.executable, range.global}) {
        add(PyBool_FromLong(right));
    }
    return result;
}

py::tuple ranges(const AddressSpace& space, const py::type& type, u64 start, u64 last,
                 bool by_rights, u64 limit, u64 budget) {
    auto* tuple = reinterpret_cast<PyTypeObject*>(type.ptr());
    if (!PyType_IsSubtype(tuple, &PyTuple_Type) || tuple->tp_itemsize == 0) {
        throw py::type_error("ranges are made as named tuples");
    }
    RangeList list;
    {
        py::gil_scoped_release release;
        auto join = by_rights ? RangeOptions::Join::kRights : RangeOptions::Join::kPhysical;
        list = list_ranges(space, {start, last, join, limit, budget});
    }
    NoGarbageCollection none;
    py::list result(list.ranges.size());
    for (std::size_t n = 0; n < list.ranges.size(); ++n) {
        PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(n),
                        make_range(tuple, list.ranges[n]).release().ptr());
    }
    return py::make_tuple(result, list.truncated ? py::cast(list.next) : py::none());
}

// --- bytes ---------------------------------------------------------------------------------------

py::tuple find(const AddressSpace& space, const py::object& pattern, u64 start, u64 last, u64 limit,
               u64 most) {
    constexpr u64 kSlice = u64{256} << 20;  // between two looks at signals
    BufferView view(pattern, false);
    if (view.bytes().empty()) throw ConfigError("pattern", "an empty pattern is everywhere");
    std::vector<u64> matches;
    FindOptions options;
    options.start = start;
    options.last = last;
    options.limit = limit;
    options.budget = u64{1} << 26;
    FindResult result;
    u64 entries_left = 16;  // slices that may end for want of entries and not of bytes
    for (;;) {
        options.bytes = std::min(kSlice, most) + view.bytes().size();
        {
            py::gil_scoped_release release;
            result = find_bytes(space, view.bytes(), options);
        }
        matches.insert(matches.end(), result.matches.begin(), result.matches.end());
        most -= std::min(most, result.looked);
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (result.looked < kSlice && --entries_left == 0) break;
        if (result.complete || matches.size() >= limit || most == 0) break;
        options.start = result.next;
        options.limit = limit - matches.size();
    }
    return py::make_tuple(py::cast(matches), result.complete ? py::none() : py::cast(result.next));
}

py::tuple fault_tuple(const CopyFault& fault) {
    const char* reason = fault.reason == CopyFault::kNotMapped  ? "not mapped"
                         : fault.reason == CopyFault::kNoMemory ? "no memory"
                                                                : "read-only";
    return py::make_tuple(reason, fault.gva, fault.physical);
}

py::object read(const AddressSpace& space, u64 gva, u64 size) {
    // A wild size must fail as a fault and not as an allocation. What is mapped may be larger than
    // memory when pages are mapped more than once, but a copy of all that is nobody's wish.
    const u64 most = 4 * space.memory().total_size() + (u64{64} << 20);
    CopyFault fault;
    {
        py::gil_scoped_release release;
        fault = check_virtual(space, gva, std::min(size, most), false);
    }
    if (fault.reason != CopyFault::kNone) return fault_tuple(fault);
    if (size > most) {
        throw ConfigError("size", "cannot copy " + std::to_string(size) +
                                      " bytes at once, which is more than there is memory; read "
                                      "less");
    }
    py::bytes result(nullptr, static_cast<std::size_t>(size));
    std::span<u8> bytes{reinterpret_cast<u8*>(PyBytes_AS_STRING(result.ptr())),
                        static_cast<std::size_t>(size)};
    {
        py::gil_scoped_release release;
        fault = read_virtual(space, gva, bytes);
    }
    if (fault.reason != CopyFault::kNone) return fault_tuple(fault);  // the guest runs, and unmaps
    return result;
}

py::object write(const AddressSpace& space, u64 gva, const py::object& data) {
    BufferView view(data, false);
    CopyFault fault;
    {
        py::gil_scoped_release release;
        fault = write_virtual(space, gva, view.bytes());
    }
    return fault.reason == CopyFault::kNone ? py::object(py::none()) : fault_tuple(fault);
}

// --- arrays of addresses -------------------------------------------------------------------------

/// 64-bit integers in any buffer, in C order, whatever its shape and strides.
class Integers {
  public:
    Integers(const py::object& object, const char* field, bool writable) {
        int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
            if (!PyErr_ExceptionMatches(PyExc_TypeError) &&
                !PyErr_ExceptionMatches(PyExc_BufferError) &&
                !PyErr_ExceptionMatches(PyExc_ValueError)) {
                throw py::error_already_set();
            }
            PyErr_Clear();
            throw ConfigError(field, std::string(field) + " must be a" +
                                         (writable ? " writable" : "") +
                                         " array of 64-bit integers (NumPy's uint64), not " +
                                         std::string(Py_TYPE(object.ptr())->tp_name));
        }
        std::string format = view_.format != nullptr ? view_.format : "B";
        std::string kind = format;
        if (!kind.empty() && (kind[0] == '<' || kind[0] == '=' || kind[0] == '@')) kind.erase(0, 1);
        const bool integer = kind.size() == 1 && std::strchr("QqLlNn", kind[0]) != nullptr;
        if (!integer || view_.itemsize != 8) {
            PyBuffer_Release(&view_);
            throw ConfigError(field, std::string(field) +
                                         " must be an array of 64-bit integers (NumPy's uint64), "
                                         "not one of format '" +
                                         format + "'");
        }
        index_.resize(static_cast<std::size_t>(view_.ndim));
        contiguous_ = PyBuffer_IsContiguous(&view_, 'C') != 0 &&
                      reinterpret_cast<u64>(view_.buf) % alignof(u64) == 0;
    }
    ~Integers() { PyBuffer_Release(&view_); }
    Integers(const Integers&) = delete;
    Integers& operator=(const Integers&) = delete;

    std::size_t count() const { return static_cast<std::size_t>(view_.len) / 8; }
    bool contiguous() const { return contiguous_; }
    u64* data() const { return static_cast<u64*>(view_.buf); }
    bool same_shape(const Integers& other) const {
        return view_.ndim == other.view_.ndim &&
               std::equal(view_.shape, view_.shape + view_.ndim, other.view_.shape);
    }

    /// Calls step(address of an item) for the next `count` ones.
    template <class Step>
    void each(std::size_t count, Step step) {
        const int inner = view_.ndim - 1;
        while (count > 0) {
            char* at = static_cast<char*>(view_.buf);
            for (int n = 0; n <= inner; ++n) at += index_[at_index(n)] * view_.strides[n];
            if (inner < 0) {  // a scalar
                step(at);
                return;
            }
            const Py_ssize_t left = view_.shape[inner] - index_[at_index(inner)];
            const auto now = static_cast<std::size_t>(
                std::min<Py_ssize_t>(left, static_cast<Py_ssize_t>(count)));
            for (std::size_t n = 0; n < now; ++n, at += view_.strides[inner]) step(at);
            count -= now;
            index_[at_index(inner)] += static_cast<Py_ssize_t>(now);
            for (int n = inner; n > 0 && index_[at_index(n)] == view_.shape[n]; --n) {
                index_[at_index(n)] = 0;
                ++index_[at_index(n - 1)];
            }
        }
    }

  private:
    static std::size_t at_index(int n) { return static_cast<std::size_t>(n); }

    Py_buffer view_;
    std::vector<Py_ssize_t> index_;
    bool contiguous_ = false;
};

/// Whatever the rights, as AddressSpace::translate().
void translate_block(const AddressSpace& space, TableReader& tables, std::span<const u64> from,
                     std::span<u64> into) {
    const PagingState paging = probing(space.paging());
    if (!space.second()) {
        walk_many(tables, paging, from, {}, into);
        return;
    }
    const bool in_place = from.data() == into.data();
    if (!in_place && walk_many_nested(tables, paging, *space.second(), from, {}, into) == 0) return;
    for (std::size_t n = 0; n < from.size(); ++n) {  // rights of the second dimension, too
        if (in_place || into[n] == kNoTranslation) {
            into[n] = space.translate(from[n]).value_or(kNoTranslation);
        }
    }
}

void translate_many(const AddressSpace& space, const py::object& addresses,
                    const py::object& physical) {
    Integers from(addresses, "addresses", false), into(physical, "out", true);
    if (!from.same_shape(into)) {
        throw ConfigError("out",
                          "the array for the physical addresses must have the shape of the "
                          "one with the addresses");
    }
    TableReader tables(space.memory());
    constexpr std::size_t kBetweenSignals = std::size_t{1} << 22;
    constexpr std::size_t kBlock = 4096;
    const bool direct = from.contiguous() && into.contiguous();
    std::vector<u64> gather(from.contiguous() ? 0 : kBlock),
        scatter(into.contiguous() ? 0 : kBlock);
    for (std::size_t done = 0; done < from.count();) {
        const std::size_t end = std::min(from.count(), done + kBetweenSignals);
        {
            py::gil_scoped_release release;
            while (done < end) {
                const std::size_t now = direct ? end - done : std::min(end - done, kBlock);
                u64* source = from.contiguous() ? from.data() + done : gather.data();
                u64* target = into.contiguous() ? into.data() + done : scatter.data();
                if (!from.contiguous()) {
                    u64* to = source;
                    from.each(now, [&](const char* item) { std::memcpy(to++, item, 8); });
                }
                translate_block(space, tables, {source, now}, {target, now});
                if (!into.contiguous()) {
                    const u64* out = target;
                    into.each(now, [&](char* item) { std::memcpy(item, out++, 8); });
                }
                done += now;
            }
        }
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

// --- a vCPU's address space ----------------------------------------------------------------------

/// The address space of a vCPU as long as it stands still: what `make(state, physical bits, 1 GB
/// pages?)` returns, an AddressSpace, which is kept until the machine's generation says that
/// registers may have changed.
class CpuSpace {
  public:
    CpuSpace(py::object machine, u32 index, py::object make)
        : object_(std::move(machine)),
          machine_(object_.cast<PyMachine*>()),
          index_(index),
          make_(std::move(make)) {}

    const AddressSpace& space() {
        // A closed or forked-off machine has no more to say; core() says so.
        Core* core = machine_->peek();
        if (PV_UNLIKELY(!core || !space_ || core->machine().generation() != generation_)) renew();
        return *space_;
    }
    const py::object& object() {
        space();
        return space_object_;
    }
    u32 index() const { return index_; }

  private:
    void renew() {
        auto core = machine_->core();
        Machine& machine = core->machine();
        const u64 generation = machine.generation();
        py::object made = make_(machine.look(index_).save(), machine.physical_bits(),
                                machine.cpu_features().has(Feature::kPage1Gb));
        space_ = made.cast<std::shared_ptr<AddressSpace>>();
        space_object_ = std::move(made);
        generation_ = generation;
    }

    py::object object_;  // keeps machine_
    PyMachine* machine_;
    u32 index_;
    py::object make_;
    py::object space_object_;
    std::shared_ptr<AddressSpace> space_;
    u64 generation_ = 0;
};

/// CpuSpace.translate: see AddressSpace.translate for why it is not pybind11's way.
PyObject* translate(PyObject* self, PyObject* argument) {
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    auto* cpu = instance->simple_layout ? static_cast<CpuSpace*>(instance->simple_value_holder[0])
                                        : nullptr;
    if (cpu == nullptr) {
        PyErr_SetString(PyExc_TypeError, "CpuSpace.__init__() was not called");
        return nullptr;
    }
    try {
        const AddressSpace& space = cpu->space();
        u64 gva = PyLong_CheckExact(argument) ? PyLong_AsUnsignedLongLong(argument) : ~u64{0};
        if (PV_UNLIKELY(gva == ~u64{0})) {  // no plain number, too large a one, or just that one
            PyErr_Clear();
            return cpu->object().attr("translate")(py::handle(argument)).release().ptr();
        }
        auto physical = space.translate(gva);
        if (!physical) Py_RETURN_NONE;
        return PyLong_FromUnsignedLongLong(*physical);
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (...) {
        raise_current_exception();
    }
    return nullptr;
}

PyMethodDef kTranslate{"translate", translate, METH_O, nullptr};

// --- images --------------------------------------------------------------------------------------

void add_buffer(GuestMemory& memory, u64 start, const py::object& buffer, std::string name,
                bool writable) {
    auto* view = new BufferView(buffer, writable);
    std::shared_ptr<void> owner(view, [](void* held) {
        py::gil_scoped_acquire gil;
        delete static_cast<BufferView*>(held);
    });
    auto bytes = view->bytes();
    memory.add_mapping(Gpa(start), Mapping::borrowed(bytes.data(), bytes.size()), std::move(name),
                       writable, std::move(owner));
}

}  // namespace

void bind_mmu_bulk(py::module_& module) {
    module.def("mmu_ranges", &ranges, py::arg("space"), py::arg("item"), py::arg("start"),
               py::arg("last"), py::arg("by_rights"), py::arg("limit"), py::arg("budget"));
    module.def("mmu_find", &find, py::arg("space"), py::arg("pattern"), py::arg("start"),
               py::arg("last"), py::arg("limit"), py::arg("most"));
    module.def("mmu_read", &read, py::arg("space"), py::arg("gva"), py::arg("size"));
    module.def("mmu_write", &write, py::arg("space"), py::arg("gva"), py::arg("data"));
    module.def("mmu_translate_many", &translate_many, py::arg("space"), py::arg("addresses"),
               py::arg("out"));
    module.def("memory_add_buffer", &add_buffer, py::arg("memory"), py::arg("start"),
               py::arg("buffer"), py::arg("name"), py::arg("writable"));

    py::class_<CpuSpace> cpu(module, "CpuSpace");
    cpu.def(py::init([](const py::object& machine, u32 index, const py::object& make) {
                if (!py::isinstance<PyMachine>(machine)) {
                    throw py::type_error("a CpuSpace is of a _native.Machine");
                }
                return std::make_unique<CpuSpace>(machine, index, make);
            }),
            py::arg("machine"), py::arg("index"), py::arg("make"))
        .def_property_readonly("space", [](CpuSpace& self) { return self.object(); })
        .def_property_readonly("index", &CpuSpace::index);
    cpu.attr("translate") = py::reinterpret_steal<py::object>(
        PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(cpu.ptr()), &kTranslate));
}

}  // namespace polyvisor::python
