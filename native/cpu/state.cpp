#include "cpu/state.hpp"

#include <string>

#include "base/error.hpp"

namespace polyvisor {
namespace {

[[noreturn]] void bad(const char* field, const std::string& why) {
    throw StateError(field, std::string("CPU state: ") + field + " " + why + ".");
}

void check(bool good, const char* field, const char* why) {
    if (!good) bad(field, why);
}

bool canonical(u64 address, bool la57) {
    return static_cast<u64>(sign_extend(address, la57 ? 57 : 48)) == address;
}

constexpr u64 kCr0Bits = 0xe005003f;
constexpr u64 kRflagsBits = 0x3f7fd7;

}  // namespace

CpuState reset_state(bool bootstrap) {
    CpuState s;
    for (Segment& segment : s.segments) segment = {0, 0xffff, 0x93, 0};
    s.segments[kCs] = {0xffff'0000, 0xffff, 0x9b, 0xf000};
    s.ldtr = {0, 0xffff, 0x82, 0};
    s.tr = {0, 0xffff, 0x8b, 0};
    s.gpr[kRdx] = 0x600;  // family 6
    // FXSAVE image after reset: FCW 0x40 per SDM 3A table 9-1, as RESET (not FNINIT) leaves it.
    s.fpu.legacy[0] = 0x40;
    s.fpu.legacy[4] = 0xff;  // every x87 register valid (+0.0)
    s.fpu.legacy[24] = 0x80;
    s.fpu.legacy[25] = 0x1f;
    s.activity = bootstrap ? Activity::kRunning : Activity::kWaitForSipi;
    return s;
}

void validate(const CpuState& s) {
    const u64 cr0 = s.cr0, cr4 = s.cr4, efer = s.msr.efer;
    const bool pe = cr0 & bit(0), pg = cr0 & bit(31);
    const bool lme = efer & bit(8), lma = efer & bit(10);
    const bool la57 = cr4 & bit(12);
    const bool vm86 = s.rflags & bit(17);

    check(!(cr0 & ~kCr0Bits), "cr0", "has reserved bits set");
    check(!pg || pe, "cr0", "enables paging (PG) without protection (PE)");
    check(!(cr0 & bit(29)) || (cr0 & bit(30)), "cr0", "has NW set with CD clear");
    check(!(cr4 >> 32), "cr4", "has reserved bits set");
    check(!(efer & ~u64{0x20fd01}), "msr.efer", "has reserved bits set");
    check(lma == (lme && pg), "msr.efer", "has LMA different from LME and CR0.PG");
    check(!lma || (cr4 & bit(5)), "cr4", "is in long mode without PAE");
    check(!la57 || lma || !pg, "cr4", "has LA57 set with paging outside long mode");
    check(!(cr4 & bit(17)) || lma, "cr4", "has PCIDE set outside long mode");
    check(!(s.cr3 >> 52), "cr3", "has bits above 51 set");

    check(s.rflags & 2, "rflags", "has bit 1 clear");
    check(!(s.rflags & ~kRflagsBits), "rflags", "has reserved bits set");
    check(!vm86 || (pe && !lma), "rflags", "has VM set outside protected mode");

    const Segment& cs = s.segments[kCs];
    bool long64 = lma && cs.l();
    check(!(long64 && cs.db()), "segments.cs", "has both L and D set");
    check(long64 ? canonical(s.rip, la57) : !(s.rip >> 32), "rip",
          "is not a valid address in the current mode");
    if (pe && !vm86) {
        check(!cs.unusable() && cs.s() && (cs.type() & 8 || cs.type() == 3), "segments.cs",
              "is not a code segment");
        check(cs.present(), "segments.cs", "is not present");
        const Segment& ss = s.segments[kSs];
        check(ss.unusable() || (ss.s() && ((ss.type() & 0xa) == 2)), "segments.ss",
              "is not a writable data segment");
    }
    static const char* const kNames[] = {"segments.es", "segments.cs", "segments.ss",
                                         "segments.ds", "segments.fs", "segments.gs"};
    for (int n = 0; n < kSegmentCount; ++n) {
        const Segment& segment = s.segments[n];
        check(!(segment.attributes & ~u32{0x1f0ff}), kNames[n], "has reserved attribute bits set");
        bool wide = lma && (n == kFs || n == kGs);
        check(wide ? canonical(segment.base, la57) : segment.unusable() || !(segment.base >> 32),
              kNames[n], "has a base outside its range");
        if (vm86) {
            check(segment.base == u64{segment.selector} << 4 && segment.limit == 0xffff, kNames[n],
                  "does not follow its selector in virtual-8086 mode");
        }
    }
    check(!(s.tr.attributes & ~u32{0x1f0ff}), "tr", "has reserved attribute bits set");
    check(!(s.ldtr.attributes & ~u32{0x1f0ff}), "ldtr", "has reserved attribute bits set");
    check(canonical(s.tr.base, la57), "tr", "has a non-canonical base");
    check(canonical(s.ldtr.base, la57) || s.ldtr.unusable(), "ldtr", "has a non-canonical base");
    check(canonical(s.gdtr.base, la57), "gdtr", "has a non-canonical base");
    check(canonical(s.idtr.base, la57), "idtr", "has a non-canonical base");

    check(!(s.dr6 >> 32), "dr6", "has bits above 31 set");
    check(!(s.dr7 >> 32), "dr7", "has bits above 31 set");
    check((s.xcr0 & 1) && !(s.xcr0 & ~u64{0x7}) && (!(s.xcr0 & 4) || (s.xcr0 & 2)), "xcr0",
          "selects state components that do not exist or depend on missing ones");
    check(canonical(s.msr.lstar, la57), "msr.lstar", "is not canonical");
    check(canonical(s.msr.cstar, la57), "msr.cstar", "is not canonical");
    check(canonical(s.msr.kernel_gs_base, la57), "msr.kernel_gs_base", "is not canonical");
    check(canonical(s.msr.sysenter_eip, la57), "msr.sysenter_eip", "is not canonical");
    check(canonical(s.msr.sysenter_esp, la57), "msr.sysenter_esp", "is not canonical");
    for (int n = 0; n < 8; ++n) {
        u64 type = bits(s.msr.pat, n * 8 + 7, n * 8);
        check(type <= 7 && type != 2 && type != 3, "msr.pat", "has an undefined memory type");
    }
    check(!(bits(s.fpu.legacy[26] | u64{s.fpu.legacy[27]} << 8, 15, 0)), "fpu",
          "has reserved MXCSR bits set");
    check(s.activity <= Activity::kShutdown, "activity", "is not a known value");
}

}  // namespace polyvisor
