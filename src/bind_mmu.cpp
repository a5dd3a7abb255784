// Address spaces: page tables in guest memory, walked from outside. polyvisor/mmu.py is the
// interface meant for people.
#include <pybind11/stl.h>

#include "base/error.hpp"
#include "bindings.hpp"
#include "mmu/address_space.hpp"
#include "mmu/bulk.hpp"

namespace polyvisor::python {

namespace {

using Pdptes = std::array<u64, 4>;

std::string hex(u64 value) {
    return py::str("{:#x}").format(value).cast<std::string>();
}

/// What loading CR3 does in PAE mode: the four PDPTEs come from memory, through the second
/// dimension if there is one (SDM 3A, 4.4.1).
Pdptes load_pdptes(const std::string& field, const std::shared_ptr<GuestMemory>& memory,
                   const PagingState& paging, const std::optional<SecondDimension>& second) {
    u64 at = paging.cr3 & 0xffff'ffe0;
    auto fail = [&](const std::string& what) -> ConfigError {
        return {field, field + " " + hex(paging.cr3) + " of PAE paging points to PDPTEs " + what +
                           "; check it" + (field == "cr3" ? ", or give them with pdpte=" : "")};
    };
    if (second) {
        // With paging off a guest-physical address is translated by the second dimension alone.
        PagingState identity;
        identity.physical_mask = paging.physical_mask;
        auto host = AddressSpace(memory, identity, second).translate(at);
        if (!host) throw fail("that the second dimension does not map");
        at = *host;
    }
    if (memory->span(Gpa(at), 32).empty()) throw fail("at " + hex(at) + ", outside memory");
    return memory->load<Pdptes>(Gpa(at));
}

/// Refuses reserved bits, as loading CR3 does.
void set_pdptes(const std::string& field, PagingState& paging, const Pdptes& pdptes) {
    for (unsigned n = 0; n < 4; ++n) {
        if (!pdpte_valid(pdptes[n], paging.physical_mask)) {
            throw ConfigError("pdpte", "PDPTE " + std::to_string(n) + " of " + field + " " +
                                           hex(paging.cr3) + " is " + hex(pdptes[n]) +
                                           ", which has reserved bits set, so that loading " +
                                           field + " is #GP; check it and maxphyaddr");
        }
        paging.pdpte[n] = pdptes[n];
    }
}

std::shared_ptr<AddressSpace> make_address_space(std::shared_ptr<GuestMemory> memory, u64 cr0,
                                                 u64 cr3, u64 cr4, u64 efer, u32 pkru, u32 pkrs,
                                                 u64 physical_mask, bool pages_1gb, bool pse36,
                                                 std::optional<Pdptes> pdpte,
                                                 std::optional<SecondDimension> second) {
    PagingRegisters registers;
    registers.cr0 = cr0;
    registers.cr3 = cr3;
    registers.cr4 = cr4;
    registers.efer = efer;
    registers.pkru = pkru;
    registers.pkrs = pkrs;
    registers.physical_mask = physical_mask;
    registers.pages_1gb = pages_1gb;
    registers.pse36 = pse36;
    if (second) {
        NptState* npt = std::get_if<NptState>(&*second);
        if (npt && npt->paging.mode == PagingMode::kPae) {
            set_pdptes("ncr3", npt->paging, load_pdptes("ncr3", memory, npt->paging, {}));
        }
    }
    PagingState paging = make_paging_state(registers);
    if (paging.mode == PagingMode::kPae) {
        set_pdptes("cr3", paging, pdpte ? *pdpte : load_pdptes("cr3", memory, paging, second));
    }
    return std::make_shared<AddressSpace>(std::move(memory), paging, std::move(second));
}

/// AddressSpace.translate: one of the calls whose cost people feel, and pybind11's general way of
/// calling costs more than the walk.
PyObject* translate(PyObject* self, PyObject* argument) {
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    const auto* space = instance->simple_layout
                            ? static_cast<AddressSpace*>(instance->simple_value_holder[0])
                            : nullptr;
    if (!space) {
        PyErr_SetString(PyExc_TypeError, "AddressSpace.__init__() was not called");
        return nullptr;
    }
    u64 gva;
    if (PV_LIKELY(PyLong_Check(argument))) {
        gva = PyLong_AsUnsignedLongLong(argument);
    } else {
        PyObject* index = PyNumber_Index(argument);  // NumPy's integers are none of Python's
        if (!index) return nullptr;
        gva = PyLong_AsUnsignedLongLong(index);
        Py_DECREF(index);
    }
    if (PV_UNLIKELY(gva == ~u64{0}) && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return nullptr;
        PyErr_Clear();
        try {
            auto text = py::str("{:#x} is no guest-virtual address: those have 64 bits")
                            .format(py::handle(argument));
            using py::literals::operator""_a;
            py::object type = py::module_::import("polyvisor.errors").attr("ConfigError");
            PyErr_SetObject(type.ptr(), type(text, "field"_a = "gva").ptr());
        } catch (py::error_already_set& e) {
            e.restore();
        }
        return nullptr;
    }
    auto physical = space->translate(gva);
    if (!physical) Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(*physical);
}

PyMethodDef kTranslate{"translate", translate, METH_O, nullptr};

/// Where each address leads, None when this access to it is refused.
py::list access_many(const AddressSpace& space, const std::vector<u64>& gvas, bool write,
                     bool fetch, bool user, bool implicit, bool ac, bool set_bits) {
    std::vector<u64> physical(gvas.size());
    PageAccess access{write, fetch, user, implicit, ac};
    auto effects = set_bits ? BulkEffects::kSet : BulkEffects::kNone;
    TableReader tables(space.memory());
    {
        py::gil_scoped_release release;
        if (space.second()) {
            walk_many_nested(tables, space.paging(), *space.second(), gvas, access, physical,
                             effects);
        } else {
            walk_many(tables, space.paging(), gvas, access, physical, effects);
        }
    }
    py::list result;
    for (u64 address : physical) {
        if (address == kNoTranslation) {
            result.append(py::none());
        } else {
            result.append(address);
        }
    }
    return result;
}

const char* fault_name(WalkReport::Fault fault) {
    switch (fault) {
        case WalkReport::kNone:
            break;
        case WalkReport::kNotCanonical:
            return "not-canonical";
        case WalkReport::kPageFault:
            return "page-fault";
        case WalkReport::kEptViolation:
            return "ept-violation";
        case WalkReport::kEptMisconfiguration:
            return "ept-misconfiguration";
        case WalkReport::kNestedPageFault:
            return "nested-page-fault";
    }
    return "";
}

const char* mode_name(PagingMode mode) {
    switch (mode) {
        case PagingMode::kNone:
            break;
        case PagingMode::k32Bit:
            return "32-bit";
        case PagingMode::kPae:
            return "pae";
        case PagingMode::k4Level:
            return "4-level";
        case PagingMode::k5Level:
            return "5-level";
    }
    return "none";
}

void bind_report(py::module_& module) {
    using R = WalkReport;
    py::class_<R>(module, "WalkReport")
        .def_property_readonly("fault", [](const R& r) { return fault_name(r.fault); })
        .def_readonly("vector", &R::vector)
        .def_readonly("error_code", &R::error_code)
        .def_readonly("qualification", &R::qualification)
        .def_readonly("fault_gpa", &R::fault_gpa)
        .def_readonly("during_walk", &R::during_walk)
        .def_readonly("mapped", &R::mapped)
        .def_readonly("physical", &R::physical)
        .def_readonly("gpa", &R::gpa)
        .def_readonly("shift", &R::shift)
        .def_readonly("user", &R::user)
        .def_readonly("writable", &R::writable)
        .def_readonly("executable", &R::executable)
        .def_readonly("is_global", &R::global)
        .def_readonly("accessed", &R::accessed)
        .def_readonly("dirty", &R::dirty)
        .def_readonly("memory_type", &R::memory_type)
        .def_readonly("key", &R::key)
        .def_property_readonly("steps", [](const R& r) {
            py::list result;
            for (const auto& step : r.steps) {
                result.append(py::make_tuple(step.address, step.entry, step.shift, step.second));
            }
            return result;
        });
}

}  // namespace

void bind_mmu(py::module_& module) {
    bind_report(module);

    py::class_<EptState>(module, "EptState")
        .def(py::init([](u64 eptp, bool execute_only, bool mode_based_execute, bool five_levels,
                         bool pages_2mb, bool pages_1gb, bool access_dirty, u64 physical_mask) {
                 return make_ept_state(eptp, {execute_only, five_levels, pages_2mb, pages_1gb,
                                              access_dirty, mode_based_execute, physical_mask});
             }),
             py::arg("eptp"), py::kw_only(), py::arg("execute_only"), py::arg("mode_based_execute"),
             py::arg("five_levels"), py::arg("pages_2mb"), py::arg("pages_1gb"),
             py::arg("access_dirty"), py::arg("physical_mask"));

    py::class_<NptState>(module, "NptState")
        .def(py::init([](u64 ncr3, u64 cr0, u64 cr4, u64 efer, bool pages_1gb, u64 physical_mask) {
                 PagingRegisters registers;
                 registers.cr0 = cr0;
                 registers.cr3 = ncr3;
                 registers.cr4 = cr4;
                 registers.efer = efer;
                 registers.physical_mask = physical_mask;
                 registers.pages_1gb = pages_1gb;
                 return NptState{make_paging_state(registers)};
             }),
             py::arg("ncr3"), py::kw_only(), py::arg("cr0"), py::arg("cr4"), py::arg("efer"),
             py::arg("pages_1gb"), py::arg("physical_mask"));

    using Space = AddressSpace;
    py::class_<Space, std::shared_ptr<Space>> space(module, "AddressSpace");
    space
        .def(py::init(&make_address_space), py::arg("memory"), py::kw_only(), py::arg("cr0"),
             py::arg("cr3"), py::arg("cr4"), py::arg("efer"), py::arg("pkru"), py::arg("pkrs"),
             py::arg("physical_mask"), py::arg("pages_1gb"), py::arg("pse36"), py::arg("pdpte"),
             py::arg("second"))
        .def(
            "report",
            [](const Space& s, u64 gva, bool write, bool fetch, bool user, bool implicit, bool ac,
               bool set_bits, bool probe) {
                auto effects = set_bits ? WalkEffects::kSet
                               : probe  ? WalkEffects::kProbe
                                        : WalkEffects::kNone;
                return s.walk(gva, {write, fetch, user, implicit, ac}, effects);
            },
            py::arg("gva"), py::kw_only(), py::arg("write") = false, py::arg("fetch") = false,
            py::arg("user") = false, py::arg("implicit") = false, py::arg("ac") = false,
            py::arg("set_bits") = false, py::arg("probe") = false)
        .def("access_many", &access_many, py::arg("gvas"), py::kw_only(), py::arg("write") = false,
             py::arg("fetch") = false, py::arg("user") = false, py::arg("implicit") = false,
             py::arg("ac") = false, py::arg("set_bits") = false)
        .def_property_readonly("mode", [](const Space& s) { return mode_name(s.paging().mode); })
        .def_property_readonly("pdpte",
                               [](const Space& s) {
                                   const u64* p = s.paging().pdpte;
                                   return py::make_tuple(p[0], p[1], p[2], p[3]);
                               })
        .def_property_readonly("guest_memory", &Space::shared_memory);
    space.attr("translate") = py::reinterpret_steal<py::object>(
        PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(space.ptr()), &kTranslate));
}

}  // namespace polyvisor::python
