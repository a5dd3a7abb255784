// Which exception an instruction raises in which mode: vector, error code, pushed frame, CR2. One
// row per case.
#include "system_machine.hpp"

using namespace pvtest;

namespace {

constexpr int kNone = -1;
constexpr int kNoError = -1;
constexpr u64 kIopl3 = 3 << 12;

using Setup = std::function<void(Machine&)>;

struct Case {
    const char* name;
    std::string_view code;
    int vector;
    int error = kNoError;
    Setup setup = {};
    bool after = false;  ///< the pushed RIP is the next instruction's
};

#define BYTES(text) std::string_view(text, sizeof(text) - 1)

void check_cases(Mode mode, unsigned cpl, std::initializer_list<Case> cases) {
    for (const Case& c : cases) {
        Machine m(mode, cpl);
        if (c.setup) c.setup(m);
        const u64 start = m.state.rip;
        const CpuState before = m.state;
        Outcome o = step(m, c.code);
        int before_failures = failures;
        CHECK_EQ(o.vector, c.vector);
        if (o.vector == c.vector && c.vector != kNone) {
            if (mode != Mode::kReal) {
                CHECK_EQ(o.has_error, c.error != kNoError);
                if (c.error != kNoError) CHECK_EQ(o.error, static_cast<u64>(c.error));
            }
            CHECK_EQ(o.rip, start + (c.after ? c.code.size() : 0));
            CHECK_EQ(o.cs, u64{before.segments[kCs].selector});
            // RF is set in the image of a fault, but for #DB; real mode pushes 16 bits.
            bool fault = !c.after && c.vector != 1 && mode != Mode::kReal;
            CHECK_EQ(o.rflags, (before.rflags & (mode == Mode::kReal ? 0xffff : ~u64{0})) |
                                   (fault ? bit(16) : 0));
            CHECK(!(o.state.rflags & (bit(9) | bit(8) | bit(14) | bit(17))));  // IF TF NT VM
            if (mode != Mode::kReal && (mode == Mode::kLong || cpl == 3)) {
                CHECK_EQ(o.rsp, before.gpr[kRsp]);
                CHECK_EQ(o.ss, u64{before.segments[kSs].selector});
            }
        }
        if (failures != before_failures) {
            std::fprintf(stderr, "  ... %s, CPL %u: %s (vector %d error %#llx)\n", name_of(mode),
                         cpl, c.name, o.vector, static_cast<unsigned long long>(o.error));
        }
    }
}

auto set_reg(unsigned n, u64 value) {
    return [=](Machine& m) { m.state.gpr[n] = value; };
}
auto set_cr0(u64 on, u64 off = 0) {
    return [=](Machine& m) { m.state.cr0 = (m.state.cr0 | on) & ~off; };
}
auto set_cr4(u64 on) {
    return [=](Machine& m) { m.state.cr4 |= on; };
}
auto set_flags(u64 on) {
    return [=](Machine& m) { m.state.rflags |= on; };
}
auto both(Setup a, Setup b) {
    return [=](Machine& m) { a(m), b(m); };
}

// What every protected mode has in common, at CPL 0 and at CPL 3.
void common_cases(Mode mode, unsigned cpl) {
    const bool user = cpl == 3;
    check_cases(
        mode, cpl,
        {
            {"ud2", BYTES("\x0f\x0b"), 6},
            {"int3", BYTES("\xcc"), user ? 13 : 3, user ? 3 * 8 + 2 : kNoError, {}, !user},
            {"int1", BYTES("\xf1"), 1, kNoError, {}, true},
            {"int 0x80 (DPL 3)", BYTES("\xcd\x80"), 0x80, kNoError, {}, true},
            {"int 0x40 (DPL 0)",
             BYTES("\xcd\x40"),
             user ? 13 : 0x40,
             user ? 0x202 : kNoError,
             {},
             !user},
            {"int with an absent gate", BYTES("\xcd\x41"), 11, 0x41 * 8 + 2,
             [](Machine& m) {
                 m.set_gate(0x41,
                            gate(m.handler_cs(), static_cast<u32>(kHandlers), 14, 3, 0, false));
             }},
            {"int with a wrong gate type", BYTES("\xcd\x41"), 13, 0x41 * 8 + 2,
             [](Machine& m) { m.set_gate(0x41, gate(m.handler_cs(), 0, 2, 3)); }},
            {"int to a null selector", BYTES("\xcd\x41"), 13, 0,
             [](Machine& m) { m.set_gate(0x41, gate(0, 0, 14, 3)); }},
            {"int to a data segment", BYTES("\xcd\x41"), 13, kDs32,
             [](Machine& m) { m.set_gate(0x41, gate(kDs32, 0, 14, 3)); }},
            {"div by zero", BYTES("\xf7\xf1"), 0, kNoError, set_reg(kRcx, 0)},
            {"cli", BYTES("\xfa"), user ? 13 : kNone, user ? 0 : kNoError},
            {"hlt", BYTES("\xf4"), user ? 13 : kNone, user ? 0 : kNoError},
            {"mov cr0", BYTES("\x0f\x22\xc0"), user ? 13 : kNone, user ? 0 : kNoError,
             [](Machine& m) { m.state.gpr[kRax] = m.state.cr0; }},
            {"mov from cr3", BYTES("\x0f\x20\xd8"), user ? 13 : kNone, user ? 0 : kNoError},
            {"mov cr1", BYTES("\x0f\x20\xc8"), 6},
            {"mov dr0", BYTES("\x0f\x23\xc0"), user ? 13 : kNone, user ? 0 : kNoError},
            {"mov dr4 with DE", BYTES("\x0f\x21\xe0"), user ? 13 : 6, user ? 0 : kNoError,
             set_cr4(8)},
            {"clts", BYTES("\x0f\x06"), user ? 13 : kNone, user ? 0 : kNoError},
            {"lmsw", BYTES("\x0f\x01\xf0"), user ? 13 : kNone, user ? 0 : kNoError},
            {"invlpg", BYTES("\x0f\x01\x38"), user ? 13 : kNone, user ? 0 : kNoError},
            {"wbinvd", BYTES("\x0f\x09"), user ? 13 : kNone, user ? 0 : kNoError},
            {"rdmsr", BYTES("\x0f\x32"), user ? 13 : kNone, user ? 0 : kNoError,
             set_reg(kRcx, 0x10)},
            {"rdmsr of nothing", BYTES("\x0f\x32"), 13, 0, set_reg(kRcx, 0x12345678)},
            {"wrmsr EFER reserved", BYTES("\x0f\x30"), 13, 0,
             both(set_reg(kRcx, 0xc0000080), set_reg(kRdx, 1))},
            {"wrmsr LME with paging", BYTES("\x0f\x30"), 13, 0,
             [](Machine& m) {
                 m.state.gpr[kRcx] = 0xc0000080;
                 m.state.gpr[kRax] = m.state.msr.efer ^ 0x100;
             }},
            {"lgdt", BYTES("\x0f\x01\x10"), user ? 13 : kNone, user ? 0 : kNoError,
             set_reg(kRax, kData)},
            {"sgdt without UMIP", BYTES("\x0f\x01\x00"), kNone, kNoError, set_reg(kRax, kData)},
            {"sgdt with UMIP", BYTES("\x0f\x01\x00"), user ? 13 : kNone, user ? 0 : kNoError,
             both(set_reg(kRax, kData), set_cr4(bit(11)))},
            {"smsw with UMIP", BYTES("\x0f\x01\xe0"), user ? 13 : kNone, user ? 0 : kNoError,
             set_cr4(bit(11))},
            {"rdtsc with TSD", BYTES("\x0f\x31"), user ? 13 : kNone, user ? 0 : kNoError,
             set_cr4(4)},
            {"rdpmc", BYTES("\x0f\x33"), 13, 0},
            {"in without IOPL", BYTES("\xec"), user ? 13 : kNone, user ? 0 : kNoError},
            {"in with IOPL", BYTES("\xec"), kNone, kNoError, set_flags(kIopl3)},
            {"in, allowed by the bitmap", BYTES("\xec"), kNone, kNoError,
             [](Machine& m) {
                 m.put<u8>(kTss + 0xa8 + 0x3f8 / 8, 0xfe);
                 m.state.gpr[kRdx] = 0x3f8;
             }},
            {"in, 2 ports of which 1 is allowed", BYTES("\x66\xed"), user ? 13 : kNone,
             user ? 0 : kNoError,
             [](Machine& m) {
                 m.put<u8>(kTss + 0xa8 + 0x3f8 / 8, 0xfe);
                 m.state.gpr[kRdx] = 0x3f8;
             }},
            {"in beyond the bitmap", BYTES("\xec"), user ? 13 : kNone, user ? 0 : kNoError,
             [](Machine& m) {
                 m.state.tr.limit = 0xa8;
                 m.state.gpr[kRdx] = 0x100;
             }},
            {"ds = beyond the GDT", BYTES("\x8e\xd8"), 13, kBeyond, set_reg(kRax, kBeyond)},
            {"ds = beyond the LDT", BYTES("\x8e\xd8"), 13, 0x104, set_reg(kRax, 0x107)},
            {"ds = absent", BYTES("\x8e\xd8"), user ? 13 : 11, kAbsentData,
             set_reg(kRax, kAbsentData)},
            {"ds = a TSS", BYTES("\x8e\xd8"), 13, kTr, set_reg(kRax, kTr)},
            {"ds = execute-only code", BYTES("\x8e\xd8"), 13, kExecuteOnly,
             set_reg(kRax, kExecuteOnly)},
            {"ds = conforming code", BYTES("\x8e\xd8"), kNone, kNoError,
             set_reg(kRax, kConforming)},
            {"ds = ring 0 data", BYTES("\x8e\xd8"), user ? 13 : kNone, user ? kDs32 : kNoError,
             set_reg(kRax, kDs32)},
            {"ds = ring 0 data with RPL 3", BYTES("\x8e\xd8"), 13, kDs32, set_reg(kRax, kDs32 | 3)},
            {"ds = null", BYTES("\x8e\xd8"), kNone, kNoError, set_reg(kRax, 3)},
            {"mov cs", BYTES("\x8e\xc8"), 6},
            {"mov sreg 6", BYTES("\x8e\xf0"), 6},
            {"ss = wrong RPL", BYTES("\x8e\xd0"), 13, user ? kDs32 : kDsUser & 0xfffc,
             set_reg(kRax, user ? kDs32 : kDsUser)},
            {"ss = read-only", BYTES("\x8e\xd0"), 13, kReadOnly, set_reg(kRax, kReadOnly | cpl)},
            {"ss = absent", BYTES("\x8e\xd0"), user ? 13 : 12, kAbsentStack,
             set_reg(kRax, kAbsentStack | cpl)},
            {"lldt of a data segment", BYTES("\x0f\x00\xd0"), 13, user ? 0 : kDs32,
             set_reg(kRax, kDs32)},
            {"ltr of a busy TSS", BYTES("\x0f\x00\xd8"), 13, user ? 0 : kTr, set_reg(kRax, kTr)},
            {"ltr null", BYTES("\x0f\x00\xd8"), 13, 0, set_reg(kRax, 0)},
            {"fld with TS", BYTES("\xd9\x00"), 7, kNoError, set_cr0(8)},
            {"fld with EM", BYTES("\xd9\x00"), 7, kNoError, set_cr0(4)},
            {"sse with EM", BYTES("\x0f\x58\xc0"), 6, kNoError, set_cr0(4)},
            {"sse with TS", BYTES("\x0f\x58\xc0"), 7, kNoError, set_cr0(8)},
            {"sse without OSFXSR", BYTES("\x0f\x58\xc0"), 6, kNoError,
             [](Machine& m) { m.state.cr4 &= ~bit(9); }},
            {"avx without OSXSAVE", BYTES("\xc5\xf8\x58\xc0"), 6},
            {"xgetbv without OSXSAVE", BYTES("\x0f\x01\xd0"), 6},
            {"rsm", BYTES("\x0f\xaa"), 6},
            {"lock nop", BYTES("\xf0\x90"), 6},
            {"sysret", BYTES("\x0f\x07"), mode == Mode::kLong || !user ? (user ? 13 : kNone) : 13,
             user ? 0 : kNoError, [](Machine& m) { m.state.msr.efer |= 1; }},
            {"syscall without SCE", BYTES("\x0f\x05"), 6, kNoError,
             [](Machine& m) { m.state.msr.efer &= ~u64{1}; }},
            {"cr4 reserved bit", BYTES("\x0f\x22\xe0"), 13, 0, set_reg(kRax, bit(15))},
            {"cr0 PG without PE", BYTES("\x0f\x22\xc0"), 13, 0, set_reg(kRax, bit(31))},
            {"cr0 NW without CD", BYTES("\x0f\x22\xc0"), 13, 0, set_reg(kRax, 0xa0000001)},
            {"general detect", BYTES("\x0f\x21\xc0"), user ? 13 : 1, user ? 0 : kNoError,
             [](Machine& m) { m.state.dr7 |= bit(13); }},
        });
}

void long_cases() {
    check_cases(
        Mode::kLong, 0,
        {
            {"non-canonical load", BYTES("\x8a\x00"), 13, 0, set_reg(kRax, bit(47))},
            {"non-canonical stack", BYTES("\x8a\x45\x00"), 12, 0, set_reg(kRbp, bit(47))},
            {"push to a non-canonical stack", BYTES("\x50"), 12, 0,
             [](Machine& m) {
                 m.set_gate(12, gate(kCs64, static_cast<u32>(kHandlers + 12 * 16), 14, 0, 1));
                 m.state.gpr[kRsp] = bit(47) + 16;
             }},
            {"into", BYTES("\xce"), 6},
            {"push es", BYTES("\x06"), 6},
            {"far jump immediate", BYTES("\xea\0\0\0\0\0\0"), 6},
            {"ss = null", BYTES("\x8e\xd0"), kNone, kNoError, set_reg(kRax, 0)},
            {"ss = null with RPL 3", BYTES("\x8e\xd0"), 13, 0, set_reg(kRax, 3)},
            {"cr4 without PAE", BYTES("\x0f\x22\xe0"), 13, 0, set_reg(kRax, 0x610)},
            {"cr4 LA57", BYTES("\x0f\x22\xe0"), 13, 0, set_reg(kRax, 0x1630)},
            {"cr0 without PG", BYTES("\x0f\x22\xc0"), 13, 0, set_reg(kRax, 1)},
            {"cr0 high bits", BYTES("\x0f\x22\xc0"), 13, 0, set_reg(kRax, bit(32) | 0x80010011)},
            {"cr3 beyond MAXPHYADDR", BYTES("\x0f\x22\xd8"), 13, 0, set_reg(kRax, bit(45))},
            {"cr4 PCIDE with a PCID in CR3", BYTES("\x0f\x22\xe0"), 13, 0,
             [](Machine& m) {
                 m.state.cr3 |= 0x18;
                 m.state.gpr[kRax] = 0x20630;
             }},
            {"cr8 reserved", BYTES("\x44\x0f\x22\xc0"), 13, 0, set_reg(kRax, 16)},
            {"dr6 high bits", BYTES("\x0f\x23\xf0"), 13, 0, set_reg(kRax, bit(32))},
            {"dr7 high bits", BYTES("\x0f\x23\xf8"), 13, 0, set_reg(kRax, bit(32))},
            {"lstar non-canonical", BYTES("\x0f\x30"), 13, 0,
             both(set_reg(kRcx, 0xc0000082), set_reg(kRdx, bit(16)))},
            {"pat with a reserved type", BYTES("\x0f\x30"), 13, 0,
             both(set_reg(kRcx, 0x277), set_reg(kRax, 2))},
            {"wrfsbase non-canonical", BYTES("\xf3\x48\x0f\xae\xd0"), 13, 0,
             both(set_reg(kRax, bit(47)), set_cr4(bit(16)))},
            {"wrfsbase without FSGSBASE", BYTES("\xf3\x48\x0f\xae\xd0"), 6},
            {"xsetbv of AVX without SSE", BYTES("\x0f\x01\xd1"), 13, 0,
             both(set_cr4(bit(18)), set_reg(kRax, 5))},
            {"invpcid type 4", BYTES("\x66\x0f\x38\x82\x01"), 13, 0,
             both(set_reg(kRax, 4), set_reg(kRcx, kData))},
            {"iret with NT", BYTES("\x48\xcf"), 13, 0, set_flags(bit(14))},
            {"int to 32-bit code", BYTES("\xcd\x41"), 13, kCs32,
             [](Machine& m) { m.set_gate(0x41, gate(kCs32, 0, 14)); }},
            {"int through a task gate", BYTES("\xcd\x41"), 13, 0x41 * 8 + 2,
             [](Machine& m) { m.set_gate(0x41, gate(kTr2, 0, 5)); }},
            {"jmp to a TSS", BYTES("\xff\x28"), 13, kTr2,
             [](Machine& m) {
                 m.state.gpr[kRax] = kData;
                 m.put<u16>(kData + 4, kTr2);
             }},
            {"aligned SSE", BYTES("\x0f\x28\x00"), 13, 0, set_reg(kRax, kData + 8)},
            {"stac", BYTES("\x0f\x01\xcb"), kNone},
        });
    check_cases(Mode::kLong, 3,
                {
                    {"stac", BYTES("\x0f\x01\xcb"), 6},
                    {"swapgs", BYTES("\x0f\x01\xf8"), 13, 0},
                    {"ss = null", BYTES("\x8e\xd0"), 13, 0, set_reg(kRax, 3)},
                    {"alignment", BYTES("\x8b\x00"), 17, 0,
                     both(set_reg(kRax, kData + 1), both(set_cr0(bit(18)), set_flags(bit(18))))},
                    {"alignment without AC", BYTES("\x8b\x00"), kNone, kNoError,
                     both(set_reg(kRax, kData + 1), set_cr0(bit(18)))},
                });
}

void legacy_cases() {
    for (unsigned cpl : {0u, 3u}) {
        check_cases(
            Mode::kProtected32, cpl,
            {
                {"load beyond a small segment", BYTES("\x8b\x40\x0d"), 13, 0,
                 [](Machine& m) { m.state.segments[kDs].limit = 15; }},
                {"the last dword", BYTES("\x8b\x40\x0c"), kNone, kNoError,
                 [](Machine& m) { m.state.segments[kDs].limit = 15; }},
                {"store to a read-only segment", BYTES("\x89\x00"), 13, 0,
                 [](Machine& m) { m.state.segments[kDs].attributes = 0xc0f1; }},
                {"load through null", BYTES("\x8b\x00"), 13, 0,
                 [](Machine& m) { m.state.segments[kDs] = {0, 0, 1 << 16, 0}; }},
                {"below an expand-down limit", BYTES("\x8b\x40\x00"), 13, 0,
                 [](Machine& m) { m.state.segments[kDs] = {0, 0xfff, 0x40f7, kDsUser}; }},
                {"above an expand-down limit", BYTES("\x8b\x80\x00\x10\x00\x00"), kNone, kNoError,
                 [](Machine& m) { m.state.segments[kDs] = {0, 0xfff, 0x40f7, kDsUser}; }},
                {"into", BYTES("\xce"), cpl ? 13 : 4, cpl ? 4 * 8 + 2 : kNoError,
                 set_flags(bit(11)), cpl == 0},
                {"into without OF", BYTES("\xce"), kNone},
                {"bound", BYTES("\x62\x08"), 5, kNoError,
                 both(set_reg(kRax, kData), set_reg(kRcx, 7))},
                {"far jump to null", BYTES("\xea\0\0\0\0\0\0"), 13, 0},
                {"far jump to data", BYTES("\xea\0\0\0\0\x10\0"), 13, kDs32},
                {"far jump to absent code", BYTES("\xea\0\0\0\0\x70\0"), cpl ? 13 : 11,
                 kAbsentCode},
                {"far jump to conforming code", BYTES("\xea\0\x80\0\0\x68\0"), kNone},
                {"far jump to ring 3 code", BYTES("\xea\0\x80\0\0\x23\0"), cpl ? kNone : 13,
                 cpl ? kNoError : 0x20},
            });
    }
    check_cases(Mode::kProtected32, 3,
                {{"push beyond the stack", BYTES("\x50"), 12, 0,
                  [](Machine& m) { m.state.segments[kSs].limit = 0xfff; }}});
    check_cases(Mode::kCompat, 0,
                {
                    {"far jump to a TSS", BYTES("\xea\0\0\0\0\xa8\0"), 13, kTr2},
                    {"lds null", BYTES("\xc5\x08"), kNone, kNoError, set_reg(kRax, kData)},
                });
}

void real_cases() {
    check_cases(
        Mode::kReal, 0,
        {
            {"ud2", BYTES("\x0f\x0b"), 6},
            {"int 0x21", BYTES("\xcd\x21"), 0x21, kNoError, {}, true},
            {"int 0x21 with IF", BYTES("\xcd\x21"), 0x21, kNoError, set_flags(bit(9)), true},
            {"int3", BYTES("\xcc"), 3, kNoError, {}, true},
            {"div by zero", BYTES("\xf7\xf1"), 0, kNoError, set_reg(kRcx, 0)},
            {"word at the segment's end", BYTES("\x8b\x07"), 13, kNoError, set_reg(kRbx, 0xffff)},
            {"stack word at the segment's end", BYTES("\x8b\x46\x00"), 12, kNoError,
             set_reg(kRbp, 0xffff)},
            {"lldt", BYTES("\x0f\x00\xd0"), 6},
            {"arpl", BYTES("\x63\xc0"), 6},
            {"cli", BYTES("\xfa"), kNone},
            {"mov cr0", BYTES("\x0f\x22\xc0"), kNone},
            {"avx", BYTES("\xc5\xf8\x58\xc0"), 6, kNoError, set_cr4(bit(18))},
            {"wrmsr", BYTES("\x0f\x30"), kNone, kNoError, set_reg(kRcx, 0x277)},
        });
}

void vm86_cases() {
    check_cases(
        Mode::kVm86, 3,
        {
            {"cli, IOPL 0", BYTES("\xfa"), 13, 0},
            {"cli, IOPL 3", BYTES("\xfa"), kNone, kNoError, set_flags(kIopl3)},
            {"sti with VME", BYTES("\xfb"), kNone, kNoError, set_cr4(1)},
            {"sti with VME and VIP", BYTES("\xfb"), 13, 0, both(set_cr4(1), set_flags(bit(20)))},
            {"pushf, IOPL 0", BYTES("\x9c"), 13, 0},
            {"pushf with VME", BYTES("\x9c"), kNone, kNoError, set_cr4(1)},
            {"pushfd with VME", BYTES("\x66\x9c"), 13, 0, set_cr4(1)},
            {"popf, IOPL 0", BYTES("\x9d"), 13, 0},
            {"iret, IOPL 0", BYTES("\xcf"), 13, 0},
            {"int 0x21, IOPL 0", BYTES("\xcd\x21"), 13, 0},
            {"int 0x21, IOPL 3, DPL 0", BYTES("\xcd\x21"), 13, 0x21 * 8 + 2, set_flags(kIopl3)},
            {"int 0x80, IOPL 3", BYTES("\xcd\x80"), 0x80, kNoError, set_flags(kIopl3), true},
            {"int 0x80, not redirected by VME", BYTES("\xcd\x80"), 0x80, kNoError,
             both(set_flags(kIopl3),
                  both(set_cr4(1), [](Machine& m) { m.put<u8>(kTss + 0x88 + 0x10, 1); })),
             true},
            {"in", BYTES("\xec"), 13, 0, set_flags(kIopl3)},
            {"hlt", BYTES("\xf4"), 13, 0},
            {"lgdt", BYTES("\x0f\x01\x10"), 13, 0},
            {"lldt", BYTES("\x0f\x00\xd0"), 6},
            {"arpl", BYTES("\x63\xc0"), 6},
            {"sysenter with no CS", BYTES("\x0f\x34"), 13, 0},
            {"word at the segment's end", BYTES("\x8b\x07"), 13, 0, set_reg(kRbx, 0xffff)},
            {"mov ds", BYTES("\x8e\xd8"), kNone, kNoError, set_reg(kRax, 0x1234)},
        });
}

}  // namespace

int main() {
    for (unsigned cpl : {0u, 3u}) {
        common_cases(Mode::kLong, cpl);
        common_cases(Mode::kProtected32, cpl);
        common_cases(Mode::kCompat, cpl);
    }
    long_cases();
    legacy_cases();
    real_cases();
    vm86_cases();
    return finish("test_system_exceptions");
}
