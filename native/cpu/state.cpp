#include "cpu/state.hpp"

#include <string>

#include "base/error.hpp"
#include "cpu/cpuid.hpp"

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

// SDM 3A, table 12-2: what MTRRs and the PAT may say.
bool memory_type(u64 type) {
    return type <= 1 || (type >= 4 && type <= 6);
}

void check_memory_types(const MsrState& msr) {
    for (int n = 0; n < 8; ++n) {
        u64 type = bits(msr.pat, n * 8 + 7, n * 8);
        check(memory_type(type) || type == 7, "msr.pat", "has an undefined memory type");
    }
    check(!(msr.mtrr_def_type & ~u64{0xcff}), "msr.mtrr_def_type", "has reserved bits set");
    check(memory_type(msr.mtrr_def_type & 0xff), "msr.mtrr_def_type",
          "has an undefined memory type");
    for (u64 ranges : msr.mtrr_fixed) {
        for (int n = 0; n < 8; ++n) {
            check(memory_type(bits(ranges, n * 8 + 7, n * 8)), "msr.mtrr_fixed",
                  "has an undefined memory type");
        }
    }
    for (std::size_t n = 0; n < msr.mtrr_variable.size(); n += 2) {
        const u64 base = msr.mtrr_variable[n], mask = msr.mtrr_variable[n + 1];
        check(!(base & 0xf00) && !(mask & 0x7ff) && !(base >> 52) && !(mask >> 52),
              "msr.mtrr_variable", "has reserved bits set");
        check(memory_type(base & 0xff), "msr.mtrr_variable", "has an undefined memory type");
    }
}

// Exceptions that push an error code, outside real mode (SDM 3A, 6.13; APM 2, 8.2).
constexpr u32 kErrorCodeVectors = 0x60227d00;

void check_event(const CpuState& s) {
    using Kind = InFlightEvent::Kind;
    const InFlightEvent& event = s.event;
    const bool exception = event.kind == Kind::kException;
    const bool software =
        event.kind == Kind::kSoftwareInterrupt || event.kind == Kind::kSoftwareException;
    check(event.kind <= Kind::kSoftwareException, "event", "is of no known kind");
    check(event.kind != Kind::kNmi || event.vector == 2, "event",
          "is a non-maskable interrupt with another vector than 2");
    check(!exception || (event.vector < 32 && event.vector != 2), "event",
          "is an exception with a vector that no exception has");
    check(event.kind != Kind::kSoftwareException || event.vector == 3 || event.vector == 4, "event",
          "is a software exception other than #BP and #OF");
    check(software ? event.length >= 1 && event.length <= 15 : event.length == 0, "event",
          "has a length that its instruction cannot have");
    const bool pushes = exception && (s.cr0 & bit(0)) && (kErrorCodeVectors >> event.vector & 1);
    check(event.has_error_code == pushes, "event",
          pushes ? "lacks its error code" : "has an error code that it does not push");
    check(event.has_error_code || event.error_code == 0, "event",
          "has an error code that it does not push");
}

struct ControlBit {
    unsigned bit;
    Feature feature;
    const char* name;
};

// Bits of CR4 that a CPU without the feature does not let anybody set.
constexpr ControlBit kCr4Features[] = {
    {11, Feature::kUmip, "UMIP"},         {12, Feature::kLa57, "LA57"},
    {16, Feature::kFsgsbase, "FSGSBASE"}, {17, Feature::kPcid, "PCIDE"},
    {18, Feature::kXsave, "OSXSAVE"},     {20, Feature::kSmep, "SMEP"},
    {21, Feature::kSmap, "SMAP"},         {22, Feature::kPku, "PKE"},
};
// Those of features that no policy has: VMX, SMX, key locker, CET, PKS, user interrupts, LAM.
constexpr u64 kCr4Never = bit(13) | bit(14) | bit(15) | bit(19) | bit(23) | bit(24) | bit(25) |
                          bit(28) | bit(29) | bit(26) | bit(27) | bit(30) | bit(31);

}  // namespace

u8 privilege_level(const CpuState& state) {
    if (!(state.cr0 & bit(0))) return 0;
    return state.rflags & bit(17) ? 3 : state.segments[kSs].dpl();
}

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
    s.fpu.legacy[28] = s.fpu.legacy[29] = 0xff;  // MXCSR_MASK
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
    // A task switch that faults half way into a triple fault leaves segments that nothing could run
    // on, and in shutdown nothing does.
    if (pe && !vm86 && s.activity != Activity::kShutdown) {
        check(!cs.unusable() && cs.s() && (cs.type() & 8 || cs.type() == 3), "segments.cs",
              "is not a code segment");
        check(cs.present(), "segments.cs", "is not present");
        const Segment& ss = s.segments[kSs];
        check(ss.unusable() || (ss.s() && ((ss.type() & 0xa) == 2)), "segments.ss",
              "is not a writable data segment");
        // Conforming code runs at its caller's level; data as code is what real mode leaves.
        const bool conforming = (cs.type() & 0xc) == 0xc;
        check(conforming ? cs.dpl() <= ss.dpl() : cs.dpl() == ss.dpl(), "segments.ss",
              "has another DPL than its code segment allows");
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
    check(!(s.msr.tsc_aux >> 32), "msr.tsc_aux", "has reserved bits set");
    check_memory_types(s.msr);
    check(!(bits(s.fpu.legacy[26] | u64{s.fpu.legacy[27]} << 8, 15, 0)), "fpu",
          "has reserved MXCSR bits set");
    check(s.activity <= Activity::kShutdown, "activity", "is not a known value");
    check_event(s);
}

void validate(const CpuState& s, const CpuidPolicy& policy) {
    validate(s);
    const FeatureSet& has = policy.features;
    auto needs = [&](bool used, Feature feature, const char* field, const char* what) {
        if (!used || has.has(feature)) return;
        bad(field, std::string("enables ") + what + ", which this machine's CPU model lacks");
    };
    for (const ControlBit& row : kCr4Features) {
        needs(s.cr4 & bit(row.bit), row.feature, "cr4", row.name);
    }
    check(!(s.cr4 & kCr4Never), "cr4", "enables a feature that no CPU model has");
    needs(s.msr.efer & bit(8), Feature::kLongMode, "msr.efer", "long mode");
    needs(s.msr.efer & bit(11), Feature::kNx, "msr.efer", "no-execute pages");
    needs(s.msr.efer & bit(21), Feature::kAutoIbrs, "msr.efer", "automatic IBRS");
    check(!(s.msr.efer & ~u64{0x200d01}), "msr.efer", "enables a feature that no CPU model has");
    needs(s.xcr0 & 6, Feature::kXsave, "xcr0", "XSAVE's components");
    needs(s.xcr0 & 4, Feature::kAvx, "xcr0", "AVX");
    for (const auto& high : s.fpu.ymm_high) {
        needs(high != std::array<u8, 16>{}, Feature::kAvx, "fpu", "AVX registers");
    }
    const u64 beyond = ~(bit(policy.physical_bits) - 1);
    // Outside long mode only the low half counts.
    check(!(s.msr.efer & bit(10)) || !(s.cr3 & beyond), "cr3",
          "has bits set that this machine's physical addresses do not have");
    for (u64 value : s.msr.mtrr_variable) {
        check(!(value & beyond), "msr.mtrr_variable",
              "has bits set that this machine's physical addresses do not have");
    }
    check(s.msr.xss == 0, "msr.xss", "enables a feature that no CPU model has");
}

}  // namespace polyvisor
