// A CPU that a program has left is given to another one: nothing of the former can be seen, in the
// CPU's state as the engine tells it, and by a program that looks.
#include <cstdio>
#include <cstring>

#include "../kvm/compare_state.hpp"
#include "base/error.hpp"
#include "check.hpp"
#include "kvm/engine.hpp"
#include "no_interrupts.hpp"
#include "process/page_tables.hpp"
#include "process/supervisor.hpp"
#include "soft/engine.hpp"
#include "soft/system.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

// Leaves something in every register that a program can write to, and makes a system call.
asm(R"(
    .pushsection .rodata
leave_avx:
    vcmptrueps %ymm0, %ymm0, %ymm0
    vcmptrueps %ymm1, %ymm1, %ymm1
    vcmptrueps %ymm7, %ymm7, %ymm7
    vcmptrueps %ymm8, %ymm8, %ymm8
    vcmptrueps %ymm15, %ymm15, %ymm15
leave:
    pcmpeqd %xmm0, %xmm0
    pcmpeqd %xmm7, %xmm7
    pcmpeqd %xmm15, %xmm15
    movl $0x3f80, -8(%rsp)
    ldmxcsr -8(%rsp)
    fldpi
    fldln2
    fldl2e
    movw $0xc7f, -8(%rsp)
    fldcw -8(%rsp)
    mov $0x23, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov $-1, %rbx
    mov $-2, %rdx
    mov $-3, %rsi
    mov $-4, %rdi
    mov $-5, %rbp
    mov $-6, %r8
    mov $-7, %r9
    mov $-8, %r10
    mov $-9, %r12
    mov $-10, %r13
    mov $-11, %r14
    mov $-12, %r15
    pushf
    orl $0x240cd5, (%rsp)
    popf
    syscall
leave_end:
look_avx:
    vmovups %ymm0, 0x500200
    vmovups %ymm1, 0x500220
    vmovups %ymm7, 0x500240
    vmovups %ymm8, 0x500260
    vmovups %ymm15, 0x500280
look:
    fxsave64 0x500000
    mov %ds, 0x5002a0
    mov %es, 0x5002a2
    mov %fs, 0x5002a4
    mov %gs, 0x5002a6
    pushf
    popq 0x5002a8
    syscall
look_end:
    .popsection
)");
extern "C" const u8 leave_avx[], leave[], leave_end[], look_avx[], look[], look_end[];

namespace {

constexpr u64 kText = 0x400000, kStack = 0x500000;
constexpr std::size_t kSeen = 0x2b0;

struct Machine {
    Machine(std::shared_ptr<const kvm::System> host, bool avx) : arena(memory, 64 << 20, 1 << 20) {
        const bool on_kvm = host != nullptr;
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
        supervisor = std::make_unique<Supervisor>(arena, tables, !on_kvm);
        text = *arena.allocate(kPageSize), stack = *arena.allocate(kPageSize);
        tables.map(kText, text, kPageSize, kReadable | kExecutable);
        tables.map(kStack, stack, kPageSize, kReadable | kWritable);
        fresh = supervisor->add_cpu(avx ? 7 : 3);
        start();
    }
    void start() {
        vcpu->restore(fresh);
        supervisor->restart(0);
        std::memset(arena.host(stack), 0, kPageSize);
    }
    /// To its system call.
    void run(const u8* code, const u8* end) {
        std::memcpy(arena.host(text), code, static_cast<std::size_t>(end - code));
        engine->forget_tables();
        memory.recheck_code(text, kPageSize);
        GeneralRegisters registers;
        registers.rip = kText;
        registers.gpr[kRsp] = kStack + kPageSize;
        const Trap trap = supervisor->run(*vcpu, registers, true);
        CHECK(trap.kind == Trap::Kind::kSystemCall);
        if (trap.kind != Trap::Kind::kSystemCall) {
            std::fprintf(stderr, "kind %d vector %u rip %#llx %s\n", static_cast<int>(trap.kind),
                         trap.vector, static_cast<unsigned long long>(registers.rip),
                         trap.text.c_str());
        }
    }
    std::vector<u8> seen(bool avx) {
        run(avx ? look_avx : look, look_end);
        return {arena.host(stack), arena.host(stack) + kSeen};
    }

    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Clock clock;
    pvtest::NoInterrupts interrupts;
    Arena arena;
    PageTables tables{arena};
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Supervisor> supervisor;
    std::unique_ptr<Vcpu> vcpu;
    Gpa text, stack;
    CpuState fresh;
};

CpuState without_time(CpuState state) {
    state.msr.tsc_offset = state.msr.tsc_adjust = 0;
    state.instructions = 0;
    return state;
}

void nothing_is_left(const std::shared_ptr<const kvm::System>& host, bool avx) {
    Machine machine(host, avx);
    const CpuState at_first = without_time(machine.vcpu->save());
    const std::vector<u8> empty = machine.seen(avx);
    machine.start();
    machine.run(avx ? leave_avx : leave, leave_end);
    const std::vector<u8> full = machine.seen(avx);
    CHECK(full != empty);  // which means that it can be seen
    machine.run(avx ? leave_avx : leave, leave_end);
    machine.supervisor->set_base(0, kFs, 0x1234'5678);
    machine.supervisor->set_base(0, kGs, 0x1234'5678);
    machine.seen(avx);
    CHECK(without_time(machine.vcpu->save()) != at_first);
    machine.start();
    const std::string left = pvtest::differences(without_time(machine.vcpu->save()), at_first);
    CHECK_EQ(left, std::string());
    CHECK(machine.seen(avx) == empty);
}

constexpr u64 kAddress = 0x000f'ffff'ffff'f000;

u64& entry_at(Machine& machine, u64 table, u64 gva, unsigned shift) {
    auto* entries = reinterpret_cast<u64*>(machine.arena.host(Gpa(table & kAddress)));
    return entries[gva >> shift & 511];
}

// Other tables where the CPU had some, as after going back to an image: at each level, those of
// another address that it knows too, in exchange or for both.
void other_tables(const std::shared_ptr<const kvm::System>& host, unsigned level, bool exchanged) {
    Machine machine(host, false);
    const u64 distance = u64{1} << level, other = kText + distance;
    const Gpa page = *machine.arena.allocate(kPageSize);
    std::memcpy(machine.arena.host(page), leave, static_cast<std::size_t>(leave_end - leave));
    machine.tables.map(other, page, kPageSize, kReadable | kExecutable);
    if (level > kPageShift) {
        machine.tables.map(kStack + distance, machine.stack, kPageSize, kReadable | kWritable);
    }
    // Which of the two it is.
    auto left = [&](u64 text) {
        GeneralRegisters registers;
        registers.rip = text;
        registers.gpr[kRsp] = kStack + kPageSize;
        const Trap trap = machine.supervisor->run(*machine.vcpu, registers, true);
        CHECK(trap.kind == Trap::Kind::kSystemCall);
        return registers.gpr[kRbx] != 0;
    };
    std::memcpy(machine.arena.host(machine.text), look, static_cast<std::size_t>(look_end - look));
    CHECK(!left(kText));
    CHECK(left(other));
    u64 table = machine.tables.root(), second = table;
    for (unsigned shift = 39; shift > level; shift -= 9) {
        table = entry_at(machine, table, kText, shift);
        second = entry_at(machine, second, other, shift);
    }
    u64& one = entry_at(machine, table, kText, level);
    u64& two = entry_at(machine, second, other, level);
    exchanged ? std::swap(one, two) : void(one = two);
    machine.engine->forget_tables();
    machine.start();
    CHECK(left(kText));
    CHECK_EQ(left(other), !exchanged);
}

}  // namespace

int main() {
    std::shared_ptr<const kvm::System> host;
    try {
        host = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::fprintf(stderr, "%s\n", error.what());
    }
    for (bool on_kvm : {false, true}) {
        if (on_kvm && host == nullptr) continue;
        const auto& system = on_kvm ? host : nullptr;
        const FeatureSet features =
            on_kvm ? kvm::make_offer(*host).features : soft::implemented_features();
        if (!features.has(Feature::kXsave)) continue;
        nothing_is_left(system, false);
        if (features.has(Feature::kAvx)) nothing_is_left(system, true);
        for (unsigned level : {12u, 21u, 30u, 39u}) {
            for (bool swapped : {false, true}) other_tables(system, level, swapped);
        }
    }
    return pvtest::finish("reuse");
}
