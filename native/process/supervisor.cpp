#include "process/supervisor.hpp"

#include <cstring>

#include "base/error.hpp"
#include "process/page_tables.hpp"

namespace polyvisor::process {

namespace {

constexpr unsigned kVectors = 32;
constexpr u32 kTaskBytes = 104;
constexpr u64 kGateBytes = 16;
constexpr u64 kReturn = Supervisor::kGates + kVectors * kGateBytes;  // add rsp, 8; iretq
constexpr u64 kFlushReturn = kReturn + 16;
constexpr u64 kBaseReturn = kFlushReturn + 16;  // wrmsr, flush, and back with what they took
constexpr u64 kGatesEnd = kBaseReturn + 32;
constexpr u32 kFsBase = 0xc000'0100, kGsBase = 0xc000'0101;
constexpr u8 kInvalidOpcode = 6, kGeneralProtection = 13, kPageFault = 14;
constexpr u8 kSystemCallPort = 0x80;
// What a program may set of RFLAGS: status, TF, DF, AC, ID. Interrupts stay on.
constexpr u64 kUserFlags = 0x0024'0dd5, kFixedFlags = 0x202;

constexpr bool has_error_code(unsigned vector) {
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21;
}

u64 code_segment(unsigned dpl) {
    return 0x00af'9b00'0000'ffff | u64{dpl} << 45;
}
u64 data_segment(unsigned dpl) {
    return 0x00cf'9300'0000'ffff | u64{dpl} << 45;
}

struct Gate {
    u16 low, selector;
    u8 ist, type;
    u16 middle;
    u32 high, reserved;
};
static_assert(sizeof(Gate) == 16);

Gate gate(u64 target, unsigned dpl) {
    return {static_cast<u16>(target),
            Supervisor::kKernelCode,
            1,
            static_cast<u8>(0x8e | dpl << 5),
            static_cast<u16>(target >> 16),
            static_cast<u32>(target >> 32),
            0};
}

Segment segment(u16 selector, unsigned dpl, bool code) {
    Segment result;
    result.selector = selector;
    result.limit = 0xffffffff;
    result.attributes = static_cast<u32>((code ? 0xa09b : 0xc093) | dpl << 5);
    return result;
}

}  // namespace

// What a gate of the CPU leaves on the stack, and IRET takes (SDM 3A, figure 6-9).
struct Supervisor::Frame {
    u64 error, rip, cs, rflags, rsp, ss;
};

// What WRMSR's operands were, in front of it.
struct Supervisor::Saved {
    u64 rcx, rdx, rax;
};

Supervisor::Supervisor(Arena& arena, PageTables& tables, bool hypercalls)
    : arena_(arena), tables_(tables), hypercalls_(hypercalls) {
    cpus_.reserve(kMostCpus);  // which one may be added while others run
    state_.cpus.reserve(kMostCpus);
    auto page = [&](u64 gva, u8 rights) {
        auto gpa = arena.allocate_table();
        if (!gpa || !tables.map(gva, *gpa, kPageSize, rights)) {
            throw ConfigError("memory", "a process needs more memory than that");
        }
        return *gpa;
    };
    u8* gdt = arena.host(page(kGdt, kReadable | kSupervisorOnly));
    u8* idt = arena.host(page(kIdt, kReadable | kSupervisorOnly));
    u8* stubs = arena.host(page(kGates, kReadable | kExecutable | kSupervisorOnly));
    u8* entry = arena.host(page(kEntry, kReadable | kExecutable));
    state_.clock = page(kClock, kReadable);

    const u64 descriptors[] = {0, code_segment(0), data_segment(0),
                               0, data_segment(3), code_segment(3)};
    std::memcpy(gdt, descriptors, sizeof descriptors);

    auto* gates = reinterpret_cast<Gate*>(idt);
    u8* code = stubs;
    auto emit = [&code](std::initializer_list<u8> bytes) {
        for (u8 byte : bytes) *code++ = byte;
    };
    // (Which gate a hypercall came from is what RIP says.)
    auto call_host = [&](u8 port) {
        hypercalls ? emit({0x0f, 0x01, 0xc1}) : emit({0xe6, port});  // vmcall; out %al, $port
    };
    for (unsigned vector = 0; vector < kVectors; ++vector) {
        const u64 target = kGates + vector * kGateBytes;
        code = stubs + vector * kGateBytes;
        // INT3 and INTO are instructions of programs.
        gates[vector] = gate(target, vector == 3 || vector == 4 ? 3 : 0);
        if (!has_error_code(vector)) emit({0x6a, 0x00});  // push $0
        call_host(static_cast<u8>(vector));
    }
    code = stubs + (kReturn - kGates);
    emit({0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf});  // add $8, %rsp; iretq
    code = stubs + (kFlushReturn - kGates);
    emit({0x50, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x58});  // push %rax; mov %cr3, %rax; back; pop
    emit({0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf});
    code = stubs + (kBaseReturn - kGates);
    // wrmsr; mov %cr3, %rax; mov %rax, %cr3; pop %rcx; pop %rdx; pop %rax
    emit({0x0f, 0x30, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x59, 0x5a, 0x58});
    emit({0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf});
    code = entry;
    call_host(kSystemCallPort);
}

Supervisor::Frame& Supervisor::frame(u32 cpu) const {
    return *reinterpret_cast<Frame*>(arena_.host(state_.cpus[cpu]) + 2 * kPageSize - sizeof(Frame));
}

Supervisor::Supervisor(Arena& arena, PageTables& tables, bool hypercalls, const State& state)
    : arena_(arena), tables_(tables), hypercalls_(hypercalls) {
    cpus_.reserve(kMostCpus);
    state_.cpus.reserve(kMostCpus);
    restore(state);
}

void Supervisor::restore(const State& state) {
    state_.clock = state.clock;
    state_.cpus.assign(state.cpus.begin(), state.cpus.end());
    for (std::size_t cpu = state_.cpus.size(); cpu < cpus_.size(); ++cpu) map_cpu(cpu);
}

void Supervisor::map_cpu(std::size_t cpu) {
    const u64 at = kCpus + cpu * kCpuPages * kPageSize;
    auto gpa = arena_.allocate_table(kCpuPages * kPageSize);
    if (!gpa ||
        !tables_.map(at, *gpa, kCpuPages * kPageSize, kReadable | kWritable | kSupervisorOnly)) {
        throw ConfigError("memory", "a process needs more memory than that");
    }
    // Task state (SDM 3A, 8.7): RSP0 and IST1; the I/O map lies behind the limit.
    const u64 top = at + kCpuPages * kPageSize;
    const u16 io_map = kTaskBytes;
    std::memcpy(arena_.host(*gpa) + 4, &top, sizeof top);
    std::memcpy(arena_.host(*gpa) + 36, &top, sizeof top);
    std::memcpy(arena_.host(*gpa) + 102, &io_map, sizeof io_map);
    state_.cpus.push_back(*gpa);
}

CpuState Supervisor::add_cpu(u64 xcr0) {
    const u64 at = kCpus + cpus_.size() * kCpuPages * kPageSize;
    if (state_.cpus.size() == cpus_.size()) map_cpu(cpus_.size());
    cpus_.push_back({});
    constexpr u32 kNull = 1 << 16;
    CpuState state = reset_state(true);
    state.rip = 0;
    state.gpr = {};
    state.rflags = kFixedFlags;
    state.segments[kCs] = segment(kKernelCode, 0, true);
    state.segments[kSs] = segment(kKernelData, 0, false);
    for (unsigned n : {kDs, kEs, kFs, kGs}) state.segments[n] = {0, 0, kNull, 0};
    state.tr = {at, kTaskBytes - 1, 0x8b, kTask};
    state.ldtr = {0, 0, kNull, 0};
    state.gdtr = {kGdt, 6 * 8 - 1};
    state.idtr = {kIdt, kVectors * sizeof(Gate) - 1};
    state.cr0 = 0x8005'0033;  // PG, AM, WP, NE, ET, MP, PE
    state.cr3 = tables_.root();
    state.cr4 = 0x620;  // OSXMMEXCPT, OSFXSR, PAE
    if (xcr0 != 1) state.cr4 |= bit(18);
    state.xcr0 = xcr0;
    // As Linux hands it to a program: all exceptions of both units masked, all registers empty.
    constexpr u16 kControl = 0x37f;
    constexpr u32 kMxcsr = 0x1f80;
    state.fpu.legacy = {};
    std::memcpy(state.fpu.legacy.data(), &kControl, sizeof kControl);
    std::memcpy(state.fpu.legacy.data() + 24, &kMxcsr, sizeof kMxcsr);
    state.msr.efer = 0xd01;  // NXE, LMA, LME, SCE
    state.msr.star = u64{0x18} << 48 | u64{kKernelCode} << 32;
    state.msr.lstar = kEntry;
    state.msr.sfmask = 0x47700;
    return state;
}

void Supervisor::restart(u32 cpu, u64 fs, u64 gs) {
    cpus_[cpu] = {false, fs, gs};
}

Trap Supervisor::run(Vcpu& vcpu, GeneralRegisters& registers, bool flush) {
    Cpu& cpu = cpus_[vcpu.id()];
    const GeneralRegisters program = registers;
    if (cpu.in_program) {
        if (flush) vcpu.restore(vcpu.save());
        registers.rflags = (registers.rflags & kUserFlags) | kFixedFlags;
        vcpu.set_general(registers);
    } else {
        frame(vcpu.id()) = {0,
                            registers.rip,
                            kUserCode,
                            (registers.rflags & kUserFlags) | kFixedFlags,
                            registers.gpr[kRsp],
                            kUserData};
        GeneralRegisters entry = registers;
        entry.rip = flush ? kFlushReturn : kReturn;
        entry.rflags = 2;
        entry.gpr[kRsp] = kCpus + (vcpu.id() + 1) * kCpuPages * kPageSize - sizeof(Frame);
        if (cpu.changed != kSegmentCount) {
            auto& saved = *(reinterpret_cast<Saved*>(&frame(vcpu.id())) - 1);
            saved = {entry.gpr[kRcx], entry.gpr[kRdx], entry.gpr[kRax]};
            const u64 base = cpu.changed == kFs ? cpu.fs : cpu.gs;
            entry.gpr[kRcx] = cpu.changed == kFs ? kFsBase : kGsBase;
            entry.gpr[kRax] = static_cast<u32>(base);
            entry.gpr[kRdx] = base >> 32;
            entry.gpr[kRsp] -= sizeof(Saved);
            entry.rip = kBaseReturn;
            cpu.changed = kSegmentCount;
        }
        vcpu.set_general(entry);
    }
    while (true) {
        const Exit exit = vcpu.run();
        registers = vcpu.general();
        if (exit.reason != ExitReason::kInterrupted) {
            cpu.in_program = false;
            return leave(vcpu, exit, registers);
        }
        Trap trap;
        if (registers.rip < kBase || registers.rip >= kEntry + kPageSize) {
            cpu.in_program = true;
            return trap;
        }
        if (registers.rip >= kReturn && registers.rip < kGatesEnd) {  // it has not begun
            cpu.in_program = false;
            registers = program;
            return trap;
        }
        // In a gate: what it is about to tell comes first.
    }
}

void Supervisor::set_base(u32 cpu, SegmentIndex segment, u64 base) {
    (segment == kFs ? cpus_[cpu].fs : cpus_[cpu].gs) = base;
    cpus_[cpu].changed = segment;
}

u64 Supervisor::base(u32 cpu, SegmentIndex segment) const {
    return segment == kFs ? cpus_[cpu].fs : cpus_[cpu].gs;
}

// What the program did; `registers` become the program's.
Trap Supervisor::leave(Vcpu& vcpu, const Exit& exit, GeneralRegisters& registers) {
    Trap trap;
    u8 port = 0;
    if (!hypercalls_ && exit.reason == ExitReason::kIo && exit.write) {
        port = static_cast<u8>(exit.address);
    } else if (hypercalls_ && exit.reason == ExitReason::kHypercall) {
        if (registers.rip - kGates < kVectors * kGateBytes) {
            port = static_cast<u8>((registers.rip - kGates) / kGateBytes);
        } else if (registers.rip - kEntry < kPageSize) {
            port = kSystemCallPort;
        } else {  // the program's own
            constexpr u64 kLength = 3;
            cpus_[vcpu.id()].in_program = true;
            registers.rip -= kLength;
            trap.kind = Trap::Kind::kException;
            trap.vector = kInvalidOpcode;
            return trap;
        }
    } else {
        cpus_[vcpu.id()].in_program = registers.rip < kBase;
        trap.kind = Trap::Kind::kFailure;
        trap.text =
            exit.text.empty() ? std::string("an exit for ") + to_string(exit.reason) : exit.text;
        return trap;
    }
    if (port != kSystemCallPort) {
        // What the gate interrupted is on its stack, which nobody else writes to.
        const Frame left = frame(vcpu.id());
        registers.rip = left.rip;
        registers.rflags = left.rflags;
        registers.gpr[kRsp] = left.rsp;
        trap.vector = port;
        trap.error = static_cast<u32>(left.error);
        if (port == kPageFault) trap.address = vcpu.save().cr2;
        if (port != kGeneralProtection || left.rip != kEntry) {
            trap.kind = Trap::Kind::kException;
            return trap;
        }
    }
    registers.rip = registers.gpr[kRcx];  // where SYSCALL has put them
    registers.rflags = registers.gpr[11];
    trap.kind = Trap::Kind::kSystemCall;
    return trap;
}

}  // namespace polyvisor::process
