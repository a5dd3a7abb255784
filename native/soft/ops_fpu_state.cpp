// Saving and restoring x87, SSE and AVX state: FXSAVE, the XSAVE family, LDMXCSR, STMXCSR, XGETBV.
//
// An area is read whole before anything changes and built whole before it is written, so a fault
// leaves no half. Components: 0 x87, 1 SSE (XMM and MXCSR), 2 AVX (upper halves of YMM). IA32_XSS
// has none, so XSAVES and XRSTORS differ from XSAVEC and XRSTOR only in privilege and format.
// XSAVEOPT and XSAVES use the init optimisation but not the modified optimisation, which is
// optional (SDM 1, 13.6).
#include "soft/environment.hpp"
#include "soft/simd.hpp"
#include "soft/x87.hpp"

namespace polyvisor::soft {

namespace {

constexpr u64 kCr0Ts = bit(3);
constexpr u64 kCr4OsXsave = bit(18);
constexpr u64 kX87 = 1, kSseState = 2, kAvxState = 4;
constexpr u64 kCompacted = bit(63);
constexpr u32 kDefaultMxcsr = 0x1f80;

/// SDM 1, table 10-2: the legacy area; REX.W chooses 64-bit pointers.
struct LegacyArea {
    u16 control, status;
    u8 tags, reserved;
    u16 opcode;
    u64 ip, dp;
    u32 mxcsr, mxcsr_mask;
    u8 st[8][16];
    u8 xmm[16][16];
};
static_assert(sizeof(LegacyArea) == 416);
constexpr u32 kFxsaveSize = 512;

/// SDM 1, 13.4.2.
struct Header {
    u64 saved, compaction;
    u64 reserved[6];
};
constexpr u32 kHeaderAt = 512;
constexpr u32 kAvxAt = 576;  ///< in both formats: AVX is the first extended component
struct AvxArea {
    u8 high[16][16];
};
struct Area {
    LegacyArea legacy;
    u8 unused[kHeaderAt - sizeof(LegacyArea)];
    Header header;
    AvxArea avx;
};
static_assert(sizeof(Area) == kAvxAt + 256);

/// Outside 64-bit mode the upper eight registers are neither saved, restored nor initialised.
unsigned vectors(const VcpuFrame& f) {
    return f.long64() ? 16 : 8;
}

// --- Components ---------------------------------------------------------------------------------

void save_x87(const VcpuFrame& f, const Insn& i, LegacyArea& area) {
    const X87State& x = f.x87;
    area.control = x.control;
    area.status = x.status;
    area.tags = x.tags;
    area.reserved = 0;
    area.opcode = x.opcode;
    if (wide(f, i)) {
        area.ip = x.ip;
        area.dp = x.dp;
    } else {
        area.ip = static_cast<u32>(x.ip) | u64{x.cs} << 32;
        area.dp = static_cast<u32>(x.dp) | u64{x.ds} << 32;
    }
    unsigned top = x.status >> 11 & 7;
    for (unsigned n = 0; n < 8; ++n) {
        std::memset(area.st[n] + 10, 0, 6);
        std::memcpy(area.st[n], x.reg[(top + n) & 7], 10);
    }
}

void load_x87(VcpuFrame& f, const Insn& i, const LegacyArea& area) {
    X87State& x = f.x87;
    x.control = (area.control & 0x1f3f) | 0x40;  // the others are no bits
    x.status = area.status;
    x.tags = area.tags;
    x.opcode = area.opcode & 0x7ff;
    if (wide(f, i)) {
        x.ip = area.ip;
        x.dp = area.dp;
        x.cs = x.ds = 0;
    } else {
        x.ip = static_cast<u32>(area.ip);
        x.dp = static_cast<u32>(area.dp);
        x.cs = static_cast<u16>(area.ip >> 32);
        x.ds = static_cast<u16>(area.dp >> 32);
    }
    unsigned top = x.status >> 11 & 7;
    for (unsigned n = 0; n < 8; ++n) std::memcpy(x.reg[(top + n) & 7], area.st[n], 10);
    x87::update_summary(f);
}

void init_x87(VcpuFrame& f) {
    f.x87 = {};
}

bool x87_in_use(const VcpuFrame& f) {
    static constexpr X87State kInit{};
    const X87State& x = f.x87;
    if (x.control != kInit.control || x.status != 0 || x.tags != 0 || x.opcode != 0 || x.ip != 0 ||
        x.dp != 0 || x.cs != 0 || x.ds != 0) {
        return true;
    }
    for (const auto& reg : x.reg) {
        for (unsigned n = 0; n < 10; ++n) {
            if (reg[n] != 0) return true;
        }
    }
    return false;
}

void save_sse(const VcpuFrame& f, LegacyArea& area) {
    for (unsigned n = 0; n < vectors(f); ++n) std::memcpy(area.xmm[n], f.ymm[n], 16);
}
void load_sse(VcpuFrame& f, const LegacyArea& area) {
    for (unsigned n = 0; n < vectors(f); ++n) std::memcpy(f.ymm[n], area.xmm[n], 16);
}
void init_sse(VcpuFrame& f) {
    for (unsigned n = 0; n < vectors(f); ++n) std::memset(f.ymm[n], 0, 16);
}
void save_avx(const VcpuFrame& f, AvxArea& area) {
    for (unsigned n = 0; n < vectors(f); ++n) std::memcpy(area.high[n], f.ymm[n] + 16, 16);
}
void load_avx(VcpuFrame& f, const AvxArea& area) {
    for (unsigned n = 0; n < vectors(f); ++n) std::memcpy(f.ymm[n] + 16, area.high[n], 16);
}
void init_avx(VcpuFrame& f) {
    for (unsigned n = 0; n < vectors(f); ++n) clear_upper(f, static_cast<u8>(n));
}

/// XINUSE of the halves of the vector registers: `at` 0 for SSE, 16 for AVX.
bool vectors_in_use(const VcpuFrame& f, unsigned at) {
    u64 any = 0;
    for (unsigned n = 0; n < vectors(f); ++n) {
        u64 half[2];
        std::memcpy(half, f.ymm[n] + at, sizeof half);
        any |= half[0] | half[1];
    }
    return any != 0;
}

u64 in_use(const VcpuFrame& f) {
    return (x87_in_use(f) ? kX87 : 0) | (vectors_in_use(f, 0) ? kSseState : 0) |
           (vectors_in_use(f, 16) ? kAvxState : 0);
}

// --- Memory -------------------------------------------------------------------------------------

/// Found before bad alignment is an address that is not canonical; after it, a limit that is
/// exceeded.
bool area_address(VcpuFrame& f, const Insn& i, u64 ea, u32 size, u32 alignment, bool write,
                  u64& linear) {
    u64 flat = f.seg[i.segment].base + ea;
    if (!f.long64() && (flat & (alignment - 1))) return raise_gp(f);
    if (!linear_address(f, i.segment, ea, size, write, linear)) return false;
    if ((linear & (alignment - 1)) == 0) return true;
    return raise(f, i.segment == kSs && !canonical(f, linear) ? kSsFault : kGp, 0);
}

bool read_area(VcpuFrame& f, const Insn& i, u64 linear, void* into, u32 size) {
    return read_linear(f, linear, into, size, Privilege::kCurrent, i.segment);
}
bool write_area(VcpuFrame& f, const Insn& i, u64 linear, const void* from, u32 size) {
    return write_linear(f, linear, from, size, Privilege::kCurrent, i.segment);
}

// --- FXSAVE -------------------------------------------------------------------------------------

u32 legacy_size(const VcpuFrame& f) {
    return static_cast<u32>(offsetof(LegacyArea, xmm) + vectors(f) * 16);
}

}  // namespace

PV_ROW(FXSAVE_M512) {
    u64 linear;
    if (!area_address(f, i, ea, kFxsaveSize, 16, true, linear)) return false;
    if (!probe_write_linear(f, linear, kFxsaveSize, Privilege::kCurrent, i.segment)) return false;
    LegacyArea area;
    save_x87(f, i, area);
    save_sse(f, area);
    area.mxcsr = guest_mxcsr(f);
    area.mxcsr_mask = kMxcsrValid;
    return write_area(f, i, linear, &area, legacy_size(f));
}

PV_ROW(FXRSTOR_M512) {
    u64 linear;
    alignas(16) u8 bytes[kFxsaveSize];
    if (!area_address(f, i, ea, kFxsaveSize, 16, false, linear)) return false;
    if (!read_area(f, i, linear, bytes, kFxsaveSize)) return false;
    LegacyArea area;
    std::memcpy(&area, bytes, sizeof area);
    if (area.mxcsr & ~kMxcsrValid) return raise_gp(f);
    load_x87(f, i, area);
    load_sse(f, area);
    set_guest_mxcsr(f, area.mxcsr);
    return true;
}

// --- XSAVE --------------------------------------------------------------------------------------

namespace {

/// RFBM: the components that EDX:EAX asks for and the OS enabled.
u64 requested(const VcpuFrame& f) {
    u64 mask = static_cast<u32>(f.gpr[kRax]) | f.gpr[kRdx] << 32;
    return mask & f.xcr0;
}

bool xsave_allowed(VcpuFrame& f) {
    if (!(f.cr4 & kCr4OsXsave)) return raise_ud(f);
    return !(f.cr0 & kCr0Ts) || raise(f, kNm);
}

/// Bytes that an area with these components has: the extent of faults and limit checks.
u32 area_size(u64 components) {
    return components & kAvxState ? kAvxAt + sizeof(AvxArea) : kAvxAt;
}

// XSAVE and XSAVEOPT (SDM 1, 13.7, 13.9): standard format; parts not asked for stay as they are.
bool save_standard(VcpuFrame& f, const Insn& i, u64 ea, bool only_in_use) {
    if (!xsave_allowed(f)) return false;
    u64 wanted = requested(f), used = in_use(f);
    u32 size = area_size(wanted);
    u64 linear;
    if (!area_address(f, i, ea, size, 64, true, linear)) return false;
    if (!probe_write_linear(f, linear, size, Privilege::kCurrent, i.segment)) return false;
    Area area;
    if (!read_area(f, i, linear, &area, size)) return false;
    u64 written = only_in_use ? wanted & used : wanted;
    if (written & kX87) save_x87(f, i, area.legacy);
    if (written & kSseState) save_sse(f, area.legacy);
    if (written & kAvxState) save_avx(f, area.avx);
    if (wanted & (kSseState | kAvxState)) {
        area.legacy.mxcsr = guest_mxcsr(f);
        area.legacy.mxcsr_mask = kMxcsrValid;
    }
    area.header.saved = (area.header.saved & ~wanted) | (wanted & used);
    return write_area(f, i, linear, &area, size);
}

// XSAVEC and XSAVES (SDM 1, 13.10, 13.11): compacted format, with the init optimisation. MXCSR is
// part of component 1, which counts as used when it has not its initial value.
bool save_compacted(VcpuFrame& f, const Insn& i, u64 ea) {
    if (!xsave_allowed(f)) return false;
    u64 wanted = requested(f), used = in_use(f);
    u32 mxcsr = guest_mxcsr(f);
    if (mxcsr != kDefaultMxcsr) used |= kSseState;
    u32 size = area_size(wanted);
    u64 linear;
    if (!area_address(f, i, ea, size, 64, true, linear)) return false;
    if (!probe_write_linear(f, linear, size, Privilege::kCurrent, i.segment)) return false;
    Area area;
    if (!read_area(f, i, linear, &area, size)) return false;
    u64 written = wanted & used;
    if (written & kX87) save_x87(f, i, area.legacy);
    if (written & kSseState) {
        save_sse(f, area.legacy);
        area.legacy.mxcsr = mxcsr;
        area.legacy.mxcsr_mask = kMxcsrValid;
    }
    if (written & kAvxState) save_avx(f, area.avx);
    area.header.saved = written;
    area.header.compaction = wanted | kCompacted;
    return write_area(f, i, linear, &area, size);
}

/// The checks of XRSTOR and XRSTORS on the header (SDM 1, 13.8, 13.12).
bool header_valid(const VcpuFrame& f, const Header& header, bool supervisor) {
    if (header.compaction & kCompacted) {
        if (!supervisor && !environment(f).cpuid.features.has(Feature::kXsavec)) return false;
        u64 present = header.compaction & ~kCompacted;
        if ((present & ~f.xcr0) || (header.saved & ~present)) return false;
        for (u64 reserved : header.reserved) {
            if (reserved != 0) return false;
        }
        return true;
    }
    // Bytes 23:8 of the header must be 0; those after are not looked at.
    return !supervisor && header.compaction == 0 && header.reserved[0] == 0 &&
           !(header.saved & ~f.xcr0);
}

bool restore(VcpuFrame& f, const Insn& i, u64 ea, bool supervisor) {
    if (!xsave_allowed(f)) return false;
    u64 wanted = requested(f);
    u64 linear;
    if (!area_address(f, i, ea, kAvxAt, 64, false, linear)) return false;
    Area area;
    if (!read_area(f, i, linear, &area, kAvxAt)) return false;
    if (!header_valid(f, area.header, supervisor)) return raise_gp(f);
    u64 saved = area.header.saved;
    bool compacted = area.header.compaction & kCompacted;
    if (wanted & saved & kAvxState) {
        if (!linear_address(f, i.segment, ea, sizeof area, false, linear)) return false;
        if (!read_area(f, i, linear + kAvxAt, &area.avx, sizeof area.avx)) return false;
    }
    bool loads_mxcsr =
        compacted ? (wanted & saved & kSseState) != 0 : (wanted & (kSseState | kAvxState)) != 0;
    if (loads_mxcsr && (area.legacy.mxcsr & ~kMxcsrValid)) return raise_gp(f);

    if (wanted & kX87) saved& kX87 ? load_x87(f, i, area.legacy) : init_x87(f);
    if (wanted & kSseState) saved& kSseState ? load_sse(f, area.legacy) : init_sse(f);
    if (wanted & kAvxState) saved& kAvxState ? load_avx(f, area.avx) : init_avx(f);
    if (loads_mxcsr) {
        set_guest_mxcsr(f, area.legacy.mxcsr);
    } else if (wanted & kSseState) {
        set_guest_mxcsr(f, kDefaultMxcsr);
    }
    return true;
}

}  // namespace

PV_ROW(XSAVE_M) {
    return save_standard(f, i, ea, false);
}
PV_ROW(XSAVEOPT_M) {
    return save_standard(f, i, ea, true);
}
PV_ROW(XSAVEC_M) {
    return save_compacted(f, i, ea);
}
PV_ROW(XSAVES_M) {
    return save_compacted(f, i, ea);
}
PV_ROW(XRSTOR_M) {
    return restore(f, i, ea, false);
}
PV_ROW(XRSTORS_M) {
    return restore(f, i, ea, true);
}

// ECX = 1 gives XCR0 & XINUSE, where the CPU has it (CPUID leaf 0DH, 1, EAX[2]). SDM 2, XGETBV.
PV_ROW(XGETBV) {
    if (!(f.cr4 & kCr4OsXsave)) return raise_ud(f);
    u32 index = static_cast<u32>(f.gpr[kRcx]);
    u64 value = f.xcr0;
    if (index == 1 && environment(f).cpuid.features.has(Feature::kXgetbv1)) {
        u64 used = in_use(f);
        if (guest_mxcsr(f) != kDefaultMxcsr) used |= kSseState;
        value &= used;
    } else if (index != 0) {
        return raise_gp(f);
    }
    f.gpr[kRax] = static_cast<u32>(value);
    f.gpr[kRdx] = value >> 32;
    return true;
}

// --- MXCSR --------------------------------------------------------------------------------------

namespace {

bool load_mxcsr(VcpuFrame& f, const Insn& i, u64 ea) {
    u32 value;
    if (!load(f, i, ea, value)) return false;
    if (value & ~kMxcsrValid) return raise_gp(f);
    set_guest_mxcsr(f, value);
    return true;
}

}  // namespace

PV_ROW(LDMXCSR_Md) {
    return load_mxcsr(f, i, ea);
}
PV_ROW(VLDMXCSR_Md) {
    return load_mxcsr(f, i, ea);
}
PV_ROW(STMXCSR_Md) {
    return store(f, i, ea, guest_mxcsr(f));
}
PV_ROW(VSTMXCSR_Md) {
    return store(f, i, ea, guest_mxcsr(f));
}

}  // namespace polyvisor::soft
