// Far transfers that succeed: gates between rings with their stacks and parameters, returns,
// hardware task switches, virtual-8086 mode in and out, mode changes, and the fast system calls.
#include "system_machine.hpp"

using namespace pvtest;

namespace {

#define BYTES(text) std::string_view(text, sizeof(text) - 1)

constexpr u64 kInner = 0x7000;  // where gates lead
constexpr u64 kInner2 = 0x7800;

// --- Call gates ----------------------------------------------------------------------------------

// Ring 3 calls ring 0 with two parameters, which are copied; RET 8 takes them off both stacks.
PV_GUEST(call_gate_caller, R"(
    .code32
    push $0x11111111
    push $0x22222222
    lcall $0x93, $0
    mov %esp, %ebx
    int $0x80
    .code64
)")
PV_GUEST(call_gate_target, R"(
    .code32
    mov 8(%esp), %eax
    mov 12(%esp), %ecx
    mov 16(%esp), %ebp
    mov %esp, %edx
    mov %cs, %esi
    mov %ss, %edi
    lret $8
    .code64
)")

void call_gate_with_parameters() {
    Machine m(Mode::kProtected32, 3);
    m.set_gdt(kGate, gate(kCs32, kInner, 12, 3, 2));
    m.load(kInner, call_gate_target());
    CpuState s = m.finish(call_gate_caller());
    CHECK_EQ(Machine::vector_of(s), 0x80);
    CHECK_EQ(s.gpr[kRax], u64{0x22222222});
    CHECK_EQ(s.gpr[kRcx], u64{0x11111111});
    CHECK_EQ(s.gpr[kRdx], kStack0 - 24);
    CHECK_EQ(s.gpr[kRsi], u64{kCs32});
    CHECK_EQ(s.gpr[kRdi], u64{kDs32});
    CHECK_EQ(s.gpr[kRbx], kStack3);
    CHECK_EQ(s.gpr[kRbp], kStack3 - 8);
}

// Through a gate in IA-32e mode: 64-bit code, no parameters, SS null.
void call_gate_long() {
    Machine m(Mode::kLong, 3);
    m.set_gdt(kGate, gate(kCs64, kInner, 12, 3));
    m.set_gdt(kGate + 8, 0);
    m.put<u32>(kData, 0);
    m.put<u16>(kData + 4, kGate | 3);
    m.put<u8>(kInner, 0xf4);
    m.state.gpr[kRax] = kData;
    CpuState s = m.finish(BYTES("\xff\x18"));
    CHECK_EQ(s.rip, kInner + 1);
    CHECK_EQ(s.segments[kCs].selector, kCs64);
    CHECK_EQ(s.segments[kSs].selector, 0);
    CHECK_EQ(s.gpr[kRsp], kStack0 - 32);
    CHECK_EQ(m.get<u64>(kStack0 - 8), u64{kDsUser});
    CHECK_EQ(m.get<u64>(kStack0 - 16), kStack3);
    CHECK_EQ(m.get<u64>(kStack0 - 24), u64{kCs64User});
    CHECK_EQ(m.get<u64>(kStack0 - 32), kCode + 2);
    // A 32-bit target is refused.
    Machine narrow(Mode::kLong, 3);
    narrow.set_gdt(kGate, gate(kCs32, kInner, 12, 3));
    narrow.set_gdt(kGate + 8, 0);
    narrow.put<u16>(kData + 4, kGate | 3);
    narrow.state.gpr[kRax] = kData;
    Outcome o = step(narrow, BYTES("\xff\x18"));
    CHECK_EQ(o.vector, 13);
    CHECK_EQ(o.error, u64{kCs32});
}

struct GateCase {
    const char* name;
    u64 gate;
    u16 selector;
    int vector;
    u64 error;
};

void gate_checks() {
    const GateCase cases[] = {
        {"RPL above DPL", gate(kCs32, kInner, 12, 2), kGate | 3, 13, kGate},
        {"absent", gate(kCs32, kInner, 12, 3, 0, false), kGate | 3, 11, kGate},
        {"null target", gate(0, kInner, 12, 3), kGate | 3, 13, 0},
        {"data target", gate(kDs32, kInner, 12, 3), kGate | 3, 13, kDs32},
        {"absent target", gate(kAbsentCode, kInner, 12, 3), kGate | 3, 11, kAbsentCode},
        {"interrupt gate", gate(kCs32, kInner, 14, 3), kGate | 3, 13, kGate},
    };
    for (const GateCase& c : cases) {
        Machine m(Mode::kProtected32, 3);
        int before = failures;
        m.set_gdt(kGate, c.gate);
        std::string code("\x9a\0\0\0\0\0\0", 7);
        code[5] = static_cast<char>(c.selector);
        Outcome o = step(m, code);
        CHECK_EQ(o.vector, c.vector);
        CHECK_EQ(o.error, c.error);
        CHECK_EQ(o.rip, kCode);
        if (failures != before) std::fprintf(stderr, "  ... %s\n", c.name);
    }
    // Stacks out of the TSS: each defect is #TS, absence #SS, with the stack's selector.
    struct Stack {
        u16 ss;
        int vector;
    };
    for (Stack c : {Stack{kDsUser, 10}, Stack{kReadOnly, 10}, Stack{kCs32, 10},
                    Stack{kAbsentStack, 12}, Stack{kBeyond, 10}, Stack{0, 10}}) {
        Machine m(Mode::kProtected32, 3);
        m.set_gdt(kGate, gate(kCs32, kInner, 12, 3));
        m.put<u16>(kTss + 8, c.ss);
        // The handler must not need that stack: a task gate takes it to a task of its own.
        for (u8 vector : {u8{10}, u8{12}}) m.set_gate(vector, gate(kTr2, 0, 5));
        m.put<u32>(kTss2 + 0x20, static_cast<u32>(kHandlers + 16 * 0xee));
        m.put<u32>(kTss2 + 0x24, 2);
        m.put<u32>(kTss2 + 0x38, kIst1);
        m.put<u32>(kTss2 + 0x1c, kPd32);
        m.put<u16>(kTss2 + 0x4c, kCs32);
        for (u32 at : {0x48, 0x50, 0x54}) m.put<u16>(kTss2 + at, kDs32);
        CpuState s = m.finish(BYTES("\x9a\0\0\0\0\x93\0"));
        CHECK_EQ(Machine::vector_of(s), 0xee);
        CHECK_EQ(s.gpr[kRsp], kIst1 - 4);
        CHECK_EQ(m.get<u32>(kIst1 - 4), u32{c.ss} & 0xfffcu);
        CHECK_EQ(m.get<u16>(kTss2), kTr);
        CHECK_EQ(m.get<u32>(kTss + 0x20), static_cast<u32>(kCode));  // EIP of the faulting call
    }
}

// --- Returns -------------------------------------------------------------------------------------

// LRET to ring 3: data segments that ring 3 may not see become null.
PV_GUEST(far_return_outward, R"(
    .code32
    mov $0x2b, %eax
    mov %eax, %es
    push $0x2b
    push $0x40000
    push $0x23
    call 1f
1:  addl $(2f - 1b), (%esp)
    lret
2:  mov %ds, %eax
    mov %es, %ebx
    mov %fs, %ecx
    mov %esp, %edx
    int $0x80
    .code64
)")

void far_returns() {
    Machine m(Mode::kProtected32, 0);
    CpuState s = m.finish(far_return_outward());
    CHECK_EQ(Machine::vector_of(s), 0x80);
    CHECK_EQ(s.gpr[kRax], u64{0});
    CHECK_EQ(s.gpr[kRbx], u64{kDsUser});
    CHECK_EQ(s.gpr[kRcx], u64{0});
    CHECK_EQ(s.gpr[kRdx], kStack3);
    // Returning inward is refused.
    Machine inward(Mode::kProtected32, 3);
    inward.put<u32>(kStack3 - 8, kInner);
    inward.put<u32>(kStack3 - 4, kCs32);
    inward.state.gpr[kRsp] = kStack3 - 8;
    Outcome o = step(inward, BYTES("\xcb"));
    CHECK_EQ(o.vector, 13);
    CHECK_EQ(o.error, u64{kCs32});
    CHECK_EQ(o.rsp, kStack3 - 8);
}

struct IretCase {
    const char* name;
    u64 rip, cs, rflags, rsp, ss;
    int vector;
    u64 error;
};

void iret_long() {
    const IretCase cases[] = {
        {"to ring 3", kInner, kCs64User, 0x3202, kStack3, kDsUser, -1, 0},
        {"to compatibility mode", kInner, kCs32User, 0x202, kStack3, kDsUser, -1, 0},
        {"to the same ring, SS null", kInner, kCs64, 0x2, kStack1, 0, -1, 0},
        {"null CS", kInner, 0, 2, kStack3, kDsUser, 13, 0},
        {"CS beyond the GDT", kInner, kBeyond, 2, kStack3, kDsUser, 13, kBeyond},
        {"CS is data", kInner, kDs32, 2, kStack3, kDsUser, 13, kDs32},
        {"CS absent", kInner, kAbsentCode, 2, kStack3, kDs32, 11, kAbsentCode},
        {"non-canonical RIP", bit(47), kCs64User, 2, kStack3, kDsUser, 13, 0},
        {"RIP beyond the limit", bit(33), kCs32User, 2, kStack3, kDsUser, 13, 0},
        {"SS of another ring", kInner, kCs64User, 2, kStack3, kDs32, 13, kDs32},
        {"null SS in ring 3", kInner, kCs64User, 2, kStack3, 3, 13, 0},
        {"absent SS", kInner, kCs64, 2, kStack3, kAbsentStack, 12, kAbsentStack},
    };
    for (const IretCase& c : cases) {
        Machine m(Mode::kLong);
        int before = failures;
        u64 at = kStack0 - 40;
        for (u64 word : {c.rip, c.cs, c.rflags, c.rsp, c.ss}) m.put<u64>(at, word), at += 8;
        m.state.gpr[kRsp] = kStack0 - 40;
        m.put<u16>(kInner, 0x80cd);
        m.start(BYTES("\x48\xcf"));
        m.run(1);
        CpuState s = m.vcpu->save();
        Outcome o = outcome_of(m, s);
        CHECK_EQ(o.vector, c.vector);
        if (c.vector >= 0) {
            CHECK_EQ(o.error, c.error);
            CHECK_EQ(o.rip, kCode);
            CHECK_EQ(o.rsp, kStack0 - 40);
        } else {
            CHECK_EQ(s.rip, c.rip);
            CHECK_EQ(s.segments[kCs].selector, static_cast<u16>(c.cs));
            CHECK_EQ(s.segments[kSs].selector, static_cast<u16>(c.ss));
            CHECK_EQ(s.gpr[kRsp], c.rsp);
            CHECK_EQ(s.rflags, c.rflags);
            m.run(2);  // INT 0x80 at the target comes back by the same frame
            o = outcome_of(m, m.vcpu->save());
            CHECK_EQ(o.vector, 0x80);
            CHECK_EQ(o.cs, c.cs);
            CHECK_EQ(o.rsp, c.rsp);
        }
        if (failures != before) std::fprintf(stderr, "  ... %s\n", c.name);
    }
    // What IRET at CPL 3 may change of RFLAGS: not IF nor IOPL.
    Machine user(Mode::kLong, 3);
    u64 at = kStack3 - 40;
    for (u64 word : {kInner, u64{kCs64User}, u64{0x247ed7}, kStack3, u64{kDsUser}}) {
        user.put<u64>(at, word), at += 8;
    }
    user.state.gpr[kRsp] = kStack3 - 40;
    user.start(BYTES("\x48\xcf"));
    user.run(1);
    CHECK_EQ(user.vcpu->save().rflags, u64{0x244cd7 | 2});
}

// --- Tasks ---------------------------------------------------------------------------------------

void build_task(Machine& m, u32 eip, u32 eflags = 2) {
    m.put<u32>(kTss2 + 0x20, eip);
    m.put<u32>(kTss2 + 0x24, eflags);
    m.put<u32>(kTss2 + 0x28, 0xaaaa);  // EAX
    m.put<u32>(kTss2 + 0x38, kIst1);
    m.put<u32>(kTss2 + 0x1c, kPd32);
    m.put<u16>(kTss2 + 0x4c, kCs32);
    for (u32 at : {0x48, 0x50, 0x54, 0x58, 0x5c}) m.put<u16>(kTss2 + at, kDs32);
}

u8 access_byte(const Machine& m, u16 selector) {
    return static_cast<u8>(m.gdt(selector) >> 40);
}

void task_switches() {
    // JMP: the old task is no longer busy, the new one is.
    Machine jump(Mode::kProtected32);
    build_task(jump, kInner);
    jump.put<u8>(kInner, 0xf4);
    jump.state.gpr[kRbx] = 0x1234;
    CpuState s = jump.finish(BYTES("\xea\0\0\0\0\xa8\0"));
    CHECK_EQ(s.rip, kInner + 1);
    CHECK_EQ(s.gpr[kRax], u64{0xaaaa});
    CHECK_EQ(s.gpr[kRsp], kIst1);
    CHECK_EQ(s.tr.selector, kTr2);
    CHECK_EQ(access_byte(jump, kTr), 0x89);
    CHECK_EQ(access_byte(jump, kTr2), 0x8b);
    CHECK_EQ(jump.get<u32>(kTss + 0x20), static_cast<u32>(kCode + 7));
    CHECK_EQ(jump.get<u32>(kTss + 0x34), 0x1234u);
    CHECK_EQ(jump.get<u16>(kTss + 0x4c), kCs32);
    CHECK(s.cr0 & 8);
    CHECK(!(s.rflags & bit(14)));

    // CALL through a task gate from ring 3, IRET back: the caller goes on after the call.
    Machine call(Mode::kProtected32, 3);
    build_task(call, kInner);
    call.load(kInner, BYTES("\x90\xcf"));
    call.state.gpr[kRcx] = 7;
    s = call.finish(BYTES("\x9a\0\0\0\0\xa3\0\xcd\x80"));
    CHECK_EQ(Machine::vector_of(s), 0x80);
    CHECK_EQ(s.gpr[kRcx], u64{7});
    CHECK_EQ(s.tr.selector, kTr);
    CHECK_EQ(access_byte(call, kTr), 0x8b);
    CHECK_EQ(access_byte(call, kTr2), 0x89);
    CHECK_EQ(call.get<u16>(kTss2), kTr);
    CHECK_EQ(call.get<u32>(kTss2 + 0x20), static_cast<u32>(kInner + 2));
    CHECK(!(call.get<u32>(kTss2 + 0x24) & bit(14)));  // saved with NT clear by IRET

    // An exception through a task gate: error code on the new stack, NT set, back link.
    Machine fault(Mode::kProtected32, 3);
    build_task(fault, kInner);
    fault.put<u8>(kInner, 0xf4);
    fault.set_gate(13, gate(kTr2, 0, 5));
    s = fault.finish(BYTES("\xfa"));
    CHECK_EQ(s.rip, kInner + 1);
    CHECK_EQ(s.gpr[kRsp], kIst1 - 4);
    CHECK_EQ(fault.get<u32>(kIst1 - 4), 0u);
    CHECK(s.rflags & bit(14));
    CHECK_EQ(fault.get<u32>(kTss + 0x20), static_cast<u32>(kCode));
    CHECK(fault.get<u32>(kTss + 0x24) & bit(16));  // RF in the image of a fault

    // A bad segment in the new TSS faults in the new task's context: the pushed EIP is its own.
    for (auto [at, selector, vector] :
         {std::tuple{0x4c, kDs32, 10}, std::tuple{0x50, kReadOnly, 10},
          std::tuple{0x54, kAbsentData, 11}, std::tuple{0x60, kDs32, 10}}) {
        Machine bad(Mode::kProtected32);
        build_task(bad, kInner);
        bad.put<u16>(kTss2 + at, selector);
        bad.set_gdt(kTr3, descriptor(0x26000, 0x67, 0x89));
        for (u8 v : {u8{10}, u8{11}}) bad.set_gate(v, gate(kTr3, 0, 5));
        bad.put<u32>(0x26020, static_cast<u32>(kHandlers + 16 * vector));
        bad.put<u32>(0x26024, 2);
        bad.put<u32>(0x26038, kStack1);
        bad.put<u32>(0x2601c, kPd32);
        bad.put<u16>(0x2604c, kCs32);
        for (u32 seg : {0x48, 0x50, 0x54, 0x58, 0x5c}) bad.put<u16>(0x26000 + seg, kDs32);
        s = bad.finish(BYTES("\xea\0\0\0\0\xa8\0"));
        CHECK_EQ(Machine::vector_of(s), vector);
        CHECK_EQ(bad.get<u32>(kStack1 - 4), u32{selector});
        CHECK_EQ(bad.get<u16>(0x26000), kTr2);
        CHECK_EQ(bad.get<u32>(kTss2 + 0x20), static_cast<u32>(kInner));
    }

    // Refusals leave the old task as it was.
    struct Refusal {
        u64 tss;
        int vector;
        u64 error;
    };
    for (Refusal c : {Refusal{descriptor(kTss2, 0x66, 0x89), 10, kTr2},
                      Refusal{descriptor(kTss2, 0x67, 0x8b), 13, kTr2},
                      Refusal{descriptor(kTss2, 0x67, 0x09), 11, kTr2}}) {
        Machine m(Mode::kProtected32);
        build_task(m, kInner);
        m.set_gdt(kTr2, c.tss);
        Outcome o = step(m, BYTES("\xea\0\0\0\0\xa8\0"));
        CHECK_EQ(o.vector, c.vector);
        CHECK_EQ(o.error, c.error);
        CHECK_EQ(o.rip, kCode);
        CHECK_EQ(o.state.tr.selector, kTr);
        CHECK_EQ(access_byte(m, kTr), 0x8b);
    }

    // A 16-bit TSS, and the debug trap of a 32-bit one.
    Machine narrow(Mode::kProtected32);
    narrow.set_gdt(kTr2, descriptor(kTss2, 0x2b, 0x81));
    narrow.put<u16>(kTss2 + 0xe, kInner);
    narrow.put<u16>(kTss2 + 0x10, 2);
    narrow.put<u16>(kTss2 + 0x12, 0x5678);
    narrow.put<u16>(kTss2 + 0x24, kCs16);
    for (u32 at : {0x22, 0x26, 0x28}) narrow.put<u16>(kTss2 + at, kDs16);
    narrow.put<u8>(kInner, 0xf4);
    s = narrow.finish(BYTES("\xea\0\0\0\0\xa8\0"));
    CHECK_EQ(s.rip, kInner + 1);
    CHECK_EQ(s.gpr[kRax] & 0xffff, u64{0x5678});
    CHECK_EQ(s.segments[kFs].unusable(), true);
    Machine trap(Mode::kProtected32);
    build_task(trap, kInner);
    trap.put<u16>(kTss2 + 0x64, 1);
    Outcome o = step(trap, BYTES("\xea\0\0\0\0\xa8\0"));
    CHECK_EQ(o.vector, 1);
    CHECK_EQ(o.rip, kInner);
    CHECK_EQ(o.state.dr6 & 0xe00f, bit(15));
}

// --- Virtual-8086 mode ---------------------------------------------------------------------------

// Ring 0 enters an 8086 program by IRET; it runs, and leaves by INT 0x80.
PV_GUEST(enter_vm86, R"(
    .code32
    push $0x1111
    push $0x2222
    push $0x6000
    push $0x3333
    push $0xa00
    push $0x7f0
    push $0x23002
    push $0x700
    push $0
    iretl
    .code64
)")
PV_GUEST(vm86_program, R"(
    .code16
    mov %ds, %ax
    movw $0x55aa, 0x10
    mov %sp, %bx
    push %cs
    pop %cx
    int $0x80
    .code64
)")

void vm86() {
    Machine m(Mode::kProtected32);
    m.load(kInner, vm86_program());
    CpuState s = m.finish(enter_vm86());
    CHECK_EQ(Machine::vector_of(s), 0x80);
    CHECK_EQ(s.gpr[kRax] & 0xffff, u64{0x6000});
    CHECK_EQ(s.gpr[kRbx] & 0xffff, u64{0x7f0});
    CHECK_EQ(s.gpr[kRcx] & 0xffff, u64{0x700});
    CHECK_EQ(m.get<u16>(0x60010), 0x55aa);
    // Pushed: EIP CS EFLAGS ESP SS ES DS FS GS; the data segments are null now.
    u64 sp = s.gpr[kRsp];
    CHECK_EQ(sp, kStack0 - 36);
    CHECK_EQ(m.get<u32>(sp), static_cast<u32>(vm86_program().size()));
    CHECK_EQ(m.get<u32>(sp + 4), 0x700u);
    CHECK_EQ(m.get<u32>(sp + 8), 0x23002u);
    const u32 want[] = {0x7f0, 0xa00, 0x3333, 0x6000, 0x2222, 0x1111};
    for (u32 n = 0; n < 6; ++n) CHECK_EQ(m.get<u32>(sp + 12 + n * 4), want[n]);
    for (u8 seg : {kEs, kDs, kFs, kGs}) CHECK(s.segments[seg].unusable());
    CHECK(!(s.rflags & bit(17)));

    // VME: INT n goes to the program's own vector, with VIF in IF's place and IOPL shown as 3.
    Machine vme(Mode::kVm86);
    vme.state.cr4 |= 1;
    vme.state.rflags |= bit(19);
    vme.put<u32>(0x21 * 4, 0x07000010);
    vme.put<u8>(kTss + 0x88 + 4, 0);
    vme.start(BYTES("\xcd\x21"));
    vme.run(1);
    s = vme.vcpu->save();
    CHECK_EQ(s.rip, u64{0x10});
    CHECK_EQ(s.segments[kCs].selector, 0x700);
    CHECK(s.rflags & bit(17));
    CHECK(!(s.rflags & bit(19)));
    u64 stack = s.segments[kSs].base + s.gpr[kRsp];
    CHECK_EQ(vme.get<u16>(stack), u16{2});
    CHECK_EQ(vme.get<u16>(stack + 4), u16{0x3202});
}

// --- Modes ---------------------------------------------------------------------------------------

// Protected mode to long mode: PAE, CR3, EFER.LME, CR0.PG, far jump.
PV_GUEST(to_long_mode, R"(
    .code32
    mov %cr0, %eax
    and $0x7fffffff, %eax
    mov %eax, %cr0
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0x10000, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    ljmp $0x18, $0x7000
    .code64
)")
PV_GUEST(in_long_mode, R"(
    movabs $0x123456789abcdef0, %rbx
    mov $0xc0000080, %ecx
    rdmsr
    hlt
)")

void mode_changes() {
    Machine m(Mode::kProtected32);
    m.state.cr4 &= ~bit(5);
    m.load(kInner, in_long_mode());
    CpuState s = m.finish(to_long_mode());
    CHECK_EQ(s.gpr[kRbx], u64{0x123456789abcdef0});
    CHECK_EQ(s.msr.efer, u64{0x500});
    CHECK_EQ(s.segments[kCs].selector, kCs64);

    // LME without PAE, and leaving paging in 64-bit code, are refused: see the exceptions' test.
    // Real to protected mode: CS keeps its base until the far jump.
    Machine real(Mode::kReal);
    real.state.gdtr = {kGdt, 0x3ff};
    // mov %cr0,%eax; or $1,%al; mov %eax,%cr0; data32 ljmp $8,$0x7000
    real.put<u8>(kInner, 0xf4);
    s = real.finish(BYTES("\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\x66\xea\x00\x70\x00\x00\x08\x00"));
    CHECK_EQ(s.rip, kInner + 1);
    CHECK_EQ(s.segments[kCs].selector, kCs32);
    CHECK(s.segments[kCs].db());

    // Unreal mode: a 4 GB limit loaded in protected mode survives in real mode.
    Machine unreal(Mode::kReal);
    unreal.state.gdtr = {kGdt, 0x3ff};
    unreal.state.gpr[kRbx] = kDs32;
    unreal.state.gpr[kRsi] = 0x500000;
    unreal.put<u32>(0x500000, 0xfeedbeef);
    // cr0.PE=1; mov %bx,%ds; cr0.PE=0; mov (%esi),%ecx (a32 o32); hlt
    s =
        unreal.finish(BYTES("\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\x8e\xdb\x24\xfe\x0f\x22\xc0"
                            "\x67\x66\x8b\x0e\xf4"));
    CHECK_EQ(s.gpr[kRcx], u64{0xfeedbeef});

    // PAE paging: the PDPTEs are loaded with CR3, not read at each walk.
    Machine pae(Mode::kProtected32);
    pae.state.cr4 |= bit(5);
    pae.state.cr3 = 0x17000;
    pae.put<u64>(0x17000, kPd64 | 1);
    pae.put<u64>(0x17008, 0);
    pae.start(
        BYTES("\xc7\x05\x00\x70\x01\x00\x00\x00\x00\x00\xa1\x00\x00\x20\x00\x0f\x22\xd9\xf4"));
    // movl $0, 0x17000; mov 0x200000, %eax; mov %ecx, %cr3 (with RCX at bad PDPTEs); hlt
    pae.put<u64>(0x18000, 3);
    CpuState with = pae.vcpu->save();
    with.gpr[kRcx] = 0x18000;
    pae.vcpu->restore(with);
    pae.run();
    Outcome o = outcome_of(pae, pae.vcpu->save());
    CHECK_EQ(o.vector, 13);
    CHECK_EQ(o.rip, kCode + 15);
}

// --- Fast system calls ---------------------------------------------------------------------------

void fast_calls() {
    Machine m(Mode::kLong, 3);
    m.state.msr.efer |= 1;
    m.state.msr.star = u64{0x20} << 48 | u64{kCs64} << 32;
    m.state.msr.lstar = kInner;
    m.state.msr.sfmask = 0x200;
    m.state.rflags |= 0x200;
    m.load(kInner, BYTES("\x48\x0f\x07"));  // sysretq
    m.start(BYTES("\x0f\x05\x90"));
    m.run(1);
    CpuState s = m.vcpu->save();
    CHECK_EQ(s.rip, kInner);
    CHECK_EQ(s.gpr[kRcx], kCode + 2);
    CHECK_EQ(s.gpr[11], u64{0x202});
    CHECK_EQ(s.rflags, u64{2});
    CHECK_EQ(s.segments[kCs].selector, kCs64);
    CHECK_EQ(s.segments[kSs].selector, kCs64 + 8);
    CHECK_EQ(s.gpr[kRsp], kStack3);
    m.run(1);
    s = m.vcpu->save();
    CHECK_EQ(s.rip, kCode + 2);
    CHECK_EQ(s.rflags, u64{0x202});
    CHECK_EQ(s.segments[kCs].selector, 0x33);
    CHECK_EQ(s.segments[kSs].selector, 0x2b);
    CHECK_EQ(s.segments[kCs].dpl(), 3);
    // SYSENTER and SYSEXIT in 32-bit protected mode.
    Machine fast(Mode::kProtected32, 3);
    fast.state.msr.sysenter_cs = kCs32;
    fast.state.msr.sysenter_esp = kStack0;
    fast.state.msr.sysenter_eip = kInner;
    fast.state.rflags |= 0x200;
    fast.state.gpr[kRdx] = kCode + 2;
    fast.state.gpr[kRcx] = kStack3;
    fast.load(kInner, BYTES("\x0f\x35"));
    fast.start(BYTES("\x0f\x34\x90"));
    fast.run(1);
    s = fast.vcpu->save();
    CHECK_EQ(s.rip, kInner);
    CHECK_EQ(s.gpr[kRsp], kStack0);
    CHECK_EQ(s.segments[kCs].selector, kCs32);
    CHECK_EQ(s.segments[kSs].selector, kCs32 + 8);
    CHECK_EQ(s.rflags & 0x200, u64{0});
    fast.run(1);
    s = fast.vcpu->save();
    CHECK_EQ(s.rip, kCode + 2);
    CHECK_EQ(s.segments[kCs].selector, (kCs32 + 16) | 3);
    CHECK_EQ(s.gpr[kRsp], kStack3);
}

}  // namespace

int main() {
    call_gate_with_parameters();
    call_gate_long();
    gate_checks();
    far_returns();
    iret_long();
    task_switches();
    vm86();
    mode_changes();
    fast_calls();
    return finish("test_system_transfers");
}
