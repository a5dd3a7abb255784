// Interrupts, NMIs, shadows, single step, breakpoints, double and triple faults: when exactly each
// event arrives, seen in the RIP that it pushes.
#include "system_machine.hpp"

using namespace pvtest;

namespace {

#define BYTES(text) std::string_view(text, sizeof(text) - 1)

void report(const char* name, int before) {
    if (failures != before) std::fprintf(stderr, "  ... %s\n", name);
}

/// Runs to the first handler.
Outcome run_to_handler(Machine& m, std::string_view code, u64 budget = 10'000) {
    m.start(code);
    m.run(budget);
    return outcome_of(m, m.vcpu->save());
}

// An interrupt that is pending from the start arrives at the first boundary that allows it.
void interrupt_windows() {
    struct Case {
        const char* name;
        std::string_view code;
        u64 offset;  ///< of the interrupted instruction
    };
    const Case cases[] = {
        {"sti; nop; nop", BYTES("\xfb\x90\x90\xf4"), 2},
        {"sti; sti; nop", BYTES("\xfb\xfb\x90\xf4"), 2},
        {"sti; cli; nop; sti; nop", BYTES("\xfb\xfa\x90\xfb\x90\xf4"), 5},
        {"sti; hlt", BYTES("\xfb\xf4\xf4"), 2},
        {"nop; sti; mov ss; nop", BYTES("\x90\xfb\x8e\xd0\x90\xf4"), 5},
        {"push; popf with IF; nop", BYTES("\x68\x02\x02\x00\x00\x9d\x90\xf4"), 6},
        {"sti; nop; nop (loop)", BYTES("\x31\xc9\xff\xc1\xfb\x90\xeb\xfa"), 6},
    };
    for (const Case& c : cases) {
        for (Mode mode : {Mode::kLong, Mode::kProtected32, Mode::kCompat}) {
            Machine m(mode);
            int before = failures;
            m.apic.vectors = {0x55};
            m.state.gpr[kRax] = kDs32;
            Outcome o = run_to_handler(m, c.code);
            CHECK_EQ(o.vector, 0x55);
            CHECK_EQ(o.rip, kCode + c.offset);
            CHECK(o.rflags & bit(9));
            CHECK(m.apic.vectors.empty());
            report(c.name, before);
        }
    }
    // With IF clear it stays pending, and HLT reports so.
    Machine m(Mode::kLong);
    m.apic.vectors = {0x55};
    m.start(BYTES("\x90\xf4"));
    CHECK_EQ(m.run().reason, ExitReason::kHalt);
    CHECK_EQ(m.vcpu->save().rip, kCode + 2);
    CHECK_EQ(m.apic.vectors.size(), size_t{1});
    // A trap gate leaves IF set: the second interrupt nests in the first one's handler.
    Machine nested(Mode::kLong);
    nested.set_gate(0x55, gate(kCs64, static_cast<u32>(kHandlers + 0x550), 15));
    nested.apic.vectors = {0x55, 0x66};
    Outcome o = run_to_handler(nested, BYTES("\xfb\x90\x90\xf4"));
    CHECK_EQ(o.vector, 0x66);
    CHECK_EQ(o.rip, kHandlers + 0x550);
}

// NMIs are blocked from one's delivery to the next IRET.
PV_GUEST(nmi_handler, R"(
    incl 0x60000
    nop
    nop
    iretq
)")
PV_GUEST(count_to_three, R"(
1:  cmpl $3, 0x60000
    jne 1b
    hlt
)")

void nmi_blocking() {
    Machine m(Mode::kLong);
    m.load(0x7000, nmi_handler());
    m.set_gate(2, gate(kCs64, 0x7000, 14));
    m.start(count_to_three());
    m.vcpu->nmi();
    m.run(2);
    CHECK(m.vcpu->save().nmi_blocked);
    CHECK_EQ(m.get<u32>(kData), 1u);
    m.vcpu->nmi();  // arrives after the IRET
    m.run(1);
    CHECK(m.vcpu->save().nmi_pending);
    CHECK_EQ(m.get<u32>(kData), 1u);
    m.run(1);  // IRET
    m.run(1);
    CHECK_EQ(m.get<u32>(kData), 2u);
    m.run(3);
    CHECK(!m.vcpu->save().nmi_blocked);
    m.vcpu->nmi();
    CHECK_EQ(m.run().reason, ExitReason::kHalt);
    CHECK_EQ(m.get<u32>(kData), 3u);
    // An NMI ends HLT with interrupts off, and RIP is after it.
    Machine halted(Mode::kLong);
    halted.start(BYTES("\xf4\x90"));
    CHECK_EQ(halted.run().reason, ExitReason::kHalt);
    halted.vcpu->nmi();
    halted.run();
    Outcome o = outcome_of(halted, halted.vcpu->save());
    CHECK_EQ(o.vector, 2);
    CHECK_EQ(o.rip, kCode + 1);
    // MOV SS holds back NMIs too.
    Machine shadow(Mode::kLong);
    shadow.state.gpr[kRax] = kDs32;
    shadow.start(BYTES("\x8e\xd0\x90\x90\xf4"));
    shadow.run(1);
    shadow.vcpu->nmi();
    shadow.run();
    o = outcome_of(shadow, shadow.vcpu->save());
    CHECK_EQ(o.rip, kCode + 3);
}

// Single step: where #DB arrives after an instruction that runs with TF set.
void single_step() {
    struct Case {
        const char* name;
        std::string_view code;
        u64 offset;
        int vector = 1;
    };
    const Case cases[] = {
        {"nop", BYTES("\x90\x90\xf4"), 1},
        {"mov ss is not a boundary", BYTES("\x8e\xd0\x90\x90\xf4"), 3},
        {"pop ss is not a boundary (fs here)", BYTES("\x0f\xa1\x90\xf4"), 2},
        {"a jump", BYTES("\xeb\x02\x90\x90\x90\xf4"), 4},
        {"rep stops after each element", BYTES("\xf3\xaa\xf4"), 0},
        {"a fault comes first", BYTES("\x0f\x0b\xf4"), 0, 6},
        {"int n takes TF away", BYTES("\xcd\x80\x90\xf4"), 2, 0x80},
        {"int3 takes TF away", BYTES("\xcc\x90\xf4"), 1, 3},
        {"popf that clears TF still traps", BYTES("\x6a\x02\x9d\x90\xf4"), 2},
        {"hlt", BYTES("\xf4\x90"), 1},
    };
    for (const Case& c : cases) {
        Machine m(Mode::kLong);
        int before = failures;
        m.state.rflags |= bit(8);
        m.state.gpr[kRax] = kDs32;
        m.state.gpr[kRdi] = kData;
        m.state.gpr[kRcx] = 5;
        Outcome o = run_to_handler(m, c.code, 20);
        CHECK_EQ(o.vector, c.vector);
        CHECK_EQ(o.rip, kCode + c.offset);
        CHECK((o.rflags & bit(8)) || c.code[0] == '\x6a');
        if (c.vector == 1) CHECK_EQ(o.state.dr6 & 0xe00f, bit(14));
        report(c.name, before);
    }
    // POPF and IRET that set TF: the trap comes after the next instruction.
    Machine m(Mode::kLong);
    Outcome o = run_to_handler(m, BYTES("\x68\x02\x01\x00\x00\x9d\x90\x90\xf4"), 20);
    CHECK_EQ(o.vector, 1);
    CHECK_EQ(o.rip, kCode + 7);
    CHECK(!(o.state.rflags & bit(8)));
    // SYSCALL whose mask clears TF: no trap at the kernel's entry.
    Machine call(Mode::kLong, 3);
    call.state.rflags |= bit(8);
    call.state.msr.efer |= 1;
    call.state.msr.star = u64{kCs64} << 32;
    call.state.msr.lstar = kHandlers + 0x770;
    call.state.msr.sfmask = bit(8);
    o = run_to_handler(call, BYTES("\x0f\x05"), 20);
    CHECK_EQ(o.vector, 0x77);
    CHECK(o.state.gpr[11] & bit(8));
    CHECK_EQ(o.state.gpr[kRcx], kCode + 2);
}

void breakpoints() {
    struct Case {
        const char* name;
        std::string_view code;
        u64 address;
        u64 dr7;     ///< RW/LEN bits 16..19 and L0
        u64 offset;  ///< pushed RIP
        int vector;
    };
    const Case cases[] = {
        {"instruction", BYTES("\x90\x90\xf4"), kCode + 1, 1, 1, 1},
        {"instruction, global", BYTES("\x90\x90\xf4"), kCode + 1, 2, 1, 1},
        {"instruction, off", BYTES("\x90\x90\xcd\x80"), kCode + 1, 0, 4, 0x80},
        {"write of 4", BYTES("\x89\x07\x90\xf4"), kData, 0xd0001, 2, 1},
        {"read does not trip a write breakpoint", BYTES("\x8b\x07\xcd\x80"), kData, 0xd0001, 4,
         0x80},
        {"read trips a read/write breakpoint", BYTES("\x8b\x07\x90\xf4"), kData, 0xf0001, 2, 1},
        {"one byte inside", BYTES("\x88\x47\x03\x90\xf4"), kData, 0xd0001, 3, 1},
        {"one byte after", BYTES("\x88\x47\x04\xcd\x80"), kData, 0xd0001, 5, 0x80},
        {"8 bytes", BYTES("\x88\x47\x07\x90\xf4"), kData, 0x90001, 3, 1},
        {"stack", BYTES("\x50\x90\xf4"), kStack0 - 8, 0x90001, 1, 1},
    };
    for (const Case& c : cases) {
        Machine m(Mode::kLong);
        int before = failures;
        m.state.dr[0] = c.address;
        m.state.dr7 = 0x400 | c.dr7;
        m.state.gpr[kRdi] = kData;
        Outcome o = run_to_handler(m, c.code, 20);
        CHECK_EQ(o.vector, c.vector);
        CHECK_EQ(o.rip, kCode + c.offset);
        if (c.vector == 1) CHECK_EQ(o.state.dr6 & 0xe00f, u64{1});
        report(c.name, before);
    }
    // RF in the flags lets the instruction run once.
    Machine m(Mode::kLong);
    m.state.dr[0] = kCode;
    m.state.dr7 = 0x401;
    m.state.rflags |= bit(16);
    CHECK_EQ(run_to_handler(m, BYTES("\xff\xc0\xeb\xfc"), 20).state.gpr[kRax], u64{1});
    // An MMIO or RAM store by the guest trips it wherever the soft TLB had the page before.
    Machine warm(Mode::kLong);
    warm.state.gpr[kRdi] = kData;
    warm.state.gpr[kRax] = kData;
    warm.state.gpr[kRdx] = 0xd0401;
    // mov %eax,(%rdi); mov %rax,%db0; mov %rdx,%db7; mov %eax,(%rdi)
    Outcome o = run_to_handler(warm, BYTES("\x89\x07\x0f\x23\xc0\x0f\x23\xfa\x89\x07\x90\xf4"), 20);
    CHECK_EQ(o.vector, 1);
    CHECK_EQ(o.rip, kCode + 10);
    // I/O breakpoints need CR4.DE.
    for (bool de : {true, false}) {
        Machine io(Mode::kLong);
        io.state.dr[0] = 0x80;
        io.state.dr7 = 0x20401;
        if (de) io.state.cr4 |= bit(3);
        Outcome hit = run_to_handler(io, BYTES("\xe6\x80\x90\xcd\x80"), 20);
        CHECK_EQ(hit.vector, de ? 1 : 0x80);
        CHECK_EQ(hit.rip, kCode + (de ? 2 : 5));
    }
    // General detect goes off in the handler.
    Machine detect(Mode::kLong);
    detect.state.dr7 = 0x2400;
    o = step(detect, BYTES("\x0f\x21\xc0"));
    CHECK_EQ(o.vector, 1);
    CHECK_EQ(o.rip, kCode);
    CHECK_EQ(o.state.dr7, u64{0x400});
    CHECK_EQ(o.state.dr6 & 0xe00f, bit(13));
}

void double_and_triple_faults() {
    // #NP while delivering #GP: double fault, with error code 0, RIP at the instruction.
    Machine m(Mode::kLong);
    m.set_gate(13, gate(kCs64, 0, 14, 0, 0, false));
    m.state.gpr[kRax] = kBeyond;
    Outcome o = step(m, BYTES("\x8e\xd8"));
    CHECK_EQ(o.vector, 8);
    CHECK_EQ(o.error, u64{0});
    CHECK_EQ(o.rip, kCode);
    // #PF while delivering #PF: the pushes go to an absent page; #DF on its own stack.
    Machine pages(Mode::kLong, 3);
    pages.put<u64>(kTss + 4, kPages + 0x1000);
    pages.set_page(0, 0);
    pages.set_gate(8, gate(kCs64, static_cast<u32>(kHandlers + 0x80), 14, 0, 1));
    pages.state.gpr[kRax] = kPages;
    o = step(pages, BYTES("\x8b\x00"));
    CHECK_EQ(o.vector, 8);
    CHECK_EQ(o.state.cr2, kPages + 0x1000 - 48);
    CHECK_EQ(o.state.gpr[kRsp], kIst1 - 48);
    // #UD is benign: #NP on the way is delivered in its own right, error with the IDT and EXT bits.
    Machine serial(Mode::kLong);
    serial.set_gate(6, gate(kCs64, 0, 14, 0, 0, false));
    o = step(serial, BYTES("\x0f\x0b"));
    CHECK_EQ(o.vector, 11);
    CHECK_EQ(o.error, u64{6 * 8 + 3});
    // The same from an external interrupt.
    Machine external(Mode::kLong);
    external.set_gate(0x55, gate(kDs32, 0, 14));
    external.apic.vectors = {0x55};
    external.state.rflags |= bit(9);
    o = run_to_handler(external, BYTES("\x90\xf4"));
    CHECK_EQ(o.vector, 13);
    CHECK_EQ(o.error, u64{kDs32 | 1});
    // Triple fault: shutdown.
    for (Mode mode : {Mode::kLong, Mode::kProtected32, Mode::kReal}) {
        Machine dead(mode);
        dead.state.idtr.limit = 0;
        dead.start(BYTES("\x0f\x0b"));
        Exit exit = dead.run();
        CHECK_EQ(exit.reason, ExitReason::kShutdown);
        CHECK_EQ(dead.vcpu->save().activity, Activity::kShutdown);
        CHECK_EQ(dead.run().reason, ExitReason::kShutdown);
    }
}

// IST, stack alignment, and where RSP comes from.
void long_stacks() {
    Machine m(Mode::kLong);
    m.state.gpr[kRsp] = kStack0 - 5;
    Outcome o = step(m, BYTES("\xcd\x40"));
    CHECK_EQ(o.state.gpr[kRsp], align_down(kStack0 - 5, 16) - 40);
    CHECK_EQ(o.rsp, kStack0 - 5);
    CHECK_EQ(o.ss, u64{kDs32});
    Machine ist(Mode::kLong);
    ist.set_gate(0x40, gate(kCs64, static_cast<u32>(kHandlers + 0x400), 14, 0, 1));
    o = step(ist, BYTES("\xcd\x40"));
    CHECK_EQ(o.state.gpr[kRsp], kIst1 - 40);
    CHECK_EQ(o.state.segments[kSs].selector, kDs32);  // unchanged at the same level
    Machine user(Mode::kLong, 3);
    o = step(user, BYTES("\xcd\x80"));
    CHECK_EQ(o.state.gpr[kRsp], kStack0 - 40);
    CHECK_EQ(o.state.segments[kSs].selector, 0);
    CHECK_EQ(o.rsp, kStack3);
    CHECK_EQ(o.ss, u64{kDsUser});
    CHECK_EQ(o.state.segments[kCs].selector, kCs64);
    // A non-canonical stack pointer in the TSS: #SS(EXT clear) cannot be delivered there either.
    Machine wild(Mode::kLong, 3);
    wild.put<u64>(kTss + 4, bit(47) | 0x1000);
    wild.set_gate(12, gate(kCs64, static_cast<u32>(kHandlers + 0xc0), 14, 0, 1));
    o = step(wild, BYTES("\xcd\x80"));
    CHECK_EQ(o.vector, 12);
    CHECK_EQ(o.error, u64{0});
    // A TSS too short for RSP0: #TS with its selector.
    Machine small(Mode::kLong, 3);
    small.state.tr.limit = 10;
    small.start(BYTES("\xcd\x80"));
    CHECK_EQ(small.run().reason, ExitReason::kShutdown);  // no stack for the #TS handler either
}

}  // namespace

int main() {
    interrupt_windows();
    nmi_blocking();
    single_step();
    breakpoints();
    double_and_triple_faults();
    long_stacks();
    return finish("test_system_events");
}
