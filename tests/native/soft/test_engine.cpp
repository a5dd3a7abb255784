// The machinery around the operations: blocks, links, self-modifying code, page crossings, budgets,
// stop requests, and the specialised handlers against the generic operations.
#include <chrono>
#include <random>
#include <thread>

#include "check.hpp"
#include "long_guest.hpp"
#include "soft/dispatch.hpp"

using namespace polyvisor;

PV_GUEST(sum_loop, R"(
    xor %eax, %eax
    mov $1000, %ecx
1:  add %rcx, %rax
    dec %ecx
    jnz 1b
    hlt
)")

// Each iteration rewrites the immediate of an instruction further on in the same block.
PV_GUEST(modify_own_block, R"(
    xor %eax, %eax
    xor %ecx, %ecx
    lea 2f+1(%rip), %rdi
1:  inc %ecx
    mov %ecx, (%rdi)
2:  mov $0x7fffffff, %edx
    add %edx, %eax
    cmp $100, %ecx
    jne 1b
    hlt
)")

// The store is in another block, and by way of a page that is also written as data.
PV_GUEST(modify_other_block, R"(
    xor %eax, %eax
    xor %ecx, %ecx
    lea 3f(%rip), %rdi
1:  inc %ecx
    mov %ecx, 1(%rdi)
    incl 64(%rdi)
    call 3f
    cmp $300, %ecx
    jne 1b
    hlt
3:  mov $0x7fffffff, %edx
    add %edx, %eax
    ret
    .balign 64
    .fill 64, 1, 0x90
)")

// REP MOVSB lays a new function over the old one.
PV_GUEST(replace_function, R"(
    xor %eax, %eax
    mov $50, %ebp
    cld
1:  lea 4f(%rip), %rsi
    call 2f
    lea 5f(%rip), %rsi
    call 2f
    dec %ebp
    jnz 1b
    hlt
2:  lea 3f(%rip), %rdi
    mov $8, %ecx
    rep movsb
3:  .fill 8, 1, 0x90
    ret
4:  add $1, %eax
    .fill 8, 1, 0x90
5:  add $1000, %rax
    .fill 8, 1, 0x90
)")

// Instructions with two memory operands whose pages share a TLB entry (256 pages apart).
PV_GUEST(conflicting_pages, R"(
    mov $0x305000, %rbx
    mov $0x405800, %rsp
    lea 2f(%rip), %rax
    mov %rax, 0x10(%rbx)
    movq $7, 0x18(%rbx)
    xor %edx, %edx
    mov $2, %ecx
    xor %eax, %eax
    mov $100, %ebp
1:  call *0x10(%rbx)
    call *(%rbx,%rcx,8)
    push 0x18(%rbx)
    pop 0x20(%rbx)
    mov %rbx, %rsi
    mov $0x405900, %edi
    movsq
    add 0x20(%rbx), %rdx
    dec %ebp
    jnz 1b
    hlt
2:  inc %eax
    ret
)")

// Data accesses across a page boundary, whose pages lie apart in memory.
PV_GUEST(crossing_data, R"(
    mov $0x400ffc, %rbx
    movabs $0x1122334455667788, %rax
    mov %rax, (%rbx)
    mov (%rbx), %rcx
    addq $1, (%rbx)
    mov 2(%rbx), %edx
    lock xaddq %rax, (%rbx)
    hlt
)")

namespace {

void test_loop() {
    LongGuest guest(sum_loop());
    Exit exit = guest.run();
    CHECK_EQ(exit.reason, ExitReason::kHalt);
    CHECK_EQ(guest.reg(kRax), u64{500500});
    CHECK_EQ(guest.vcpu->save().instructions, u64{2 + 3 * 1000 + 1});
}

void test_self_modification() {
    LongGuest own(modify_own_block());
    CHECK_EQ(own.run().reason, ExitReason::kHalt);
    CHECK_EQ(own.reg(kRax), u64{5050});

    LongGuest other(modify_other_block());
    CHECK_EQ(other.run().reason, ExitReason::kHalt);
    CHECK_EQ(other.reg(kRax), u64{300 * 301 / 2});

    LongGuest replaced(replace_function());
    CHECK_EQ(replaced.run().reason, ExitReason::kHalt);
    CHECK_EQ(replaced.reg(kRax), u64{50 * 1001});
}

// The host (or a device) writes code between two runs.
void test_host_store() {
    LongGuest guest(std::string_view("\xb8\x01\x00\x00\x00\xf4", 6));  // mov $1, %eax; hlt
    guest.run();
    CHECK_EQ(guest.reg(kRax), u64{1});
    guest.load(LongGuest::kCode + 1, std::string_view("\x02", 1));
    CpuState state = guest.vcpu->save();
    state.rip = LongGuest::kCode;
    state.activity = Activity::kRunning;
    guest.vcpu->restore(state);
    guest.run();
    CHECK_EQ(guest.reg(kRax), u64{2});
}

// One instruction laid across a page boundary at every offset, then its second page changed.
void test_page_crossing() {
    for (unsigned before = 1; before < 10; ++before) {
        // movabs $0x1122334455667788, %rax; hlt
        std::string_view code("\x48\xb8\x88\x77\x66\x55\x44\x33\x22\x11\xf4", 11);
        u64 start = LongGuest::kCode + kPageSize - before;
        LongGuest guest("");
        guest.load(start, code);
        for (int round = 0; round < 2; ++round) {
            CpuState state = guest.vcpu->save();
            state.rip = start;
            state.activity = Activity::kRunning;
            guest.vcpu->restore(state);
            CHECK_EQ(guest.run().reason, ExitReason::kHalt);
            u64 want = round == 0 ? 0x1122334455667788 : 0x9922334455667788;
            CHECK_EQ(guest.reg(kRax), want);
            guest.load(start + 9, "\x99");
        }
    }
}

void test_conflicting_pages() {
    LongGuest guest(conflicting_pages());
    CHECK_EQ(guest.run().reason, ExitReason::kHalt);
    CHECK_EQ(guest.reg(kRax), u64{200});
    CHECK_EQ(guest.reg(kRdx), u64{700});
}

void test_crossing_data() {
    LongGuest guest(crossing_data());
    // 0x400000 and 0x401000 as 4 KiB pages, swapped.
    guest.memory.store<u64>(Gpa(0x3000 + 8 * 2), 0x4007);
    guest.memory.store<u64>(Gpa(0x4000), 0x501007);
    guest.memory.store<u64>(Gpa(0x4008), 0x500007);
    CHECK_EQ(guest.run().reason, ExitReason::kHalt);
    CHECK_EQ(guest.reg(kRcx), u64{0x1122334455667788});
    CHECK_EQ(guest.reg(kRdx), u64{0x33445566});
    CHECK_EQ(guest.reg(kRax), u64{0x1122334455667789});
    CHECK_EQ(guest.memory.load<u32>(Gpa(0x501ffc)), u32{0xaaccef11});
    CHECK_EQ(guest.memory.load<u32>(Gpa(0x500000)), u32{0x22446688});
}

/// A random program of plain integer code with loops, calls and memory, ending in HLT.
std::string random_program(std::mt19937_64& random) {
    std::string code;
    auto byte = [&](unsigned value) { code.push_back(static_cast<char>(value)); };
    auto pick = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
    auto imm32 = [&] {
        for (int n = 0; n < 4; ++n) byte(pick(256));
    };
    // RBX points at data, RSP at the stack, RBP counts the loop: they are not destinations.
    static constexpr unsigned kFree[] = {0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    auto reg = [&] { return kFree[pick(13)]; };
    unsigned length = 10 + pick(60);
    for (unsigned n = 0; n < length; ++n) {
        unsigned r = reg(), m = reg();
        unsigned wide = pick(3);  // 0: 32-bit, 1: 64-bit, 2: 16-bit
        if (wide == 2) byte(0x66);
        unsigned rex = 0x40 | (wide == 1 ? 8 : 0) | (r >= 8 ? 4 : 0);
        unsigned reg_rm = 0xc0 | (r & 7) << 3 | (m & 7);
        switch (pick(12)) {
            case 0:
            case 1:
            case 2:  // op r, r of any size and direction
                byte(rex | (m >= 8));
                byte(pick(8) << 3 | pick(4));
                byte(reg_rm);
                break;
            case 3:
            case 4:  // op r, [rbx + disp8] and back
                byte(rex);
                byte(pick(8) << 3 | pick(4));
                byte(0x43 | (r & 7) << 3);
                byte(pick(128));
                break;
            case 5:  // group 1 with an 8-bit immediate
                byte((rex & ~4u) | (m >= 8));
                byte(0x83);
                byte(0xc0 | pick(8) << 3 | (m & 7));
                byte(pick(256));
                break;
            case 6:  // shifts and rotates by an immediate or CL
                byte((rex & ~4u) | (m >= 8));
                if (bool by_cl = pick(2); by_cl) {
                    byte(0xd3);
                    byte(0xc0 | pick(8) << 3 | (m & 7));
                } else {
                    byte(0xc1);
                    byte(0xc0 | pick(8) << 3 | (m & 7));
                    byte(pick(256));
                }
                break;
            case 7:  // movzx, movsx, imul, bt, cmov, setcc
                byte(rex | (m >= 8));
                byte(0x0f);
                static constexpr u8 kOps[] = {0xb6, 0xb7, 0xbe, 0xbf, 0xaf,
                                              0xa3, 0x42, 0x4f, 0x95, 0x9c};
                byte(kOps[pick(10)]);
                byte(reg_rm);
                break;
            case 8:  // not, neg, mul, imul; inc, dec
                byte((rex & ~4u) | (m >= 8));
                if (pick(2)) {
                    byte(0xf7);
                    byte(0xc0 | (2 + pick(4)) << 3 | (m & 7));
                } else {
                    byte(0xff);
                    byte(0xc0 | pick(2) << 3 | (m & 7));
                }
                break;
            case 9:  // lea r, [rbx + m*4 + disp32]
                if (m == 4) m = 0;
                byte(rex | (m >= 8 ? 2 : 0));
                byte(0x8d);
                byte(0x84 | (r & 7) << 3);
                byte(0x83 | (m & 7) << 3);
                imm32();
                break;
            case 10:  // push r; pop m
                byte(r >= 8 ? 0x41 : 0x40);
                byte(0x50 | (r & 7));
                byte(m >= 8 ? 0x41 : 0x40);
                byte(0x58 | (m & 7));
                if (wide ==
                    2) {  // the prefix went to the push: push 16 bits, pop 64. Put it right.
                    static constexpr char kAdjust[] = "\x48\x8d\x64\x24\xfa";  // lea -6(%rsp), %rsp
                    code.append(kAdjust, 5);
                }
                break;
            default:  // cmp and a short jump over the next few bytes of NOPs
                byte(rex | (m >= 8));
                byte(0x39);
                byte(reg_rm);
                byte(0x70 | pick(16));
                byte(2);
                byte(0x90);
                byte(0x90);
                break;
        }
    }
    // dec %ebp; jnz start; hlt
    byte(0xff);
    byte(0xcd);
    byte(0x0f);
    byte(0x85);
    auto back = static_cast<s32>(-static_cast<s64>(code.size() + 4));
    code.append(reinterpret_cast<const char*>(&back), 4);
    byte(0xf4);
    return code;
}

void randomize(LongGuest& guest, u64 seed) {
    std::mt19937_64 random(seed);
    CpuState state = guest.vcpu->save();
    for (u64& r : state.gpr) r = random() >> (random() % 64);
    state.gpr[kRbx] = LongGuest::kData;
    state.gpr[kRsp] = LongGuest::kStack;
    state.gpr[kRbp] = 5;
    guest.vcpu->restore(state);
    for (u64 n = 0; n < 256; n += 8) guest.memory.store<u64>(Gpa(LongGuest::kData + n), random());
}

bool check_same(LongGuest& a, LongGuest& b, u64 seed, const char* what) {
    CpuState x = a.vcpu->save(), y = b.vcpu->save();
    bool same = x == y;
    for (u64 n = 0; n < 256; n += 8) {
        same = same && a.memory.load<u64>(Gpa(LongGuest::kData + n)) ==
                           b.memory.load<u64>(Gpa(LongGuest::kData + n));
    }
    if (!same) {
        std::fprintf(stderr, "seed %llu: %s differ at rip %llx / %llx, flags %llx / %llx\n",
                     static_cast<unsigned long long>(seed), what,
                     static_cast<unsigned long long>(x.rip), static_cast<unsigned long long>(y.rip),
                     static_cast<unsigned long long>(x.rflags),
                     static_cast<unsigned long long>(y.rflags));
        for (int n = 0; n < 16; ++n) {
            if (x.gpr[n] != y.gpr[n]) {
                std::fprintf(stderr, "  r%d %llx / %llx\n", n,
                             static_cast<unsigned long long>(x.gpr[n]),
                             static_cast<unsigned long long>(y.gpr[n]));
            }
        }
    }
    CHECK(same);
    return same;
}

/// Tells after which instruction a program's fast and generic runs part.
void show_first_difference(const std::string& program, u64 seed) {
    u64 rip = LongGuest::kCode;
    for (u64 count = 1; count < 2000; ++count) {
        LongGuest fast(program), generic(program);
        generic.soft().set_generic_only();
        randomize(fast, seed);
        randomize(generic, seed);
        fast.run(count);
        generic.run(count);
        CpuState x = fast.vcpu->save(), y = generic.vcpu->save();
        if (!(x == y)) {
            std::fprintf(stderr, "  first after %llu instructions, bytes at %llx:",
                         static_cast<unsigned long long>(count),
                         static_cast<unsigned long long>(rip));
            for (u64 n = 0; n < 8; ++n)
                std::fprintf(stderr, " %02x", fast.memory.load<u8>(Gpa(rip + n)));
            std::fprintf(stderr, ", flags %llx / %llx\n", static_cast<unsigned long long>(x.rflags),
                         static_cast<unsigned long long>(y.rflags));
            check_same(fast, generic, seed, "first");
            return;
        }
        rip = x.rip;
    }
}

// Fast handlers, fusion and flag liveness against generic operations; whole blocks against single
// instructions: any way of running a program gives the same state.
void test_lockstep() {
    std::random_device entropy;
    u64 seed =
        std::getenv("PV_SEED") ? std::strtoull(std::getenv("PV_SEED"), nullptr, 0) : entropy();
    std::fprintf(stderr, "lockstep: PV_SEED=%llu\n", static_cast<unsigned long long>(seed));
    std::mt19937_64 random(seed);
    for (int n = 0; n < 400; ++n) {
        u64 one = random();
        std::mt19937_64 program_random(one);
        std::string program = random_program(program_random);
        LongGuest fast(program), generic(program), stepped(program);
        generic.soft().set_generic_only();
        for (LongGuest* guest : {&fast, &generic, &stepped}) randomize(*guest, one);
        fast.run();
        generic.run();
        if (!check_same(fast, generic, one, "fast and generic"))
            show_first_difference(program, one);
        for (int steps = 0; steps < 2000 && stepped.vcpu->save().activity == Activity::kRunning;
             ++steps) {
            stepped.run(1 + random() % 3);
        }
        check_same(fast, stepped, one, "whole and stepped");
    }
}

void test_budget() {
    for (u64 budget : {1, 2, 3, 4, 5, 7, 100, 2999, 3000}) {
        LongGuest guest(sum_loop());
        Exit exit = guest.run(budget);
        CHECK_EQ(exit.reason, ExitReason::kInterrupted);
        CHECK_EQ(guest.vcpu->save().instructions, budget);
    }
}

// An endless loop ends soon after request_stop(), and so does a run() that starts after it.
void test_stop() {
    LongGuest guest(std::string_view("\xeb\xfe", 2));
    std::thread stopper([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        guest.vcpu->request_stop();
    });
    Exit exit = guest.run(~u64{0});
    stopper.join();
    CHECK_EQ(exit.reason, ExitReason::kInterrupted);
    guest.vcpu->request_stop();
    CHECK_EQ(guest.run(~u64{0}).reason, ExitReason::kInterrupted);
}

void test_every_row_is_bound() {
    for (std::string_view row : soft::wrongly_bound_rows()) {
        std::fprintf(stderr, "row %.*s is bound never or twice\n", static_cast<int>(row.size()),
                     row.data());
    }
    CHECK(soft::wrongly_bound_rows().empty());
}

}  // namespace

int main() {
    test_loop();
    test_self_modification();
    test_host_store();
    test_page_crossing();
    test_crossing_data();
    test_conflicting_pages();
    test_budget();
    test_stop();
    test_lockstep();
    test_every_row_is_bound();
    return pvtest::finish("test_engine");
}
