// CpuState through KVM's structs and back, without a KVM: exact for random valid states, and what
// each engine-specific corner becomes.
#include <vector>

#include "check.hpp"
#include "kvm/compare_state.hpp"
#include "kvm/convert.hpp"
#include "kvm/random_state.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;
using namespace pvtest;

namespace {

CpuidPolicy everything() {
    CpuidPolicy policy;
    for (unsigned n = 0; n < static_cast<unsigned>(Feature::kCount); ++n) {
        policy.features.set(static_cast<Feature>(n));
    }
    return policy;
}

/// What KVM would have of `state`, read back.
CpuState through_kvm(const CpuState& state) {
    kvm_regs regs{};
    kvm_sregs sregs{};
    kvm_xcrs xcrs{};
    kvm_debugregs debug{};
    kvm_vcpu_events events{};
    kvm_mp_state activity{};
    std::vector<u8> xsave(4096, 0xcc);
    to_kvm(state, regs);
    to_kvm(state, sregs);
    to_kvm(state, xcrs);
    to_kvm(state, debug);
    to_kvm(state, events);
    to_kvm(state, activity);
    to_kvm(state.fpu, true, xsave);
    CpuState result;
    from_kvm(regs, result);
    from_kvm(sregs, result);
    from_kvm(xcrs, result);
    from_kvm(debug, result);
    from_kvm(events, result);
    from_kvm(activity, result);
    from_kvm(xsave, result.fpu);
    const u64 efer = result.msr.efer;
    result.msr = state.msr;  // MSRs are not converted, but moved one by one
    result.msr.efer = efer;
    return result;
}

void round_trips() {
    const CpuidPolicy policy = everything();
    StateGenerator generator({policy}, 1);
    for (int round = 0; round < 2000; ++round) {
        for (CpuMode mode : kCpuModes) {
            CpuState state = generator.next(mode);
            validate(state, policy);  // the generator's promise
            CpuState got = through_kvm(state);
            if (state.activity == Activity::kShutdown) state.activity = Activity::kRunning;
            CHECK_EQ(differences(got, state), std::string());
        }
    }
    for (bool bootstrap : {false, true}) {
        CpuState state = reset_state(bootstrap);
        CHECK_EQ(differences(through_kvm(state), state), std::string());
    }
}

void activities() {
    auto read = [](u32 mp_state) {
        CpuState state;
        from_kvm(kvm_mp_state{mp_state}, state);
        return state.activity;
    };
    CHECK_EQ(read(KVM_MP_STATE_UNINITIALIZED), Activity::kWaitForSipi);
    CHECK_EQ(read(KVM_MP_STATE_INIT_RECEIVED), Activity::kWaitForSipi);
    CHECK_EQ(read(KVM_MP_STATE_SIPI_RECEIVED), Activity::kRunning);
    CHECK_EQ(read(KVM_MP_STATE_HALTED), Activity::kHalted);
}

void events() {
    CpuState state = reset_state(true);
    kvm_vcpu_events raw{};
    state.interrupt_shadow = true;
    to_kvm(state, raw);
    CHECK_EQ(unsigned{raw.interrupt.shadow}, unsigned{KVM_X86_SHADOW_INT_MOV_SS});
    state.rflags |= bit(9);
    to_kvm(state, raw);
    CHECK_EQ(unsigned{raw.interrupt.shadow}, unsigned{KVM_X86_SHADOW_INT_STI});

    // Software events: the instruction runs again.
    for (auto kind :
         {InFlightEvent::Kind::kSoftwareInterrupt, InFlightEvent::Kind::kSoftwareException}) {
        state.event = {.kind = kind, .vector = 3, .length = 1};
        to_kvm(state, raw);
        CHECK(!raw.interrupt.injected && !raw.exception.injected && !raw.nmi.injected);
    }

    // What was left of an earlier event is not read.
    raw = {};
    raw.interrupt.nr = 0x20;
    raw.exception.nr = 14;
    raw.exception.has_error_code = 1;
    raw.exception.error_code = 7;
    from_kvm(raw, state);
    CHECK(state.event == InFlightEvent{});
    raw.exception.injected = 1;
    raw.exception.has_error_code = 0;
    from_kvm(raw, state);
    CHECK_EQ(state.event.error_code, 0u);
    // An acknowledged interrupt is not lost to an exception of its delivery.
    raw.interrupt.injected = 1;
    from_kvm(raw, state);
    CHECK_EQ(state.event.kind, InFlightEvent::Kind::kInterrupt);
    CHECK_EQ(unsigned{state.event.vector}, 0x20u);
}

void segments() {
    CpuState state = reset_state(true);
    state.tr.attributes = 0x89;                 // available, which no loaded task register says
    state.segments[kCs].attributes |= 1 << 13;  // L outside IA-32e mode
    kvm_sregs sregs{};
    sregs.apic_base = 0xfee00900;
    sregs.cr8 = 5;
    sregs.interrupt_bitmap[2] = 1;
    to_kvm(state, sregs);
    CHECK_EQ(unsigned{sregs.tr.type}, 0xbu);
    CHECK_EQ(unsigned{sregs.cs.l}, 0u);
    CHECK_EQ(u64{sregs.apic_base}, u64{0xfee00900});
    CHECK_EQ(u64{sregs.cr8}, u64{5});
    CHECK_EQ(u64{sregs.interrupt_bitmap[2]}, u64{0});

    state = reset_state(true);
    state.ldtr = {0, 0, 1 << 16, 0};
    to_kvm(state, sregs);
    CHECK(sregs.ldt.unusable && !sregs.ldt.present);
    // VMX's KVM reads a null segment as "not present" too; either way it stays one.
    CpuState got;
    from_kvm(sregs, got);
    CHECK_EQ(got.ldtr.attributes, state.ldtr.attributes);
}

void xcr0() {
    CpuState state = reset_state(true);
    kvm_xcrs xcrs{};
    to_kvm(state, xcrs);
    CHECK_EQ(xcrs.nr_xcrs, 0u);  // a host without XSAVE refuses the call
    state.xcr0 = 3;
    to_kvm(state, xcrs);
    CHECK_EQ(xcrs.nr_xcrs, 1u);
    xcrs = {};
    from_kvm(xcrs, state);
    CHECK_EQ(state.xcr0, u64{1});
}

void fpu() {
    FpuState state = reset_state(true).fpu;
    std::vector<u8> area(4096, 0xaa);
    state.ymm_high[3][0] = 7;
    to_kvm(state, false, area);
    CHECK_EQ(area[576], u8{0xaa});  // no AVX, nothing there
    CHECK_EQ(area[512], u8{3});
    to_kvm(state, true, area);
    CHECK_EQ(area[512], u8{7});
    CHECK_EQ(area[576 + 48], u8{7});

    // What is no register does not make two states differ.
    area[28] = 0xff, area[30] = 2;  // MXCSR_MASK of an AMD CPU
    area[5] = area[42] = area[416] = area[511] = 0x55;
    FpuState got;
    from_kvm(area, got);
    CHECK(got == state);
    // Components in their initial state.
    area[512] = 3;
    from_kvm(area, got);
    CHECK_EQ(got.ymm_high[3][0], u8{0});
}

}  // namespace

int main() {
    round_trips();
    activities();
    events();
    segments();
    xcr0();
    fpu();
    return pvtest::finish("test_cpu_state_convert");
}
