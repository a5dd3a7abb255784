// Small programs at CPL 3 on each engine: what they do arrives as traps, and they go on from them.
#include "process/supervisor.hpp"

#include <time.h>

#include <cstdio>
#include <cstring>

#include "base/error.hpp"
#include "check.hpp"
#include "kvm/engine.hpp"
#include "no_interrupts.hpp"
#include "process/page_tables.hpp"
#include "soft/engine.hpp"
#include "soft/system.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

namespace {

std::shared_ptr<const kvm::System> host;  // nullptr: no KVM here

struct Program {
    Program(bool on_kvm, std::vector<u8> code)
        : arena(memory, 64 << 20, 1 << 20), tables(arena), supervisor(arena, tables, !on_kvm) {
        EngineOffer offer =
            on_kvm ? kvm::make_offer(*host) : EngineOffer{.features = soft::implemented_features()};
        const u64 khz = on_kvm ? host->tsc_khz() : 1'000'000;
        clock.set_tsc_khz(khz);
        EngineConfig config{memory, pio, mmio, clock,
                            make_cpuid_policy("host", offer.features, 1, khz)};
        config.port_exits = on_kvm;
        config.hypercall_exits = !on_kvm;
        engine = on_kvm ? kvm::create_engine(host, config) : soft::create_engine(config);
        vcpu = engine->create_vcpu(0, &interrupts);
        Gpa text = *arena.allocate(kPageSize), stack = *arena.allocate(kPageSize);
        std::memcpy(arena.host(text), code.data(), code.size());
        tables.map(0x400000, text, kPageSize, kReadable | kExecutable);
        tables.map(0x7fff0000, stack, kPageSize, kReadable | kWritable);
        vcpu->restore(supervisor.add_cpu(1));
        registers.rip = 0x400000;
        registers.gpr[kRsp] = 0x7fff1000;
    }
    Trap run() { return supervisor.run(*vcpu, registers, false); }

    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Clock clock;
    pvtest::NoInterrupts interrupts;
    Arena arena;
    PageTables tables;
    Supervisor supervisor;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;
    GeneralRegisters registers;
};

void system_calls(bool on_kvm) {
    // loop: syscall; inc %rdi; jmp loop
    Program program(on_kvm, {0x0f, 0x05, 0x48, 0xff, 0xc7, 0xeb, 0xf9});
    program.registers.gpr[kRax] = 39;
    timespec before{}, after{};
    constexpr int kCalls = 2000;
    for (int n = 0; n < kCalls; ++n) {
        if (n == 100) clock_gettime(CLOCK_MONOTONIC, &before);
        const Trap trap = program.run();
        if (trap.kind != Trap::Kind::kSystemCall) {
            std::fprintf(stderr, "kind %d vector %u error %x %s rip %llx\n", (int)trap.kind,
                         trap.vector, trap.error, trap.text.c_str(),
                         (unsigned long long)program.registers.rip);
        }
        CHECK(trap.kind == Trap::Kind::kSystemCall);
        CHECK_EQ(program.registers.gpr[kRax], u64{39} + n);
        CHECK_EQ(program.registers.gpr[kRdi], u64(n));
        CHECK_EQ(program.registers.rip, u64{0x400002});
        CHECK_EQ(program.registers.gpr[kRsp], u64{0x7fff1000});
        program.registers.gpr[kRax] = 40 + n;
    }
    clock_gettime(CLOCK_MONOTONIC, &after);
    std::fprintf(stderr, "%s: %.2f us each\n", on_kvm ? "kvm" : "soft",
                 ((after.tv_sec - before.tv_sec) * 1e6 + (after.tv_nsec - before.tv_nsec) / 1e3) /
                     (kCalls - 100));
}

}  // namespace

int main() {
    try {
        host = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::fprintf(stderr, "%s\n", error.what());
    }
    system_calls(false);
    if (host) system_calls(true);
    return pvtest::finish("supervisor");
}
