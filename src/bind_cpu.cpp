// The architectural state of a CPU, its registers by name.
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <unordered_map>

#include "base/error.hpp"
#include "bindings.hpp"
#include "cpu/state.hpp"

namespace polyvisor::python {

namespace {

// A register is `size` bytes at `offset` of CpuState.
struct Field {
    std::string name;
    std::size_t offset;
    std::size_t size;
};

std::vector<Field> make_fields() {
    std::vector<Field> fields;
    CpuState state;
    auto add = [&](std::string name, const auto& member) {
        auto offset =
            reinterpret_cast<const char*>(&member) - reinterpret_cast<const char*>(&state);
        fields.push_back({std::move(name), static_cast<std::size_t>(offset), sizeof member});
    };
    static const char* const kGprs[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                          "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    for (unsigned i = 0; i < 16; ++i) add(kGprs[i], state.gpr[i]);
    add("rip", state.rip);
    add("rflags", state.rflags);
    auto add_segment = [&](const std::string& name, const Segment& segment) {
        add(name, segment.selector);
        add(name + ".base", segment.base);
        add(name + ".limit", segment.limit);
        add(name + ".attributes", segment.attributes);
    };
    static const char* const kSegments[6] = {"es", "cs", "ss", "ds", "fs", "gs"};
    for (unsigned i = 0; i < 6; ++i) add_segment(kSegments[i], state.segments[i]);
    add_segment("ldtr", state.ldtr);
    add_segment("tr", state.tr);
    add("gdtr.base", state.gdtr.base);
    add("gdtr.limit", state.gdtr.limit);
    add("idtr.base", state.idtr.base);
    add("idtr.limit", state.idtr.limit);
    add("cr0", state.cr0);
    add("cr2", state.cr2);
    add("cr3", state.cr3);
    add("cr4", state.cr4);
    add("xcr0", state.xcr0);
    for (unsigned i = 0; i < 4; ++i) add("dr" + std::to_string(i), state.dr[i]);
    add("dr6", state.dr6);
    add("dr7", state.dr7);
    add("efer", state.msr.efer);
    add("star", state.msr.star);
    add("lstar", state.msr.lstar);
    add("cstar", state.msr.cstar);
    add("sfmask", state.msr.sfmask);
    add("kernel_gs_base", state.msr.kernel_gs_base);
    add("sysenter_cs", state.msr.sysenter_cs);
    add("sysenter_esp", state.msr.sysenter_esp);
    add("sysenter_eip", state.msr.sysenter_eip);
    add("pat", state.msr.pat);
    add("tsc_offset", state.msr.tsc_offset);
    add("tsc_adjust", state.msr.tsc_adjust);
    add("tsc_aux", state.msr.tsc_aux);
    add("misc_enable", state.msr.misc_enable);
    add("spec_ctrl", state.msr.spec_ctrl);
    add("kvm_wall_clock", state.msr.kvm_wall_clock);
    add("kvm_system_time", state.msr.kvm_system_time);
    add("instructions", state.instructions);
    return fields;
}

const std::vector<Field>& fields() {
    static const std::vector<Field> table = make_fields();
    return table;
}

const Field& field(const std::string& name) {
    static const auto index = [] {
        std::unordered_map<std::string, const Field*> map;
        for (const Field& field : fields()) map.emplace(field.name, &field);
        return map;
    }();
    auto at = index.find(name);
    if (at == index.end()) {
        throw StateError(name,
                         "there is no register '" + name + "'; CpuState.names() has them all");
    }
    return *at->second;
}

u64 get(const CpuState& state, const std::string& name) {
    const Field& where = field(name);
    u64 value = 0;
    std::memcpy(&value, reinterpret_cast<const char*>(&state) + where.offset, where.size);
    return value;
}

void set(CpuState& state, const std::string& name, const py::int_& value) {
    const Field& where = field(name);
    // Negative numbers are taken as two's complement, as assemblers do.
    py::object masked = value & py::int_(~u64{0});
    auto bits = masked.cast<u64>();
    bool fits = where.size == 8 || bits >> (8 * where.size) == 0;
    py::int_ limit = py::int_(1) << py::int_(64);
    if (!fits || value >= limit || value < -(py::int_(1) << py::int_(63))) {
        throw StateError(name, py::str("register {} has {} bits, which {:#x} does not fit")
                                   .format(name, 8 * where.size, value)
                                   .cast<std::string>());
    }
    std::memcpy(reinterpret_cast<char*>(&state) + where.offset, &bits, where.size);
}

Segment& segment(CpuState& state, const std::string& name) {
    static const char* const kNames[6] = {"es", "cs", "ss", "ds", "fs", "gs"};
    for (unsigned i = 0; i < 6; ++i) {
        if (name == kNames[i]) return state.segments[i];
    }
    if (name == "ldtr") return state.ldtr;
    if (name == "tr") return state.tr;
    throw StateError(name, "there is no segment register '" + name + "'");
}

constexpr const char* kActivities[] = {"running", "halted", "wait_for_sipi", "shutdown"};

Activity activity(const std::string& name) {
    for (unsigned i = 0; i < 4; ++i) {
        if (name == kActivities[i]) return static_cast<Activity>(i);
    }
    throw StateError("activity", "there is no activity '" + name +
                                     "'; use running, halted, wait_for_sipi or shutdown");
}

constexpr const char* kEventKinds[] = {"none",      "interrupt",          "nmi",
                                       "exception", "software_interrupt", "software_exception"};

InFlightEvent make_event(const std::string& kind, u8 vector, std::optional<u32> error_code,
                         u8 length) {
    for (unsigned i = 1; i < std::size(kEventKinds); ++i) {
        if (kind != kEventKinds[i]) continue;
        return {static_cast<InFlightEvent::Kind>(i), vector, error_code.has_value(), length,
                error_code.value_or(0)};
    }
    throw StateError("event", "there is no event of kind '" + kind +
                                  "'; use interrupt, nmi, exception, software_interrupt or "
                                  "software_exception");
}

std::optional<u32> error_code(const InFlightEvent& event) {
    return event.has_error_code ? std::optional(event.error_code) : std::nullopt;
}

unsigned vector_index(int index) {
    if (index < 0 || index > 15) {
        throw StateError("xmm", "there is no vector register " + std::to_string(index));
    }
    return static_cast<unsigned>(index);
}

std::string xmm(const CpuState& state, int index) {
    // SDM 1, table 10-2: XMM0 is at byte 160.
    const u8* data = state.fpu.legacy.data() + 160 + 16 * vector_index(index);
    return {reinterpret_cast<const char*>(data), 16};
}

std::string ymm(const CpuState& state, int index) {
    const auto& high = state.fpu.ymm_high[vector_index(index)];
    return xmm(state, index) + std::string(reinterpret_cast<const char*>(high.data()), high.size());
}

}  // namespace

void bind_cpu(py::module_& module) {
    py::class_<Segment>(module, "Segment")
        .def(py::init([](u16 selector, u64 base, u32 limit, u32 attributes) {
                 return Segment{base, limit, attributes, selector};
             }),
             py::arg("selector") = 0, py::arg("base") = 0, py::arg("limit") = 0xffff,
             py::arg("attributes") = 0)
        .def_readwrite("selector", &Segment::selector)
        .def_readwrite("base", &Segment::base)
        .def_readwrite("limit", &Segment::limit)
        .def_readwrite("attributes", &Segment::attributes)
        .def("__eq__", [](const Segment& a, const Segment& b) { return a == b; })
        .def("__repr__", [](const Segment& s) {
            return py::str("Segment(selector={:#x}, base={:#x}, limit={:#x}, attributes={:#x})")
                .format(s.selector, s.base, s.limit, s.attributes);
        });

    py::class_<InFlightEvent>(module, "InFlightEvent")
        .def(py::init(&make_event), py::arg("kind"), py::arg("vector"), py::kw_only(),
             py::arg("error_code") = py::none(), py::arg("length") = 0)
        .def_property_readonly("kind",
                               [](const InFlightEvent& event) {
                                   return kEventKinds[static_cast<unsigned>(event.kind)];
                               })
        .def_readonly("vector", &InFlightEvent::vector)
        .def_property_readonly("error_code", &error_code)
        .def_readonly("length", &InFlightEvent::length)
        .def("__eq__", [](const InFlightEvent& a, const InFlightEvent& b) { return a == b; })
        .def("__repr__", [](const InFlightEvent& event) {
            return py::str("InFlightEvent('{}', {:#x}, error_code={}, length={})")
                .format(kEventKinds[static_cast<unsigned>(event.kind)], event.vector,
                        error_code(event), event.length);
        });

    py::class_<CpuState>(module, "CpuState")
        .def(py::init([](bool bootstrap) { return reset_state(bootstrap); }),
             py::arg("bootstrap") = true)
        .def_static("names",
                    [] {
                        py::tuple names(fields().size());
                        for (std::size_t i = 0; i < fields().size(); ++i) {
                            names[i] = fields()[i].name;
                        }
                        return names;
                    })
        .def("__getitem__", &get)
        .def("__setitem__", &set)
        .def("__eq__", [](const CpuState& a, const CpuState& b) { return a == b; })
        .def("copy", [](const CpuState& state) { return state; })
        .def("segment",
             [](CpuState& state, const std::string& name) { return segment(state, name); })
        .def("set_segment", [](CpuState& state, const std::string& name,
                               const Segment& value) { segment(state, name) = value; })
        .def_property(
            "activity",
            [](const CpuState& state) {
                return kActivities[static_cast<unsigned>(state.activity)];
            },
            [](CpuState& state, const std::string& name) { state.activity = activity(name); })
        .def_readwrite("interrupt_shadow", &CpuState::interrupt_shadow)
        .def_readwrite("nmi_blocked", &CpuState::nmi_blocked)
        .def_readwrite("nmi_pending", &CpuState::nmi_pending)
        .def_property(
            "event",
            [](const CpuState& state) {
                bool none = state.event.kind == InFlightEvent::Kind::kNone;
                return none ? std::nullopt : std::optional(state.event);
            },
            [](CpuState& state, const std::optional<InFlightEvent>& event) {
                state.event = event.value_or(InFlightEvent{});
            })
        .def_property(
            "fxsave",
            [](const CpuState& state) {
                return py::bytes(reinterpret_cast<const char*>(state.fpu.legacy.data()),
                                 state.fpu.legacy.size());
            },
            [](CpuState& state, const std::string& bytes) {
                if (bytes.size() != state.fpu.legacy.size()) {
                    throw StateError("fxsave", "an FXSAVE image has 512 bytes, not " +
                                                   std::to_string(bytes.size()));
                }
                std::memcpy(state.fpu.legacy.data(), bytes.data(), bytes.size());
            })
        .def("xmm", [](const CpuState& state, int index) { return py::bytes(xmm(state, index)); })
        .def("ymm", [](const CpuState& state, int index) { return py::bytes(ymm(state, index)); });
}

}  // namespace polyvisor::python
