// Frames of signals: what is pushed comes back, a frame that the host's kernel made is understood,
// and what a program may have made of one never becomes a state that no CPU can be in.
#include "process/signal_frame.hpp"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.hpp"
#include "process/supervisor.hpp"
#include "random.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

namespace {

constexpr u64 kRestorer = SignalAction::kRestorer;
constexpr u64 kStackSize = 16 * kPageSize, kOtherSize = 4 * kPageSize;

struct Space {
    Space() : arena(memory, 20 << 20, 4 << 20), tables(arena), space(arena, tables, 16 << 20) {
        AddressSpace::Request request;
        request.rights = kReadable | kWritable;
        request.size = kStackSize;
        stack = static_cast<u64>(space.map(request));
        request.size = kOtherSize;
        request.address = 0x10'0000;
        other = static_cast<u64>(space.map(request));
    }
    GuestMemory memory;
    Arena arena;
    PageTables tables;
    AddressSpace space;
    u64 stack, other;
};

// A state that a program can have.
SignalContext random_context(pvtest::Random& random, u64 xcr0, u64 rsp) {
    SignalContext context;
    for (u64& value : context.registers.gpr) value = random.next();
    context.registers.gpr[kRsp] = rsp;
    context.registers.rip = random.next() >> 17;
    context.registers.rflags = 0x202 | (random.next() & 0x40dd5);
    context.fpu = initial_fpu();
    auto* legacy = context.fpu.legacy.data();
    auto fill = [&](std::size_t from, std::size_t to) {
        for (; from < to; ++from) legacy[from] = static_cast<u8>(random.next());
    };
    fill(0, 5);
    fill(6, 26);
    for (std::size_t n = 0; n < 8; ++n) fill(32 + 16 * n, 42 + 16 * n);
    fill(160, 416);
    if ((xcr0 & 4) && !random.one_in(4)) {
        for (auto& high : context.fpu.ymm_high) high.fill(static_cast<u8>(random.next()));
    }
    context.mask = random.next();
    context.fault = {14, 6, random.next()};
    return context;
}

void what_is_pushed_comes_back() {
    pvtest::Random random(1);
    Space s;
    for (int n = 0; n < 2000; ++n) {
        const u64 xcr0 = random.pick({u64{1}, u64{3}, u64{7}});
        const u64 rsp = s.stack + kStackSize - random.below(4096);
        SignalContext context = random_context(random, xcr0, rsp);
        const bool other = random.one_in(2);
        context.stack = {s.other, random.one_in(3) ? SignalStack::kAutodisarm : 0, 0, kOtherSize};
        const SignalAction action{random.next() >> 17,
                                  kRestorer | SA_SIGINFO | (other ? u64{SA_ONSTACK} : 0),
                                  random.next(), random.next()};
        siginfo_t info{};
        info.si_signo = 1 + static_cast<int>(random.below(64));
        info.si_addr = reinterpret_cast<void*>(random.next());
        GeneralRegisters handler;
        CHECK(push_signal_frame(s.space, xcr0, action, info, context, handler));
        CHECK_EQ(handler.rip, action.handler);
        CHECK_EQ(handler.rflags & 0x10500, u64{0});
        CHECK_EQ(handler.gpr[kRdi], u64(info.si_signo));
        const u64 at = handler.gpr[kRsp];
        CHECK_EQ(at % 16, u64{8});
        if (other) {
            CHECK(at >= s.other && at + 440 <= s.other + kOtherSize);
        } else {
            CHECK(at + 440 <= rsp - 128 && rsp - at <= signal_frame_size(xcr0));
        }
        u64 restorer;
        siginfo_t seen;
        ucontext_t user;
        CHECK(s.space.load(at, restorer) && s.space.load(handler.gpr[kRsi], seen));
        // (The C library's ucontext_t is longer than the kernel's at its end.)
        CHECK(s.space.copy_in(handler.gpr[kRdx], {reinterpret_cast<u8*>(&user), 304}));
        CHECK_EQ(restorer, action.restorer);
        CHECK(memcmp(&seen, &info, sizeof info) == 0);
        CHECK_EQ(static_cast<u64>(user.uc_mcontext.gregs[REG_RIP]), context.registers.rip);
        CHECK_EQ(static_cast<u64>(user.uc_mcontext.gregs[REG_R9]), context.registers.gpr[9]);
        CHECK_EQ(static_cast<u64>(user.uc_mcontext.gregs[REG_RSP]), rsp);
        CHECK_EQ(static_cast<u64>(user.uc_mcontext.gregs[REG_CR2]), context.fault.address);
        CHECK_EQ(reinterpret_cast<u64>(user.uc_mcontext.fpregs) % 64, u64{0});

        handler.gpr[kRsp] += 8;  // its RET
        SignalContext back;
        CHECK(pop_signal_frame(s.space, xcr0, handler, back));
        CHECK(back.registers == context.registers);
        CHECK(back.fpu == context.fpu);
        CHECK(back.stack == context.stack);
        CHECK_EQ(back.mask, context.mask);
    }
}

void stacks_that_cannot_take_a_frame() {
    Space s;
    const SignalAction action{0x1000, kRestorer, 0x2000, 0};
    GeneralRegisters handler;
    auto push = [&](u64 rsp, const SignalAction& wanted, SignalStack other = {}) {
        SignalContext context;
        context.registers.gpr[kRsp] = rsp;
        context.stack = other;
        return push_signal_frame(s.space, 7, wanted, {}, context, handler);
    };
    CHECK(push(s.stack + kStackSize, action));
    for (u64 rsp : {u64{0}, u64{1}, u64{200}, s.stack, s.stack + 1000, bit(47), ~u64{0}, bit(63)}) {
        CHECK(!push(rsp, action));
    }
    CHECK(!push(s.stack + kStackSize, {0x1000, 0, 0x2000, 0}));           // no restorer
    CHECK(!push(s.stack + kStackSize, {bit(47), kRestorer, 0x2000, 0}));  // no such address
    const SignalAction on_other{0x1000, kRestorer | SA_ONSTACK, 0x2000, 0};
    const SignalStack small{s.other + kPageSize, 0, 0, 1200};
    CHECK(!push(s.stack + kStackSize, on_other, small));
    CHECK(push(s.stack + kStackSize, action, small));
    CHECK(!push(s.stack + kStackSize, on_other, {~u64{0} - 100, 0, 0, 4096}));
    // Nested: it goes on where the alternate stack is, until that is full.
    const SignalStack full{s.other, 0, 0, kOtherSize};
    CHECK(push(s.other + 3000, on_other, full));
    CHECK(handler.gpr[kRsp] < s.other + 3000);
    CHECK(!push(s.other + 1000, on_other, full));
    CHECK(push(s.other + 1000, on_other, {s.other, SignalStack::kAutodisarm, 0, kOtherSize}));
    CHECK(handler.gpr[kRsp] > s.other + 3000);
}

// Whatever a frame says: it is refused, or its registers are such as a CPU can have.
void hostile_frames() {
    pvtest::Random random(2);
    Space s;
    const SignalAction action{0x1000, kRestorer, 0x2000, 0};
    CpuState cpu = reset_state(true);
    int taken = 0;
    for (int n = 0; n < 20000; ++n) {
        const u64 xcr0 = random.pick({u64{1}, u64{3}, u64{7}});
        SignalContext context = random_context(random, xcr0, s.stack + kStackSize);
        GeneralRegisters handler;
        CHECK(push_signal_frame(s.space, xcr0, action, {}, context, handler));
        const u64 at = handler.gpr[kRsp];
        for (u32 changes = 1 + random.below(4); changes != 0; --changes) {
            const u64 where = at + random.below(static_cast<u32>(s.stack + kStackSize - at - 8));
            const u64 interesting = random.pick(
                {u64{0}, ~u64{0}, u64{1}, bit(47), bit(63), u64{0x46505853}, random.next()});
            random.one_in(2) ? s.space.store(where, interesting)
                             : s.space.store(where, static_cast<u8>(interesting));
        }
        handler.gpr[kRsp] += 8;
        SignalContext back;
        if (!pop_signal_frame(s.space, xcr0, handler, back)) continue;
        ++taken;
        CHECK(back.registers.rip < bit(47));
        CHECK_EQ(back.registers.rflags & ~u64{0x40dd5}, handler.rflags & ~u64{0x40dd5});
        cpu.fpu = back.fpu;
        try {
            validate(cpu);
        } catch (const std::exception& error) {
            pvtest::fail(__FILE__, __LINE__, error.what());
        }
        CHECK((xcr0 & 4) || back.fpu.ymm_high == FpuState{}.ymm_high);
        CHECK(back.fpu.legacy[28] == 0xff && back.fpu.legacy[30] == 0 && back.fpu.legacy[5] == 0);
    }
    CHECK(taken > 2000 && taken < 19900);

    struct Change {
        const char* what;
        u64 from_context;  // or from the FPU's area
        bool in_fpu;
        u64 value;
        bool good;
    };
    const Change changes[] = {
        {"rip, not canonical", 40 + 16 * 8, false, bit(47), false},
        {"rip, of the supervisor", 40 + 16 * 8, false, 0xffff'ffff'8000'3000, false},
        {"rflags, all", 40 + 17 * 8, false, ~u64{0}, true},
        {"cs, of the supervisor", 40 + 18 * 8, false, 0x08, false},
        {"no FPU area", 40 + 23 * 8, false, 0, true},
        {"an FPU area nowhere", 40 + 23 * 8, false, 64, false},
        {"an FPU area at the end of memory", 40 + 23 * 8, false, ~u64{63}, false},
        {"mxcsr", 24, true, 0xffff'0001'0000, false},
        {"a component that is not there", 512, true, 8, false},
        {"compacted", 520, true, bit(63), false},
        {"no magic", 464, true, 0, true},
        {"a size beyond all", 480, true, 0xffff'ffff, true},
    };
    for (const Change& change : changes) {
        SignalContext context = random_context(random, 7, s.stack + kStackSize), back;
        GeneralRegisters handler;
        CHECK(push_signal_frame(s.space, 7, action, {}, context, handler));
        u64 fpu = 0;
        CHECK(s.space.load(handler.gpr[kRdx] + 40 + 23 * 8, fpu));
        CHECK(s.space.store((change.in_fpu ? fpu : handler.gpr[kRdx]) + change.from_context,
                            change.value));
        handler.gpr[kRsp] += 8;
        if (pop_signal_frame(s.space, 7, handler, back) != change.good) {
            pvtest::fail(__FILE__, __LINE__, change.what);
        }
    }
}

// The host's own frame.
struct Caught {
    std::vector<u8> bytes;
    u64 frame = 0;
    u64 fpu = 0;
    ucontext_t context;
} caught;

void on_signal(int, siginfo_t*, void* context) {
    const auto* user = static_cast<const ucontext_t*>(context);
    caught.frame = reinterpret_cast<u64>(context) - 8;
    caught.fpu = reinterpret_cast<u64>(user->uc_mcontext.fpregs);
    caught.context = *user;
    const u64 size = caught.fpu - caught.frame + 4096;
    const auto* from = reinterpret_cast<const u8*>(caught.frame);
    caught.bytes.assign(from, from + size);
}

void a_frame_of_the_host() {
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaddset(&action.sa_mask, SIGUSR2);
    sigaction(SIGUSR1, &action, nullptr);
    constexpr u64 kHostStack = 1 << 18;  // with room above the area that is copied
    auto* memory = static_cast<u8*>(mmap(nullptr, kHostStack + 8192, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    stack_t stack{memory, 0, kHostStack};
    sigaltstack(&stack, nullptr);
    u64 wanted[2] = {0x1122334455667788, 0x99aabbccddeeff00};
    const long self = getpid();
    long result = SYS_kill;
    asm volatile("movups %[wanted], %%xmm15; mov %[r12], %%r12; fldpi; syscall; fstp %%st(0)"
                 : "+a"(result)
                 : "D"(self), "S"(SIGUSR1), [wanted] "m"(wanted), [r12] "r"(wanted[0])
                 : "rcx", "r11", "r12", "xmm15", "memory");
    stack.ss_flags = SS_DISABLE;
    sigaltstack(&stack, nullptr);

    // At the same distance from a page, in a space of its own.
    Space s;
    AddressSpace::Request request;
    request.rights = kReadable | kWritable;
    request.size = kHostStack;
    const u64 base = static_cast<u64>(s.space.map(request));
    const u64 frame = base + (caught.frame & kPageMask);
    CHECK(s.space.copy_out(frame, caught.bytes));
    const u64 context = frame + 8, fpu = caught.fpu - caught.frame + frame;
    s.space.store(context + 40 + 23 * 8, fpu);
    s.space.store(context + 40 + 18 * 8, u16{Supervisor::kUserCode});
    s.space.store(context + 40 + 18 * 8 + 6, u16{Supervisor::kUserData});
    GeneralRegisters registers;
    registers.gpr[kRsp] = frame + 8;
    SignalContext back;
    CHECK(pop_signal_frame(s.space, 7, registers, back));
    const auto& gregs = caught.context.uc_mcontext.gregs;
    auto host = [&](int which) { return static_cast<u64>(gregs[which]); };
    CHECK_EQ(back.registers.gpr[12], wanted[0]);
    CHECK_EQ(back.registers.gpr[kRdi], static_cast<u64>(self));
    CHECK_EQ(back.registers.gpr[kRsi], u64{SIGUSR1});
    CHECK_EQ(back.registers.gpr[kRax], u64{0});
    CHECK_EQ(back.registers.gpr[kRsp], host(REG_RSP));
    CHECK_EQ(back.registers.gpr[kRbp], host(REG_RBP));
    CHECK_EQ(back.registers.gpr[kRbx], host(REG_RBX));
    CHECK_EQ(back.registers.gpr[kRcx], host(REG_RIP));  // as SYSCALL leaves it
    CHECK_EQ(back.registers.rip, host(REG_RIP));
    CHECK_EQ(back.mask, u64{0});
    CHECK_EQ(back.stack.base, reinterpret_cast<u64>(memory));
    CHECK_EQ(back.stack.size, kHostStack);
    CHECK(memcmp(back.fpu.legacy.data() + 160 + 15 * 16, wanted, 16) == 0);
    const u8 pi[] = {0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40};
    CHECK(memcmp(back.fpu.legacy.data() + 32, pi, sizeof pi) == 0);
    CHECK_EQ(back.fpu.legacy[4], u8{0x80});  // one register is not empty
}

}  // namespace

int main() {
    what_is_pushed_comes_back();
    stacks_that_cannot_take_a_frame();
    hostile_frames();
    a_frame_of_the_host();
    return pvtest::finish("signal frames");
}
