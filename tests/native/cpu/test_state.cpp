// The reset state is valid, and validate() names the field of each impossible one.
#include <functional>

#include "base/error.hpp"
#include "check.hpp"
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

void exit_names() {
    CHECK_EQ(std::string(to_string(ExitReason::kShutdown)), std::string("shutdown"));
    CHECK_EQ(std::string(to_string(static_cast<ExitReason>(200))), std::string("unknown"));
}

}  // namespace

int main() {
    good_states();
    bad_states();
    exit_names();
    return pvtest::finish("test_state");
}
