// The reset state is valid, and validate() names the field of each impossible one.
#include <functional>

#include "base/error.hpp"
#include "check.hpp"
#include "cpu/cpuid.hpp"
#include "cpu/exit.hpp"
#include "cpu/state.hpp"

using namespace polyvisor;

namespace {

CpuState long_mode() {
    CpuState s = reset_state(true);
    s.cr0 = 0x80050033;
    s.cr4 = 0x620;
    s.msr.efer = 0xd01;
    s.rip = 0x100000;
    for (Segment& segment : s.segments) segment = {0, 0xffffffff, 0xc093, 16};
    s.segments[kCs] = {0, 0xffffffff, 0xa09b, 8};
    return s;
}

void good_states() {
    validate(reset_state(true));
    validate(reset_state(false));
    validate(long_mode());
    CpuState s = reset_state(false);
    CHECK_EQ(s.activity, Activity::kWaitForSipi);
    CHECK_EQ(s.segments[kCs].base + s.rip, u64{0xfffffff0});
    ++pvtest::checks;
}

void bad_states() {
    struct Case {
        const char* field;
        std::function<void(CpuState&)> change;
    };
    const Case cases[] = {
        {"cr0", [](CpuState& s) { s.cr0 |= bit(7); }},
        {"cr0", [](CpuState& s) { s.cr0 &= ~bit(0); }},
        {"cr0", [](CpuState& s) { s.cr0 |= bit(29); }},
        {"cr4", [](CpuState& s) { s.cr4 |= bit(40); }},
        {"cr4", [](CpuState& s) { s.cr4 &= ~bit(5); }},
        {"msr.efer", [](CpuState& s) { s.msr.efer &= ~bit(10); }},
        {"msr.efer", [](CpuState& s) { s.msr.efer |= bit(30); }},
        {"cr3", [](CpuState& s) { s.cr3 = bit(60); }},
        {"rflags", [](CpuState& s) { s.rflags = 0; }},
        {"rflags", [](CpuState& s) { s.rflags |= bit(17); }},
        {"rflags", [](CpuState& s) { s.rflags |= bit(40); }},
        {"rip", [](CpuState& s) { s.rip = bit(47); }},
        {"segments.cs", [](CpuState& s) { s.segments[kCs].attributes |= bit(14); }},
        {"segments.cs", [](CpuState& s) { s.segments[kCs].attributes = 0xc092 & ~0x10; }},
        {"segments.ss", [](CpuState& s) { s.segments[kSs].attributes = 0xc09b; }},
        {"segments.ds", [](CpuState& s) { s.segments[kDs].attributes |= 0x700; }},
        {"segments.gs", [](CpuState& s) { s.segments[kGs].base = bit(50); }},
        {"segments.ds", [](CpuState& s) { s.segments[kDs].base = bit(40); }},
        {"gdtr", [](CpuState& s) { s.gdtr.base = bit(48); }},
        {"idtr", [](CpuState& s) { s.idtr.base = bit(48); }},
        {"dr7", [](CpuState& s) { s.dr7 = bit(33); }},
        {"xcr0", [](CpuState& s) { s.xcr0 = 5; }},
        {"xcr0", [](CpuState& s) { s.xcr0 = 0; }},
        {"msr.lstar", [](CpuState& s) { s.msr.lstar = bit(48); }},
        {"msr.pat", [](CpuState& s) { s.msr.pat = 2; }},
        {"fpu", [](CpuState& s) { s.fpu.legacy[26] = 1; }},
        {"activity", [](CpuState& s) { s.activity = static_cast<Activity>(9); }},
        {"segments.ss", [](CpuState& s) { s.segments[kCs].attributes |= 3 << 5; }},
        {"msr.tsc_aux", [](CpuState& s) { s.msr.tsc_aux = bit(32); }},
        {"msr.mtrr_def_type", [](CpuState& s) { s.msr.mtrr_def_type = 2; }},
        {"msr.mtrr_def_type", [](CpuState& s) { s.msr.mtrr_def_type = bit(12); }},
        {"msr.mtrr_fixed", [](CpuState& s) { s.msr.mtrr_fixed[10] = u64{3} << 56; }},
        {"msr.mtrr_variable", [](CpuState& s) { s.msr.mtrr_variable[2] = 7; }},
        {"msr.mtrr_variable", [](CpuState& s) { s.msr.mtrr_variable[3] = 0x400; }},
        {"event", [](CpuState& s) { s.event.kind = static_cast<InFlightEvent::Kind>(6); }},
        {"event", [](CpuState& s) { s.event = {InFlightEvent::Kind::kException, 14}; }},
    };
    for (const Case& c : cases) {
        CpuState s = long_mode();
        c.change(s);
        try {
            validate(s);
            pvtest::fail(__FILE__, __LINE__, std::string("accepted a bad ") + c.field);
        } catch (const StateError& error) {
            CHECK_EQ(error.field, std::string(c.field));
            CHECK(std::string(error.what()).find(c.field) != std::string::npos);
        }
    }
}

// What a CPU model lacks cannot be on, and is named.
void lacking() {
    struct Case {
        const char* field;
        const char* names;
        std::function<void(CpuState&)> change;
    };
    const Case cases[] = {
        {"cr4", "SMAP", [](CpuState& s) { s.cr4 |= bit(21); }},
        {"cr4", "LA57", [](CpuState& s) { s.cr4 |= bit(12); }},
        {"cr4", "no CPU model", [](CpuState& s) { s.cr4 |= bit(13); }},
        {"msr.efer", "no-execute", [](CpuState& s) { s.msr.efer |= bit(11); }},
        {"msr.efer", "no CPU model", [](CpuState& s) { s.msr.efer |= bit(12); }},
        {"xcr0", "AVX", [](CpuState& s) { s.xcr0 = 7; }},
        {"fpu", "AVX", [](CpuState& s) { s.fpu.ymm_high[15][15] = 1; }},
        {"cr3", "physical", [](CpuState& s) { s.cr3 = bit(40); }},
        {"msr.mtrr_variable", "physical", [](CpuState& s) { s.msr.mtrr_variable[0] = bit(40); }},
        {"msr.xss", "no CPU model", [](CpuState& s) { s.msr.xss = 1; }},
        {"cr0", "reserved", [](CpuState& s) { s.cr0 |= bit(7); }},  // the general checks as well
    };
    CpuidPolicy policy;
    policy.features.set(Feature::kLongMode).set(Feature::kXsave);
    CpuState good = long_mode();
    good.msr.efer &= ~bit(11);
    validate(good, policy);
    for (const Case& c : cases) {
        CpuState s = good;
        c.change(s);
        try {
            validate(s, policy);
            pvtest::fail(__FILE__, __LINE__, std::string("accepted a bad ") + c.field);
        } catch (const StateError& error) {
            CHECK_EQ(error.field, std::string(c.field));
            CHECK(std::string(error.what()).find(c.names) != std::string::npos);
        }
    }
    CpuState s = good;
    s.cr4 |= bit(21) | bit(12);
    s.msr.efer |= bit(11);
    s.xcr0 = 7;
    for (Feature f : {Feature::kSmap, Feature::kLa57, Feature::kNx, Feature::kAvx}) {
        policy.features.set(f);
    }
    validate(s, policy);
    ++pvtest::checks;
}

// CPL is SS's DPL: CS may still have what was loaded in real mode, and conforming code runs at its
// caller's.
void privilege() {
    CpuState s = long_mode();
    CHECK_EQ(unsigned{privilege_level(s)}, 0u);
    s.segments[kCs].selector |= 3;
    validate(s);
    CHECK_EQ(unsigned{privilege_level(s)}, 0u);
    s.segments[kSs].attributes |= 3 << 5;
    s.segments[kCs].attributes |= 4;
    validate(s);
    CHECK_EQ(unsigned{privilege_level(s)}, 3u);
    s = reset_state(true);
    s.segments[kSs].attributes |= 3 << 5;
    CHECK_EQ(unsigned{privilege_level(s)}, 0u);
}

void exit_names() {
    CHECK_EQ(std::string(to_string(ExitReason::kShutdown)), std::string("shutdown"));
    CHECK_EQ(std::string(to_string(static_cast<ExitReason>(200))), std::string("unknown"));
}

}  // namespace

int main() {
    good_states();
    bad_states();
    lacking();
    privilege();
    exit_names();
    return pvtest::finish("test_state");
}
