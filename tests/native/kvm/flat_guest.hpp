// The smallest machine on KVM that 64-bit code runs on: 16 MiB of RAM, identity-mapped with 2 MiB
// pages by tables at 0x1000, CPL 0, no interrupts, no local APIC.
#pragma once

#include <unistd.h>

#include <memory>
#include <string_view>

#include "check.hpp"
#include "guest_code.hpp"
#include "kvm/engine.hpp"

namespace pvtest {

using namespace polyvisor;

/// Whether this user can open a /dev/kvm; says so on stdout when not, for exit status 77.
inline bool have_kvm() {
    if (::access("/dev/kvm", R_OK | W_OK) == 0) return true;
    std::puts("no /dev/kvm that this user can open");
    return false;
}

struct FlatGuest {
    static constexpr u64 kTables = 0x1000, kCode = 0x100000, kStack = 0x200000;
    static constexpr u64 kSize = 16 << 20;

    GuestMemory memory;
    Bus pio{"pio", 0x10000};
    Bus mmio{"mmio", bit(52)};
    Clock clock{Clock::Mode::kFreeRunning};
    std::unique_ptr<Engine> engine;
    std::vector<std::unique_ptr<Vcpu>> vcpus;

    explicit FlatGuest(std::string_view code, u32 cpus = 1, u32 dirty_ring = 0) {
        memory.add(Gpa(0), kSize, "ram");
        memory.add(Gpa(0xfff00000), 0x3000, "rom", true);
        memory.store<u64>(Gpa(kTables), 0x2007);
        memory.store<u64>(Gpa(0x2000), 0x3007);
        memory.store<u64>(Gpa(0x2018), 0x4007);  // the fourth gigabyte
        for (u64 n = 0; n < 8; ++n) memory.store<u64>(Gpa(0x3000 + 8 * n), (n << 21) | 0x87);
        memory.store<u64>(Gpa(0x4000 + 8 * 511), 0xffe00087);
        memory.write(Gpa(kCode), {reinterpret_cast<const u8*>(code.data()), code.size()});
        auto system = std::make_shared<kvm::System>();
        clock.set_tsc_khz(system->tsc_khz());
        EngineConfig config{memory, pio, mmio, clock, {}};
        config.cpuid =
            make_cpuid_policy("host", make_offer(*system).features, cpus, clock.tsc_khz());
        config.cpus = cpus;
        config.dirty_ring = dirty_ring;
        engine = kvm::create_engine(system, config);
        for (u32 cpu = 0; cpu < cpus; ++cpu) {
            vcpus.push_back(engine->create_vcpu(cpu, nullptr));
            CpuState state = reset_state(true);
            state.cr0 = 0x80050033;
            state.cr4 = 0x620;
            state.cr3 = kTables;
            state.msr.efer = 0xd01;
            state.rip = kCode;
            state.gpr[kRsp] = kStack - cpu * 0x1000;
            for (Segment& segment : state.segments) segment = {0, 0xffffffff, 0xc093, 16};
            state.segments[kCs] = {0, 0xffffffff, 0xa09b, 8};
            vcpus.back()->restore(state);
        }
    }
};

}  // namespace pvtest
