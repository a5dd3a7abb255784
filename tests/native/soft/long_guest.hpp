// The smallest machine that 64-bit code runs on: 16 MiB of RAM, identity-mapped with 2 MiB pages by
// tables at 0x1000, CPL 0, no interrupts. Guest code is assembled into the test with PV_GUEST.
#pragma once

#include <memory>
#include <string_view>

#include "guest_code.hpp"
#include "soft/engine.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor {

inline CpuidPolicy everything() {
    CpuidPolicy policy;
    for (unsigned n = 0; n < static_cast<unsigned>(Feature::kCount); ++n) {
        policy.features.set(static_cast<Feature>(n));
    }
    return policy;
}

struct LongGuest {
    static constexpr u64 kTables = 0x1000;
    static constexpr u64 kCode = 0x100000;
    static constexpr u64 kStack = 0x200000;
    static constexpr u64 kData = 0x300000;

    GuestMemory memory;
    Bus pio{"pio", 0x10000};
    Bus mmio{"mmio", bit(52)};
    Clock clock;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;

    explicit LongGuest(std::string_view code, bool deterministic = false)
        : clock(deterministic ? Clock::Mode::kDeterministic : Clock::Mode::kFreeRunning) {
        memory.add(Gpa(0), 16 << 20, "ram");
        memory.store<u64>(Gpa(kTables), 0x2007);
        memory.store<u64>(Gpa(0x2000), 0x3007);
        for (u64 n = 0; n < 8; ++n) memory.store<u64>(Gpa(0x3000 + 8 * n), (n << 21) | 0x87);
        load(kCode, code);
        EngineConfig config{memory, pio, mmio, clock, everything()};
        config.deterministic = deterministic;
        engine = soft::create_engine(config);
        vcpu = engine->create_vcpu(0, nullptr);
        CpuState state = reset_state(true);
        state.cr0 = 0x80050033;
        state.cr4 = 0x620;
        state.cr3 = kTables;
        state.msr.efer = 0xd01;
        state.rip = kCode;
        state.gpr[kRsp] = kStack;
        for (Segment& segment : state.segments) segment = {0, 0xffffffff, 0xc093, 16};
        state.segments[kCs] = {0, 0xffffffff, 0xa09b, 8};
        vcpu->restore(state);
    }

    soft::SoftVcpu& soft() { return static_cast<soft::SoftVcpu&>(*vcpu); }
    void load(u64 gpa, std::string_view bytes) {
        memory.write(Gpa(gpa), {reinterpret_cast<const u8*>(bytes.data()), bytes.size()});
    }
    /// Runs to HLT (or whatever ends it), at most `limit` instructions.
    Exit run(u64 limit = 50'000'000) {
        vcpu->set_instruction_budget(limit);
        return vcpu->run();
    }
    u64 reg(unsigned n) const { return vcpu->save().gpr[n]; }
};

}  // namespace polyvisor
