// Guest debugging, the same on both engines: what a single step is, hardware breakpoints and
// watchpoints, INT3 exits. Programs of random instructions are stepped on both and compared.
//
// Emulations of KVM or of the CPU below it keep less than a CPU would; each is found out here by a
// guest of its own, and what depends on it is then left out with a word on stdout.
#include <unistd.h>

#include <cstdio>
#include <random>
#include <set>

#include "base/error.hpp"
#include "cpu/debug.hpp"
#include "kvm/debug_guest.hpp"

using namespace polyvisor;
using namespace pvtest;

PV_GUEST(program, R"(
    xor %eax, %eax
    mov $3, %ecx
1:  add %rcx, %rax
    push %rax
    dec %ecx
    jnz 1b
    pop %rdx
    pop %rdx
    pushfq
    pop %rsi
    lea 2f(%rip), %rbp
    call *%rbp
    jmp 3f
2:  xchg %rdx, %rax
    ret
3:  mov $3, %ecx
    rep stosb
    mov %al, (%rbx)
    movzwl (%rbx), %r8d
    cmovz %rax, %r9
    pushfq
    popq %r10
    nop
)")

// Its interrupt handler counts in R15.
PV_GUEST(events, R"(
    mov $1, %eax
    int $0x30
    inc %eax
    sti
    inc %eax
    cli
    inc %eax
    ud2
)")

PV_GUEST(loads_and_stores, R"(
    mov %eax, (%rbx)
    mov 4(%rbx), %ecx
    movb $7, 3(%rbx)
    add %eax, 2(%rbx)
    nop
    hlt
)")

PV_GUEST(counting, R"(
    xor %eax, %eax
1:  inc %eax
    cmp $5, %eax
    jne 1b
    hlt
)")

PV_GUEST(own_int3, R"(
    mov $1, %eax
    int3
    inc %eax
    hlt
)")

PV_GUEST(halting, R"(
    mov $1, %eax
    hlt
    inc %eax
    nop
)")

namespace {

using Kind = GuestDebug::Breakpoint::Kind;

/// PVM, a KVM without the CPU's virtualization, cannot emulate INT n, and forgets a HLT in a step.
bool hardware() {
    return ::access("/sys/module/kvm_amd", F_OK) == 0 ||
           ::access("/sys/module/kvm_intel", F_OK) == 0;
}

GuestDebug stepping() {
    GuestDebug debug;
    debug.single_step = true;
    return debug;
}

GuestDebug watching(u64 address, Kind kind, u8 size = 1) {
    GuestDebug debug;
    debug.hardware.push_back({address, kind, size});
    return debug;
}

struct Snapshot {
    u64 rip;
    u64 rflags;
    std::array<u64, 16> gpr;
    bool operator==(const Snapshot&) const = default;
};

Snapshot look(const DebugGuest& guest) {
    CpuState state = guest.state();
    return {state.rip, state.rflags & ~bit(16), state.gpr};
}

/// States after each step, at most `steps` of them, but for those within a repeated instruction.
std::vector<Snapshot> trace(const char* engine, std::string_view code, unsigned steps) {
    DebugGuest guest(engine, code);
    guest.vcpu->set_debug(stepping());
    std::vector<Snapshot> result;
    for (unsigned n = 0; n < steps; ++n) {
        Exit exit = guest.vcpu->run();
        CHECK_EQ(exit.reason, ExitReason::kDebug);
        if (exit.reason != ExitReason::kDebug) {
            std::fprintf(stderr, "  %s\n", exit.text.c_str());
            break;
        }
        CHECK_EQ(exit.dr6, u32{kDr6Step});
        Snapshot now = look(guest);
        CHECK_EQ(exit.address, now.rip);
        // How many iterations of a repeated instruction are a step is not compared.
        if (result.empty() || result.back().rip != now.rip) result.push_back(now);
        if (result.back().rip == DebugGuest::kCode + code.size()) break;
    }
    return result;
}

void show(const char* what, const Snapshot& s) {
    std::fprintf(stderr, "  %s: rip %llx flags %llx rax %llx rcx %llx rsp %llx\n", what,
                 static_cast<unsigned long long>(s.rip), static_cast<unsigned long long>(s.rflags),
                 static_cast<unsigned long long>(s.gpr[0]),
                 static_cast<unsigned long long>(s.gpr[1]),
                 static_cast<unsigned long long>(s.gpr[4]));
}

/// Every stop of `some` is one of `all`, in order and with the same registers. How many of `all`
/// are missing; ~0 when one is none of them.
unsigned missing(const std::vector<Snapshot>& all, const std::vector<Snapshot>& some) {
    std::size_t at = 0;
    unsigned skipped = 0;
    for (const Snapshot& one : some) {
        std::size_t first = at;
        while (at < all.size() && !(all[at] == one)) ++at;
        if (at == all.size()) {
            show("stopped at", one);
            if (first < all.size()) show("where soft is at", all[first]);
            return ~0u;
        }
        skipped += static_cast<unsigned>(at - first);
        ++at;
    }
    return skipped + static_cast<unsigned>(all.size() - at);
}

void soft_steps_exactly() {
    auto steps = trace("soft", program(), 100);
    CHECK_EQ(steps.size(), std::size_t{31});
    CHECK_EQ(steps.back().gpr[kRax], u64{5});
    auto inside = trace("soft", events(), 11);
    // int, its handler's two instructions, and so on; ud2 leads into the handler.
    const u64 rips[] = {DebugGuest::kHandler, DebugGuest::kHandler + 3};
    CHECK_EQ(inside[1].rip, rips[0]);
    CHECK_EQ(inside[2].rip, rips[1]);
    CHECK_EQ(inside.back().rip, rips[1]);
}

void kvm_steps_as_soft() {
    auto soft = trace("soft", program(), 100);
    auto kvm = trace("kvm", program(), 100);
    CHECK_EQ(missing(soft, kvm), 0u);
    if (!hardware()) return;
    // A CPU under TCG holds the trap back after STI, and KVM steps over INT n with its handler.
    auto events_soft = trace("soft", events(), 9);
    auto events_kvm = trace("kvm", events(), 5);
    unsigned skipped = missing(events_soft, events_kvm);
    CHECK(skipped <= 6);
}

// --- Random programs -----------------------------------------------------------------------------

/// One instruction that any CPU can do, on RAX, RCX, RDX, RSI, R8-R11 and memory at RBX.
void add_instruction(std::string& code, std::mt19937& random) {
    auto pick = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
    static constexpr u8 kRegisters[] = {0, 1, 2, 6};
    u8 a = kRegisters[pick(4)], b = kRegisters[pick(4)];
    auto put = [&](std::initializer_list<unsigned> bytes) {
        for (unsigned byte : bytes) code += static_cast<char>(byte);
    };
    switch (pick(12)) {
        case 0:  // arithmetic, register to register
            put({0x48, pick(8) * 8 + 1, 0xc0u | b << 3 | a});
            break;
        case 1:  // mov register, imm32
            put({0xb8u + a, pick(256), pick(256), pick(256), pick(256)});
            break;
        case 2:  // store
            put({0x48, 0x89, 0x43u | a << 3, pick(100)});
            break;
        case 3:  // load
            put({0x48, 0x8b, 0x43u | a << 3, pick(100)});
            break;
        case 4:  // push, pop
            put({0x50u + a, 0x58u + b});
            break;
        case 5:  // pushfq, pop
            put({0x9c, 0x58u + a});
            break;
        case 6:  // shift by imm8
            put({0x48, 0xc1, 0xe0u | pick(2) << 3 | a, 1 + pick(60)});
            break;
        case 7:  // imul
            put({0x48, 0x0f, 0xaf, 0xc0u | a << 3 | b});
            break;
        case 8:  // jcc over a nop
            put({0x70u + pick(16), 1, 0x90});
            break;
        case 9:  // mov ecx, n; rep movsb within the data; rdi and rsi set first
            put({0x48, 0x8d, 0x7b, 0x20, 0x48, 0x8d, 0x73, pick(30), 0xb9, 1 + pick(4), 0, 0, 0,
                 0xf3, 0xa4});
            break;
        case 10:  // lock add [rbx], register
            put({0xf0, 0x48, 0x01, 0x03u | a << 3});
            break;
        default:  // setcc, cmc, cld, bswap
            put({0x0f, 0x90u + pick(16), 0xc0u | (a & 3), 0xf5, 0xfc, 0x48, 0x0f, 0xc8u + b});
    }
}

void lockstep(unsigned seed) {
    std::mt19937 random(seed);
    std::string code;
    for (int n = 0; n < 12; ++n) add_instruction(code, random);
    auto soft = trace("soft", code, 120);
    auto kvm = trace("kvm", code, 120);
    int before = failures;
    CHECK_EQ(missing(soft, kvm), 0u);
    if (failures != before) std::fprintf(stderr, "  program of seed %u\n", seed);
}

// --- Breakpoints ---------------------------------------------------------------------------------

constexpr u64 kLoop = DebugGuest::kCode + 2;

void code_breakpoints(const char* engine) {
    DebugGuest guest(engine, counting());
    guest.vcpu->set_debug(watching(kLoop, Kind::kExecute));
    for (u64 n = 0; n < 5; ++n) {
        Exit exit = guest.vcpu->run();
        CHECK_EQ(exit.reason, ExitReason::kDebug);
        CHECK_EQ(exit.dr6, 1u);
        CHECK_EQ(exit.address, kLoop);
        CHECK_EQ(guest.state().rip, kLoop);
        CHECK_EQ(guest.state().gpr[kRax], n);
        // Nothing of it is to be seen in the guest's own debug registers.
        CHECK_EQ(guest.state().dr7, u64{0x400});
        CHECK_EQ(guest.state().dr[0], u64{0});
    }
    CHECK_EQ(guest.vcpu->run().reason, ExitReason::kHalt);

    // Steps pass it.
    DebugGuest steps(engine, counting());
    GuestDebug both = watching(kLoop, Kind::kExecute);
    both.single_step = true;
    steps.vcpu->set_debug(both);
    for (int n = 0; n < 4; ++n) CHECK_EQ(steps.vcpu->run().dr6 & kDr6Step, u32{kDr6Step});
    CHECK_EQ(steps.state().rip, kLoop);
    // Taken away while it stands there, it is not hit any more.
    steps.vcpu->set_debug({});
    CHECK_EQ(steps.vcpu->run().reason, ExitReason::kHalt);
    CHECK_EQ(steps.state().gpr[kRax], u64{5});
}

void watchpoints(const char* engine) {
    constexpr u64 kCode = DebugGuest::kCode;
    struct Case {
        u64 offset;
        Kind kind;
        u8 size;
        std::vector<u64> stops;  // offsets in the code: after the instruction
    };
    const Case cases[] = {
        {0, Kind::kWrite, 1, {2}},
        {0, Kind::kWrite, 4, {2, 9, 12}},
        {4, Kind::kReadWrite, 4, {5, 12}},
        {4, Kind::kWrite, 1, {12}},
        {0, Kind::kReadWrite, 8, {2, 5, 9, 12}},
        {8, Kind::kReadWrite, 8, {}},
    };
    for (const Case& c : cases) {
        DebugGuest guest(engine, loads_and_stores());
        guest.vcpu->set_debug(watching(DebugGuest::kData + c.offset, c.kind, c.size));
        for (u64 stop : c.stops) {
            Exit exit = guest.vcpu->run();
            CHECK_EQ(exit.reason, ExitReason::kDebug);
            CHECK_EQ(exit.dr6, 1u);
            CHECK_EQ(exit.address, kCode + stop);
        }
        CHECK_EQ(guest.vcpu->run().reason, ExitReason::kHalt);
    }
}

void four_at_once(const char* engine) {
    DebugGuest guest(engine, counting());
    GuestDebug debug;
    for (u64 n = 0; n < 4; ++n) debug.hardware.push_back({kLoop + n, Kind::kExecute, 1});
    guest.vcpu->set_debug(debug);
    // inc (2 bytes) at +0, cmp (3 bytes) at +2.
    Exit exit = guest.vcpu->run();
    CHECK_EQ(exit.dr6, 1u);
    exit = guest.vcpu->run();
    CHECK_EQ(exit.dr6, 4u);
    CHECK_EQ(exit.address, kLoop + 2);
}

void int3_exits(const char* engine) {
    DebugGuest guest(engine, own_int3());
    GuestDebug debug;
    debug.int3_exits = true;
    guest.vcpu->set_debug(debug);
    Exit exit = guest.vcpu->run();
    CHECK_EQ(exit.reason, ExitReason::kDebug);
    CHECK_EQ(exit.dr6, 0u);
    CHECK_EQ(exit.address, DebugGuest::kCode + 5);
    CHECK_EQ(guest.state().rip, DebugGuest::kCode + 5);
    CHECK_EQ(guest.state().gpr[15], u64{0});
    exit = guest.vcpu->run();  // still there
    CHECK_EQ(exit.address, DebugGuest::kCode + 5);
    guest.vcpu->raise_int3();
    CHECK_EQ(guest.vcpu->run().reason, ExitReason::kHalt);
    CHECK_EQ(guest.state().gpr[15], u64{1});
    CHECK_EQ(guest.state().gpr[kRax], u64{2});
}

void int3_is_the_guests(const char* engine) {
    DebugGuest guest(engine, own_int3());
    CHECK_EQ(guest.vcpu->run().reason, ExitReason::kHalt);
    CHECK_EQ(guest.state().gpr[15], u64{1});
}

void a_step_over_hlt(const char* engine) {
    DebugGuest guest(engine, halting());
    guest.vcpu->set_debug(stepping());
    for (u64 rip : {5u, 6u}) {
        Exit exit = guest.vcpu->run();
        CHECK_EQ(exit.reason, ExitReason::kDebug);
        CHECK_EQ(exit.address, DebugGuest::kCode + rip);
    }
    CHECK_EQ(guest.state().activity, Activity::kHalted);
    CHECK_EQ(guest.vcpu->run().reason, ExitReason::kHalt);  // interrupts are off
    // An NMI ends the halt; its handler waits while the host steps.
    guest.vcpu->nmi();
    Exit exit = guest.vcpu->run();
    CHECK_EQ(exit.reason, ExitReason::kDebug);
    CHECK_EQ(exit.address, DebugGuest::kCode + 8);
    CHECK_EQ(guest.state().gpr[15], u64{0});
}

// A guest that steps itself: its handler counts, and the host's breakpoints do not change that.
void the_guests_own_trap_flag(const char* engine, bool debugged) {
    DebugGuest guest(engine, counting());
    if (debugged) guest.vcpu->set_debug(watching(DebugGuest::kData, Kind::kWrite));
    CpuState state = guest.state();
    state.rflags |= bit(8);
    guest.vcpu->restore(state);
    GuestDebug stop = watching(DebugGuest::kCode + 9, Kind::kExecute);  // at the HLT
    if (debugged) stop.hardware.push_back({DebugGuest::kData, Kind::kWrite, 1});
    guest.vcpu->set_debug(stop);
    Exit exit = guest.vcpu->run();
    CHECK_EQ(exit.reason, ExitReason::kDebug);
    CHECK_EQ(guest.state().gpr[15], u64{16});  // xor, and five times inc, cmp, jne
    CHECK_EQ(guest.state().dr6 & kDr6Step, u64{kDr6Step});
}

void impossible(const char* engine) {
    DebugGuest guest(engine, counting());
    auto refused = [&](const GuestDebug& debug) {
        CHECK_THROWS(guest.vcpu->set_debug(debug), ConfigError);
    };
    refused(watching(0x1000, Kind::kExecute, 2));
    refused(watching(0x1000, Kind::kWrite, 3));
    refused(watching(0x1001, Kind::kWrite, 2));
    GuestDebug five;
    for (u64 n = 0; n < 5; ++n) five.hardware.push_back({n, Kind::kExecute, 1});
    refused(five);
    CHECK_EQ(guest.vcpu->run().reason, ExitReason::kHalt);
}

/// Whether the debug registers do anything under this KVM.
bool has(Kind kind) {
    DebugGuest guest("kvm", kind == Kind::kExecute ? counting() : loads_and_stores());
    guest.vcpu->set_debug(watching(kind == Kind::kExecute ? kLoop : DebugGuest::kData, kind));
    return guest.vcpu->run().reason == ExitReason::kDebug;
}

bool has_int3() {
    DebugGuest guest("kvm", own_int3());
    GuestDebug debug;
    debug.int3_exits = true;
    try {
        guest.vcpu->set_debug(debug);
    } catch (const StateMismatch& error) {
        std::printf("%s\n", error.what());
        return false;
    }
    return true;
}

void common(const char* engine, bool whole, bool code, bool data, bool int3) {
    impossible(engine);
    if (whole) {
        int3_is_the_guests(engine);
        a_step_over_hlt(engine);
    } else {
        std::puts("no software interrupts and halts under this KVM");
    }
    if (code) {
        code_breakpoints(engine);
        four_at_once(engine);
        for (bool debugged : {false, true}) the_guests_own_trap_flag(engine, debugged);
    } else {
        std::puts("no code breakpoints on the CPU under this KVM");
    }
    if (data) {
        watchpoints(engine);
    } else {
        std::puts("no watchpoints on the CPU under this KVM");
    }
    if (int3) int3_exits(engine);
}

}  // namespace

int main() {
    common("soft", true, true, true, true);
    soft_steps_exactly();
    if (::access("/dev/kvm", R_OK | W_OK) != 0) {
        if (failures != 0) return finish("test_debug");
        std::puts("no /dev/kvm that this user can open: only engine soft was tested");
        return 77;
    }
    common("kvm", hardware(), has(Kind::kExecute), has(Kind::kWrite), has_int3());
    kvm_steps_as_soft();
    for (unsigned seed = 1; seed <= 20; ++seed) lockstep(seed);
    return finish("test_debug");
}
