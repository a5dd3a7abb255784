// A CPU in 64-bit mode at CPL 0 with an IDT, on either engine, for tests of debugging: 4 MiB of
// RAM, identity-mapped. Every vector leads to kHandler, which counts in R15 and returns.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "check.hpp"
#include "guest_code.hpp"
#include "machine/engines.hpp"

namespace pvtest {

using namespace polyvisor;

struct DebugGuest {
    static constexpr u64 kTables = 0x1000, kIdt = 0x5000, kGdt = 0x6000, kHandler = 0x7000;
    static constexpr u64 kCode = 0x10000, kStack = 0x20000, kData = 0x30000;

    GuestMemory memory;
    Bus pio{"pio", 0x10000};
    Bus mmio{"mmio", bit(52)};
    Clock clock{Clock::Mode::kFreeRunning};
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;

    DebugGuest(const std::string& name, std::string_view code) {
        memory.add(Gpa(0), 4 << 20, "ram");
        memory.store<u64>(Gpa(kTables), 0x2007);
        memory.store<u64>(Gpa(0x2000), 0x3007);
        for (u64 n = 0; n < 2; ++n) memory.store<u64>(Gpa(0x3000 + 8 * n), (n << 21) | 0x87);
        for (u64 vector = 0; vector < 256; ++vector) {
            memory.store<u64>(Gpa(kIdt + 16 * vector), 0x8e00'0008'0000 | kHandler);
        }
        memory.store<u64>(Gpa(kGdt + 8), 0x00af9b000000ffff);
        memory.store<u64>(Gpa(kGdt + 16), 0x00cf93000000ffff);
        const u8 handler[] = {0x49, 0xff, 0xc7, 0x48, 0xcf};  // inc r15; iretq
        memory.write(Gpa(kHandler), handler);
        memory.write(Gpa(kCode), {reinterpret_cast<const u8*>(code.data()), code.size()});
        EngineOffer offer = engine_offer(name);
        clock.set_tsc_khz(offer.native_tsc_khz != 0 ? offer.native_tsc_khz : 1'000'000);
        EngineConfig config{memory, pio, mmio, clock, {}};
        config.cpuid = make_cpuid_policy("baseline", offer.features, 1, clock.tsc_khz());
        engine = create_engine(name, config);
        vcpu = engine->create_vcpu(0, nullptr);
        CpuState state = reset_state(true);
        state.cr0 = 0x80000033;
        state.cr4 = 0x620;
        state.cr3 = kTables;
        state.msr.efer = 0xd00;
        state.rip = kCode;
        state.gpr[kRsp] = kStack;
        state.gpr[kRbx] = kData;
        state.gpr[kRdi] = kData + 0x100;
        for (Segment& segment : state.segments) segment = {0, 0xffffffff, 0xc093, 16};
        state.segments[kCs] = {0, 0xffffffff, 0xa09b, 8};
        state.gdtr = {kGdt, 23};
        state.idtr = {kIdt, 0xfff};
        vcpu->restore(state);
    }

    CpuState state() const { return vcpu->save(); }
};

}  // namespace pvtest
