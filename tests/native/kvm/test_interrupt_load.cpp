// No interrupt is lost, and none comes twice: a guest of two CPUs counts interprocessor interrupts,
// those of its APIC timer, and the host's messages. IPIs and messages come sixteen vectors at a
// time; each source goes on when all of its last ones were counted, so that none may merge with
// another.
//
// Where QEMU's TCG emulates several CPUs, interrupts that come twice are told but are no failure of
// the kvm engine: one that VMRUN injects comes again when another CPU stops this one just then.
//
//     test_interrupt_load [ROUNDS [MODE]]
//
// A round is 16 IPIs, 16 messages and a timer interrupt: 30304 rounds are a million. MODE: soft, or
// kvm's kernel, split or user.
#include <cpuid.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "base/error.hpp"
#include "bus/pod_state.hpp"
#include "check.hpp"
#include "machine/engines.hpp"
#include "machine/machine.hpp"

using namespace polyvisor;
using namespace std::chrono_literals;

namespace {

// Where things are in guest memory. The code below has the same numbers.
constexpr u64 kCode = 0x10000, kIdt = 0x20000, kGdt = 0x21000, kTables = 0x22000, kCounts = 0x30000,
              kStacks = 0x40000, kHandlers = 0x50000;

constexpr u32 kTimerVector = 0x42, kIpiVector = 0x50, kMsiVector = 0x60, kBatch = 16;

struct Counts {
    u64 rounds;       // wanted
    u64 ipi_rounds;   // begun by CPU 0
    u64 timer;        // on CPU 1
    u64 timer_armed;  // by CPU 1
    u64 ready;        // CPU 1 takes interrupts
    u64 stray;        // interrupts that nobody sent
    u64 msi_rounds;   // begun by the host
    u64 reserved[25];
    u64 ipi[kBatch];  // on CPU 1, by vector
    u64 msi[kBatch];  // on CPU 0, by vector
};
static_assert(offsetof(Counts, ipi) == 0x100 && offsetof(Counts, msi) == 0x180);

// 64-bit code at kCode. x2APIC registers: 80f SVR, 80b EOI, 830 ICR, 832 LVT timer, 838 initial
// count, 83e divide configuration.
asm(R"(
    .pushsection .rodata
    .globl guest_code, guest_cpu1, guest_timer, guest_stray, guest_eoi, guest_code_end
guest_code:
    mov $0x80f, %ecx
    mov $0x1ff, %eax
    xor %edx, %edx
    wrmsr
    mov $0x30000, %ebx
    sti
1:  cmpq $0, 0x20(%rbx)
    je 1b
2:  mov 0x8(%rbx), %rax
    cmp (%rbx), %rax
    jae 5f
    incq 0x8(%rbx)
    mov $0x4050, %esi
3:  mov $0x830, %ecx
    mov %esi, %eax
    mov $1, %edx
    wrmsr
    inc %esi
    cmp $0x4060, %esi
    jb 3b
    xor %esi, %esi
    mov 0x8(%rbx), %rax
4:  cmp %rax, 0x100(%rbx,%rsi,8)
    jb 4b
    inc %esi
    cmp $16, %esi
    jb 4b
    jmp 2b
5:  mov (%rbx), %rax
    cmp 0x10(%rbx), %rax
    ja 5b
    xor %esi, %esi
6:  cmp %rax, 0x180(%rbx,%rsi,8)
    jb 6b
    inc %esi
    cmp $16, %esi
    jb 6b
    mov $0xf4, %edx
    xor %eax, %eax
    out %eax, %dx
    jmp 5b

guest_cpu1:
    mov $0x80f, %ecx
    mov $0x1ff, %eax
    xor %edx, %edx
    wrmsr
    mov $0x83e, %ecx
    mov $0xb, %eax
    wrmsr
    mov $0x832, %ecx
    mov $0x42, %eax
    wrmsr
    mov $0x30000, %ebx
    incq 0x18(%rbx)
    mov $0x838, %ecx
    mov $20000, %eax
    wrmsr
    movq $1, 0x20(%rbx)
7:  sti
    hlt
    jmp 7b

guest_timer:
    push %rax
    push %rcx
    push %rdx
    lock incq 0x30010
    mov 0x30018, %rax
    cmp 0x30000, %rax
    jae 8f
    lock incq 0x30018
    mov $0x838, %ecx
    mov $20000, %eax
    xor %edx, %edx
    wrmsr
    jmp 8f
guest_stray:
    lock incq 0x30028
guest_eoi:
    push %rax
    push %rcx
    push %rdx
8:  mov $0x80b, %ecx
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    pop %rdx
    pop %rcx
    pop %rax
    iretq
guest_code_end:
    .popsection
)");
extern "C" const u8 guest_code[], guest_cpu1[], guest_timer[], guest_stray[], guest_eoi[],
    guest_code_end[];

u64 in_guest(const u8* label) {
    return kCode + static_cast<u64>(label - guest_code);
}

// A handler that counts at `counter` and ends the interrupt.
u64 write_handler(GuestMemory& memory, u64 at, u64 counter) {
    const u8 lock_inc[] = {0xf0, 0x48, 0xff, 0x04, 0x25};
    memory.write(Gpa(at), lock_inc);
    memory.store<u32>(Gpa(at + 5), static_cast<u32>(counter));
    memory.store<u8>(Gpa(at + 9), 0xe9);
    memory.store<u32>(Gpa(at + 10), static_cast<u32>(in_guest(guest_eoi) - (at + 14)));
    return at;
}

void write_guest(GuestMemory& memory, u64 rounds) {
    memory.write(Gpa(kCode), {guest_code, static_cast<std::size_t>(guest_code_end - guest_code)});
    memory.store<u64>(Gpa(kGdt + 8), 0x00af9b000000ffff);   // 64-bit code
    memory.store<u64>(Gpa(kGdt + 16), 0x00cf93000000ffff);  // data
    memory.store<u64>(Gpa(kTables), (kTables + 0x1000) | 3);
    memory.store<u64>(Gpa(kTables + 0x1000), (kTables + 0x2000) | 3);
    memory.store<u64>(Gpa(kTables + 0x2000), 0x83);  // the first 2 MiB
    for (u32 vector = 0; vector < 256; ++vector) {
        u64 handler = in_guest(vector == kTimerVector ? guest_timer : guest_stray);
        u64 counter = 0;
        if (vector - kIpiVector < kBatch) {
            counter = offsetof(Counts, ipi) + 8 * (vector - kIpiVector);
        } else if (vector - kMsiVector < kBatch) {
            counter = offsetof(Counts, msi) + 8 * (vector - kMsiVector);
        }
        if (counter != 0) {
            handler = write_handler(memory, kHandlers + 16 * vector, kCounts + counter);
        }
        u64 gate = (handler & 0xffff) | 8 << 16 | u64{0x8e00} << 32 | (handler >> 16) << 48;
        memory.store<u64>(Gpa(kIdt + 16 * vector), gate);
        memory.store<u64>(Gpa(kIdt + 16 * vector + 8), handler >> 32);
    }
    memory.store<u64>(Gpa(kCounts), rounds);
}

CpuState start_state(u32 cpu) {
    CpuState state = reset_state(true);
    state.cr0 = 0x80000011;
    state.cr3 = kTables;
    state.cr4 = 0x20;
    state.msr.efer = 0x500;
    Segment data{0, 0xffffffff, 0xc093, 16};
    for (Segment& segment : state.segments) segment = data;
    state.segments[kCs] = {0, 0xffffffff, 0xa09b, 8};
    state.gdtr = {kGdt, 23};
    state.idtr = {kIdt, 4095};
    state.rip = in_guest(cpu == 0 ? guest_code : guest_cpu1);
    state.gpr[kRsp] = kStacks + 0x1000 * (cpu + 1);
    return state;
}

// x2APIC mode, as an operating system would switch it on.
void enable_x2apic(Machine& machine) {
    for (auto& part : machine.pc().parts()) {
        if (part.name.rfind("lapic", 0) != 0) continue;
        auto state = load_pod<irqchip::Lapic::State>(part.save(), part.name);
        state.apic_base |= bit(10) | bit(11);
        part.restore(save_pod(state));
    }
}

bool several_emulated_cpus() {
    u32 eax = 0, name[3]{};
    __cpuid(0x40000000, eax, name[0], name[1], name[2]);
    return std::memcmp(name, "TCGTCGTCGTCG", sizeof name) == 0 &&
           std::thread::hardware_concurrency() > 1;
}

// The guest's counters, which it changes meanwhile.
u64 load(Machine& machine, std::size_t offset) {
    u8* host = machine.memory()->span(Gpa(kCounts + offset), 8).data();
    return std::atomic_ref<u64>(*reinterpret_cast<u64*>(host)).load();
}

u64 least(Machine& machine, std::size_t array) {
    u64 result = ~u64{0};
    for (u32 n = 0; n < kBatch; ++n) result = std::min(result, load(machine, array + 8 * n));
    return result;
}

void run(const char* engine, const char* irqchip, u64 rounds) {
    MachineConfig config;
    config.engine = engine;
    config.irqchip = irqchip;
    config.memory = 4 << 20;
    config.cpus = 2;
    Machine machine(config);
    write_guest(*machine.memory(), rounds);
    machine.pc().finish_wiring();
    for (u32 cpu = 0; cpu < 2; ++cpu) machine.vcpu(cpu).restore(start_state(cpu));
    enable_x2apic(machine);

    auto begin = std::chrono::steady_clock::now();
    auto elapsed = [&] { return (std::chrono::steady_clock::now() - begin) / 1ms; };
    machine.start();
    u64 sent = 0, last = 0;
    auto moved = elapsed();
    while (!machine.wait(0ms)) {
        if (sent < rounds && load(machine, offsetof(Counts, ready)) != 0 &&
            least(machine, offsetof(Counts, msi)) == sent) {
            ++sent;
            for (u32 n = 0; n < kBatch; ++n) {
                machine.pc().msi().send(0xfee00000, 0x4000 | (kMsiVector + n));
            }
        } else {
            std::this_thread::sleep_for(20us);
        }
        u64 sum = load(machine, offsetof(Counts, ipi_rounds)) +
                  load(machine, offsetof(Counts, timer)) + sent;
        if (sum != last) {
            last = sum;
            moved = elapsed();
        } else if (elapsed() - moved > 10'000) {
            break;  // one was lost
        }
    }
    machine.stop();
    StopInfo info = machine.stop_info();
    std::printf("%s, irqchip %s: %llu interrupts in %llu ms: %s %s\n", engine, irqchip,
                static_cast<unsigned long long>(rounds * (2 * kBatch + 1)),
                static_cast<unsigned long long>(elapsed()), to_string(info.reason),
                info.detail.c_str());
    std::fflush(stdout);
    CHECK_EQ(info.reason, StopReason::kDebugExit);
    u64 twice = 0;
    auto check = [&](std::size_t counter) {
        u64 count = load(machine, counter);
        CHECK(count >= rounds);
        twice += std::max(count, rounds) - rounds;
    };
    for (u32 n = 0; n < kBatch; ++n) {
        check(offsetof(Counts, ipi) + 8 * n);
        check(offsetof(Counts, msi) + 8 * n);
    }
    check(offsetof(Counts, timer));
    if (twice != 0) std::printf("%llu came twice\n", static_cast<unsigned long long>(twice));
    if (std::strcmp(engine, "kvm") != 0 || !several_emulated_cpus()) CHECK_EQ(twice, u64{0});
    CHECK_EQ(load(machine, offsetof(Counts, stray)), u64{0});
}

}  // namespace

int main(int argc, char** argv) {
    u64 rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 300;
    std::string only = argc > 2 ? argv[2] : "";
    if (only.empty() || only == "soft") run("soft", "user", rounds);
    for (const EngineStatus& status : engines()) {
        if (status.name != "kvm" || status.reason.empty()) continue;
        int result = pvtest::finish("test_interrupt_load");
        std::printf("%s\n", status.message.c_str());
        return result != 0 ? result : 77;
    }
    for (const char* irqchip : {"kernel", "split", "user"}) {
        if (only.empty() || only == irqchip) run("kvm", irqchip, rounds);
    }
    return pvtest::finish("test_interrupt_load");
}
