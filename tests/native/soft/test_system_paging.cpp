// Paging as running programs see it: every permission bit with its error code, in each format,
// through the soft TLB. Random sequences of accesses check that no cached translation outlives what
// it came from, nor serves a privilege it was not made for.
#include <random>

#include "system_machine.hpp"

using namespace pvtest;

namespace {

#define BYTES(text) std::string_view(text, sizeof(text) - 1)

constexpr u64 kWp = bit(16), kSmep = bit(20), kSmap = bit(21), kAcFlag = bit(18);
constexpr u64 kNxBit = bit(63);
constexpr u64 kFaultHandler = 0x7000;

enum class Use { kRead, kWrite, kFetch };

struct Case {
    const char* name;
    u64 entry;  ///< low bits of the page's entry, with NX
    unsigned cpl;
    Use use;
    int error;                        ///< -1: allowed
    u64 cr0 = 0, cr4 = 0, flags = 0;  ///< set
    u64 cr0_off = 0;
};

const Case kCases[] = {
    {"absent", 0, 0, Use::kRead, 0},
    {"absent, write", 0, 0, Use::kWrite, 2},
    {"absent, user", 0, 3, Use::kRead, 4},
    {"absent, user write", 0, 3, Use::kWrite, 6},
    {"supervisor page from user", 3, 3, Use::kRead, 5},
    {"supervisor page from user, write", 3, 3, Use::kWrite, 7},
    {"supervisor page, fetched by user", 3, 3, Use::kFetch, 5 | 16},
    {"user page", 7, 3, Use::kWrite, -1},
    {"read-only, read", 5, 3, Use::kRead, -1},
    {"read-only, user write", 5, 3, Use::kWrite, 7},
    {"read-only, supervisor write with WP", 1, 0, Use::kWrite, 3},
    {"read-only, supervisor write without WP", 1, 0, Use::kWrite, -1, 0, 0, 0, kWp},
    {"user read-only, supervisor write without WP", 5, 0, Use::kWrite, -1, 0, 0, 0, kWp},
    {"NX, read", 7 | kNxBit, 3, Use::kRead, -1},
    {"NX, fetched", 7 | kNxBit, 3, Use::kFetch, 5 | 16},
    {"NX, fetched by supervisor", 3 | kNxBit, 0, Use::kFetch, 1 | 16},
    {"SMEP", 7, 0, Use::kFetch, 1 | 16, 0, kSmep},
    {"SMEP, supervisor page", 3, 0, Use::kFetch, -1, 0, kSmep},
    {"user page fetched without SMEP", 7, 0, Use::kFetch, -1},
    {"SMAP", 7, 0, Use::kRead, 1, 0, kSmap},
    {"SMAP, write", 7, 0, Use::kWrite, 3, 0, kSmap},
    {"SMAP with AC", 7, 0, Use::kWrite, -1, 0, kSmap, kAcFlag},
    {"SMAP, supervisor page", 3, 0, Use::kWrite, -1, 0, kSmap},
    {"SMAP does not touch user mode", 7, 3, Use::kWrite, -1, 0, kSmap},
    {"reserved bit", 7 | bit(45), 0, Use::kRead, 9},
    {"reserved bit, user write", 7 | bit(45), 3, Use::kWrite, 15},
};

/// Runs one access of the page at pages_base(): MOV, or a jump to it where HLT or INT 0x80 stands.
Outcome access(Machine& m, Use use) {
    const u64 page = pages_base(m);
    m.state.gpr[kRax] = page + 0x10;
    m.state.gpr[kRbx] = page;
    m.put<u16>(kPages, 0x80cd);
    switch (use) {
        case Use::kRead:
            m.start(BYTES("\x8b\x00\x90"));
            break;
        case Use::kWrite:
            m.start(BYTES("\x89\x00\x90"));
            break;
        case Use::kFetch:
            m.start(BYTES("\xff\xe3\x90"));
            break;
    }
    m.run(use == Use::kFetch ? 3 : 1);
    CpuState s = m.vcpu->save();
    return outcome_of(m, s);
}

void permissions() {
    for (Mode mode : {Mode::kLong, Mode::kProtected32}) {
        for (const Case& c : kCases) {
            const bool wide = mode == Mode::kLong;
            if (!wide && (c.entry >> 32)) continue;
            Machine m(mode, c.cpl);
            int before = failures;
            m.state.cr0 = (m.state.cr0 | c.cr0) & ~c.cr0_off;
            m.state.cr4 |= c.cr4;
            m.state.rflags |= c.flags;
            if (c.cr4 & (kSmap | kSmep)) {
                // The code and the tables of the test must not be user pages themselves.
                if (c.cpl == 0) {
                    m.put<u64>(kPd64, 0x83);
                    m.put<u32>(kPd32, 0x83);
                }
            }
            m.set_page(0, kPages | c.entry);
            Outcome o = access(m, c.use);
            int want_error = c.error;
            // Without NX or SMEP an instruction fetch is not told from a read.
            if (!wide && want_error >= 0 && !(c.cr4 & kSmep)) want_error &= ~16;
            if (want_error < 0) {
                CHECK_EQ(o.vector, c.use == Use::kFetch ? 0x80 : -1);
                u64 used = 32 | (c.use == Use::kWrite ? 64 : 0);
                CHECK_EQ(m.page_entry(0) & 0x60, used);
            } else {
                CHECK_EQ(o.vector, 14);
                CHECK_EQ(o.error, static_cast<u64>(want_error));
                CHECK_EQ(o.state.cr2, pages_base(m) + (c.use == Use::kFetch ? 0 : 0x10));
                CHECK_EQ(o.rip, c.use == Use::kFetch ? pages_base(m) : kCode);
                CHECK_EQ(m.page_entry(0) & 0x60, u64{0});
            }
            if (failures != before) std::fprintf(stderr, "  ... %s: %s\n", name_of(mode), c.name);
        }
    }
}

// A store that crosses into an absent page changes nothing of the first.
void crossing() {
    Machine m(Mode::kLong);
    m.set_page(1, 0);
    m.state.gpr[kRbx] = kPages + 0xffe;
    m.state.gpr[kRax] = 0x11223344;
    Outcome o = step(m, BYTES("\x89\x03"));
    CHECK_EQ(o.vector, 14);
    CHECK_EQ(o.error, u64{2});
    CHECK_EQ(o.state.cr2, kPages + 0x1000);
    CHECK_EQ(m.get<u16>(kPages + 0xffe), 0);
    // An instruction that crosses: CR2 is where the second page starts.
    Machine code(Mode::kLong);
    code.set_page(1, 0);
    code.put<u8>(kPages + 0xfff, 0x8b);
    code.state.rip = kPages + 0xfff;
    code.start("");
    code.run(1);
    o = outcome_of(code, code.vcpu->save());
    CHECK_EQ(o.vector, 14);
    CHECK_EQ(o.error, u64{16});
    CHECK_EQ(o.state.cr2, kPages + 0x1000);
    CHECK_EQ(o.rip, kPages + 0xfff);
    // Descriptor tables are read as the supervisor whatever the CPL: a GDT in a supervisor page
    // serves ring 3, and one in an absent page is a page fault of the supervisor's (U clear).
    Machine gdt(Mode::kLong, 3);
    gdt.load(kPages,
             std::string_view(
                 reinterpret_cast<const char*>(gdt.memory.span(Gpa(kGdt), 0x400).data()), 0x400));
    gdt.set_page(0, kPages | 3);
    gdt.state.gdtr.base = kPages;
    gdt.state.gpr[kRax] = kDsUser;
    CHECK_EQ(step(gdt, BYTES("\x8e\xd8")).vector, -1);
    Machine absent(Mode::kLong, 3);
    absent.set_page(0, 0);
    absent.state.gdtr.base = kPages;
    absent.state.gpr[kRax] = kDsUser;
    absent.start(BYTES("\x8e\xd8"));
    CHECK_EQ(absent.run().reason, ExitReason::kShutdown);  // the handler's CS is in that table too
    CHECK_EQ(absent.vcpu->save().cr2, kPages + 0x18);
    // With SMAP a user-mode table is out of reach of implicit accesses, whatever AC says.
    Machine smap(Mode::kLong, 3);
    smap.put<u64>(kPd64, 0x87);
    smap.state.cr4 |= kSmap;
    smap.state.rflags |= kAcFlag;
    smap.state.gpr[kRax] = kDsUser;
    smap.start(BYTES("\x8e\xd8"));
    CHECK_EQ(smap.run().reason, ExitReason::kShutdown);
}

// Five levels: addresses of 57 bits are canonical, and translated by one more table.
void five_levels() {
    constexpr u64 kPml5 = 0x18000;
    for (bool la57 : {true, false}) {
        Machine m(Mode::kLong);
        if (la57) {
            m.put<u64>(kPml5, kPml4 | 7);
            m.put<u64>(kPml5 + 3 * 8, kPml4 | 7);
            m.state.cr3 = kPml5;
            m.state.cr4 |= bit(12);
        }
        m.put<u32>(kPages + 0x10, 0x12345678);
        m.state.gpr[kRax] = (u64{3} << 48) + kPages + 0x10;
        Outcome o = step(m, BYTES("\x8b\x18"));
        CHECK_EQ(o.vector, la57 ? -1 : 13);
        if (la57) CHECK_EQ(m.vcpu->save().gpr[kRbx], u64{0x12345678});
        // An absent fifth-level entry is a page fault, an address of 58 bits none.
        if (!la57) continue;
        m.state.gpr[kRax] = u64{5} << 48;
        o = step(m, BYTES("\x8b\x18"));
        CHECK_EQ(o.vector, 14);
        CHECK_EQ(o.state.cr2, u64{5} << 48);
        m.state.gpr[kRax] = bit(56);
        CHECK_EQ(step(m, BYTES("\x8b\x18")).vector, 13);
    }
}

// Outside long mode CR4.LA57 can be set, as one does on the way there; it means nothing yet (SDM
// 3A, 2.5), and a state with it can be saved and restored.
void five_levels_outside_long_mode() {
    Machine m(Mode::kProtected32);
    m.put<u32>(kPages + 0x10, 0x12345678);
    u64 cr4 = m.state.cr4 | bit(12);
    m.state.gpr[kRax] = cr4;
    m.state.gpr[kRsi] = kPages + 0x10;
    m.start(BYTES("\x0f\x22\xe0\x8b\x1e\xf4"));  // mov cr4, eax; mov ebx, [esi]; hlt
    CHECK_EQ(m.run().reason, ExitReason::kHalt);
    CpuState state = m.vcpu->save();
    CHECK_EQ(state.cr4, cr4);
    CHECK(state.cr0 & bit(31));
    CHECK_EQ(state.gpr[kRbx], u64{0x12345678});
    validate(state);
    m.vcpu->restore(state);
    CHECK(m.vcpu->save() == state);
}

// --- Against a model, through the soft TLB -------------------------------------------------------

struct Model {
    bool wp, smap;
    u64 entry[4];

    /// Error code or -1.
    int check(unsigned page, bool write, bool user, bool ac) const {
        u64 e = entry[page];
        int base = (write ? 2 : 0) | (user ? 4 : 0);
        if (!(e & 1)) return base;
        bool is_user = e & 4, writable = e & 2;
        if (user) return is_user && (writable || !write) ? -1 : base | 1;
        if (smap && is_user && !ac) return base | 1;
        return !write || writable || !wp ? -1 : base | 1;
    }
};

// Each round: perhaps change a page (with INVLPG, or all by MOV CR3), perhaps WP, SMAP, AC or the
// CPL, then one access. The state is edited through save()/restore() only where the guest itself
// could not do it in one instruction; restore() flushes, so most rounds avoid it.
PV_GUEST(touch_pages, R"(
    # rsi: commands of 8 bytes: op, page, value...; one at a time until op 0
1:  movzbl (%rsi), %eax
    movzbl 1(%rsi), %ebx
    add $8, %rsi
    shl $12, %ebx
    lea 0x200020(%rbx), %rbx
    cmp $1, %al
    je 2f
    cmp $2, %al
    je 3f
    cmp $3, %al
    je 4f
    cmp $4, %al
    je 5f
    cmp $5, %al
    je 6f
    cmp $6, %al
    je 7f
    cmp $7, %al
    je 8f
    hlt
2:  mov (%rbx), %ecx
    jmp 1b
3:  mov %ecx, (%rbx)
    jmp 1b
4:  mov -4(%rsi), %ecx        # new entry of a page: low bits; then INVLPG
    mov %ebx, %edx
    shr $12, %edx
    sub $0x200, %edx
    shl $3, %edx
    mov %ebx, %edi
    and $~0xfff, %edi
    or %ecx, %edi
    mov %rdi, 0x13000(%rdx)
    invlpg (%rbx)
    jmp 1b
5:  stac
    jmp 1b
6:  clac
    jmp 1b
7:  mov %cr0, %rax
    xor $0x10000, %rax
    mov %rax, %cr0
    jmp 1b
8:  mov %cr4, %rax
    xor $0x200000, %rax
    mov %rax, %cr4
    jmp 1b
)")

// #PF skips the two-byte MOV and notes the error code at (r8).
PV_GUEST(page_fault_handler, R"(
    xchg %rax, (%rsp)
    mov %al, (%r8)
    add $1, %r8
    mov 8(%rsp), %rax
    add $2, %rax
    mov %rax, 8(%rsp)
    pop %rax
    iretq
)")

void random_sequences() {
    std::random_device entropy;
    u64 seed =
        std::getenv("PV_SEED") ? std::strtoull(std::getenv("PV_SEED"), nullptr, 0) : entropy();
    std::mt19937_64 random(seed);
    constexpr u64 kCommands = 0x600000, kErrors = 0x700000;
    for (int round = 0; round < 40; ++round) {
        Machine m(Mode::kLong);
        m.put<u64>(kPd64, 0x83);
        m.put<u64>(kPd64 + 3 * 8, 0x600083);
        m.load(kFaultHandler, page_fault_handler());
        m.set_gate(14, gate(kCs64, static_cast<u32>(kFaultHandler), 14));
        Model model{true, false, {}};
        for (u64 n = 0; n < 4; ++n) {
            model.entry[n] = random() & 7;
            m.set_page(static_cast<unsigned>(n), (kPages + n * 4096) | model.entry[n]);
        }
        bool ac = false;
        std::vector<int> want;
        u64 at = kCommands;
        constexpr int kSteps = 400;
        for (int n = 0; n < kSteps; ++n, at += 8) {
            unsigned op = 1 + static_cast<unsigned>(random() % 20);
            unsigned page = random() % 4;
            u32 value = 0;
            if (op > 7) op = 1 + (op & 1);
            switch (op) {
                case 1:
                case 2:
                    if (int error = model.check(page, op == 2, false, ac); error >= 0) {
                        want.push_back(error);
                    }
                    break;
                case 3:
                    model.entry[page] = random() & 7;
                    value = static_cast<u32>(model.entry[page]);
                    break;
                case 4:
                    ac = true;
                    break;
                case 5:
                    ac = false;
                    break;
                case 6:
                    model.wp = !model.wp;
                    break;
                case 7:
                    model.smap = !model.smap;
                    break;
            }
            m.put<u8>(at, static_cast<u8>(op));
            m.put<u8>(at + 1, static_cast<u8>(page));
            m.put<u32>(at + 4, value);
        }
        m.put<u8>(at, 0);
        m.state.gpr[kRsi] = kCommands;
        m.state.gpr[8] = kErrors;
        m.start(touch_pages());
        CHECK_EQ(m.run().reason, ExitReason::kHalt);
        u64 count = m.vcpu->save().gpr[8] - kErrors;
        CHECK_EQ(count, u64{want.size()});
        for (u64 n = 0; n < want.size() && n < count; ++n) {
            if (int got = m.get<u8>(kErrors + n); got != want[n]) {
                CHECK_EQ(got, want[n]);
                std::fprintf(stderr, "  ... PV_SEED=%llu round %d access %llu\n",
                             static_cast<unsigned long long>(seed), round,
                             static_cast<unsigned long long>(n));
                return;
            }
        }
    }
}

}  // namespace

int main() {
    permissions();
    crossing();
    five_levels();
    five_levels_outside_long_mode();
    random_sequences();
    return finish("test_system_paging");
}
