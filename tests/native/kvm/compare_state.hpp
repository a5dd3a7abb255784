// Two CPU states field by field, so that a test says what differs.
#pragma once

#include <cstdio>
#include <string>
#include <type_traits>

#include "cpu/state.hpp"

namespace pvtest {

using namespace polyvisor;

/// "" when they are equal, else "cr3: 0x1000, not 0x2000; ...": what `got` has instead of `want`.
inline std::string differences(const CpuState& got, const CpuState& want) {
    std::string text;
    auto field = [&](const std::string& name, auto a, auto b) {
        if (a == b) return;
        char values[80];
        std::snprintf(values, sizeof values, ": %#llx, not %#llx; ",
                      static_cast<unsigned long long>(a), static_cast<unsigned long long>(b));
        text += name + values;
    };
    auto list = [&](const std::string& name, const auto& a, const auto& b) {
        for (std::size_t n = 0; n < a.size(); ++n) {
            field(name + "[" + std::to_string(n) + "]", a[n], b[n]);
        }
    };
    auto segment = [&](const std::string& name, const Segment& a, const Segment& b) {
        field(name + ".selector", a.selector, b.selector);
        field(name + ".base", a.base, b.base);
        field(name + ".limit", a.limit, b.limit);
        field(name + ".attributes", a.attributes, b.attributes);
    };
#define PV_FIELD(member) field(#member, got.member, want.member)
    list("gpr", got.gpr, want.gpr);
    PV_FIELD(rip);
    PV_FIELD(rflags);
    static const char* const kNames[] = {"es", "cs", "ss", "ds", "fs", "gs"};
    for (int n = 0; n < kSegmentCount; ++n) segment(kNames[n], got.segments[n], want.segments[n]);
    segment("ldtr", got.ldtr, want.ldtr);
    segment("tr", got.tr, want.tr);
    PV_FIELD(gdtr.base);
    PV_FIELD(gdtr.limit);
    PV_FIELD(idtr.base);
    PV_FIELD(idtr.limit);
    PV_FIELD(cr0);
    PV_FIELD(cr2);
    PV_FIELD(cr3);
    PV_FIELD(cr4);
    PV_FIELD(xcr0);
    list("dr", got.dr, want.dr);
    PV_FIELD(dr6);
    PV_FIELD(dr7);
    PV_FIELD(msr.efer);
    PV_FIELD(msr.star);
    PV_FIELD(msr.lstar);
    PV_FIELD(msr.cstar);
    PV_FIELD(msr.sfmask);
    PV_FIELD(msr.kernel_gs_base);
    PV_FIELD(msr.sysenter_cs);
    PV_FIELD(msr.sysenter_esp);
    PV_FIELD(msr.sysenter_eip);
    PV_FIELD(msr.pat);
    PV_FIELD(msr.tsc_offset);
    PV_FIELD(msr.tsc_adjust);
    PV_FIELD(msr.tsc_aux);
    PV_FIELD(msr.misc_enable);
    PV_FIELD(msr.mtrr_def_type);
    list("msr.mtrr_fixed", got.msr.mtrr_fixed, want.msr.mtrr_fixed);
    list("msr.mtrr_variable", got.msr.mtrr_variable, want.msr.mtrr_variable);
    PV_FIELD(msr.xss);
    PV_FIELD(msr.spec_ctrl);
    PV_FIELD(msr.kvm_wall_clock);
    PV_FIELD(msr.kvm_system_time);
    list("fpu.legacy", got.fpu.legacy, want.fpu.legacy);
    for (std::size_t n = 0; n < got.fpu.ymm_high.size(); ++n) {
        list("fpu.ymm_high[" + std::to_string(n) + "]", got.fpu.ymm_high[n], want.fpu.ymm_high[n]);
    }
    PV_FIELD(activity);
    PV_FIELD(interrupt_shadow);
    PV_FIELD(nmi_blocked);
    PV_FIELD(nmi_pending);
    PV_FIELD(event.kind);
    PV_FIELD(event.vector);
    PV_FIELD(event.has_error_code);
    PV_FIELD(event.length);
    PV_FIELD(event.error_code);
    PV_FIELD(instructions);
#undef PV_FIELD
    // A field that this list has forgotten.
    if (text.empty() && !(got == want)) text = "something that compare_state.hpp does not know";
    return text;
}

}  // namespace pvtest
