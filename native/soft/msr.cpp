// Every MSR that operating systems touch: those with a meaning here, those that read as what a
// virtual machine without the feature says, and #GP for the rest, with a limited log line.
#include "soft/msr.hpp"

#include <cstdio>

#include "soft/descriptors.hpp"
#include "soft/kvm_clock.hpp"

namespace polyvisor::soft {
namespace {

enum Msr : u32 {
    kTscMsr = 0x10,
    kPlatformId = 0x17,
    kApicBase = 0x1b,
    kEblCrPoweron = 0x2a,
    kSmiCount = 0x34,
    kFeatureControl = 0x3a,
    kTscAdjustMsr = 0x3b,
    kSpecCtrl = 0x48,
    kPredCmd = 0x49,
    kBiosUpdateTrigger = 0x79,
    kUpdateRevision = 0x8b,
    kFsbFrequency = 0xcd,
    kPlatformInfo = 0xce,
    kMtrrCap = 0xfe,
    kArchCapabilitiesMsr = 0x10a,
    kSysenterCs = 0x174,
    kSysenterEsp = 0x175,
    kSysenterEip = 0x176,
    kMcgCap = 0x179,
    kMcgStatus = 0x17a,
    kPerfStatus = 0x198,
    kPerfCtl = 0x199,
    kThermStatus = 0x19c,
    kMiscEnable = 0x1a0,
    kDebugCtl = 0x1d9,
    kMtrrPhys0 = 0x200,
    kMtrrPhysEnd = 0x20f,
    kMtrrFix64k = 0x250,
    kMtrrFix16k = 0x258,
    kMtrrFix4k = 0x268,
    kPatMsr = 0x277,
    kMtrrDefType = 0x2ff,
    kMc0Ctl = 0x400,
    kMcEnd = 0x400 + 4 * 10 - 1,
    kTscDeadlineMsr = 0x6e0,
    kX2apicFirst = 0x800,
    kX2apicLast = 0x8ff,
    kXss = 0xda0,
    kEferMsr = 0xc0000080,
    kStar = 0xc0000081,
    kLstar = 0xc0000082,
    kCstar = 0xc0000083,
    kSfmask = 0xc0000084,
    kFsBase = 0xc0000100,
    kGsBase = 0xc0000101,
    kKernelGsBase = 0xc0000102,
    kTscAuxMsr = 0xc0000103,
    kAmdSyscfg = 0xc0010010,
    kAmdHwcr = 0xc0010015,
    kAmdTopMem = 0xc001001a,
    kAmdTopMem2 = 0xc001001d,
    kAmdNbCfg = 0xc001001f,
    kAmdIntPending = 0xc0010055,
    kAmdMmioConfBase = 0xc0010058,
    kAmdPatchLoader = 0xc0010020,
    kAmdLsCfg = 0xc0011020,
    kAmdIcCfg = 0xc0011021,
    kAmdDcCfg = 0xc0011022,
    kAmdDeCfg = 0xc0011029,
    kAmdBuCfg2 = 0xc001102a,
};

constexpr u32 kMceBanks = 10;
constexpr u64 kEferSce = bit(0), kEferLme = bit(8), kEferLma = bit(10), kEferNxe = bit(11),
              kEferAutoIbrs = bit(21);
constexpr unsigned kVariableMtrrs = 8;

const FeatureSet& features(const VcpuFrame& f) {
    return environment(f).cpuid.features;
}
bool intel(const VcpuFrame& f) {
    return environment(f).cpuid.intel;
}

// --- The TSC -------------------------------------------------------------------------------------

void shift_tsc(VcpuFrame& f, u64 delta) {
    f.msr.tsc_offset += delta;
    f.msr.tsc_adjust += delta;
    update_kvm_clock(f);
}

// The local APIC compares the deadline with the clock's TSC; the guest's has an offset.
u64 deadline_to_clock(const VcpuFrame& f, u64 value) {
    if (value == 0) return 0;
    u64 shifted = value - f.msr.tsc_offset;
    // One that lies before the clock's own beginning has passed.
    return static_cast<s64>(shifted) <= 0 && static_cast<s64>(value) > 0 ? 1 : shifted;
}

bool is_local_apic(u32 index) {
    return index == kApicBase || index == kTscDeadlineMsr ||
           (index >= kX2apicFirst && index <= kX2apicLast);
}

bool apic_read(VcpuFrame& f, u32 index, u64& value) {
    Environment& env = environment(f);
    if (env.deterministic) read_tsc(f);  // timer counts are those of this instruction
    if (env.lapic == nullptr || !env.lapic->read_msr(index, value)) return false;
    if (index == kTscDeadlineMsr && value != 0) value += f.msr.tsc_offset;
    return true;
}

bool apic_write(VcpuFrame& f, u32 index, u64 value) {
    Environment& env = environment(f);
    if (env.deterministic) read_tsc(f);
    if (env.lapic == nullptr) return false;
    if (index == kTscDeadlineMsr) value = deadline_to_clock(f, value);
    return env.lapic->write_msr(index, value);
}

// --- Memory types --------------------------------------------------------------------------------

bool memory_type(u64 type) {
    return type <= 1 || (type >= 4 && type <= 6);
}

bool valid_types(u64 value, bool pat) {
    for (unsigned n = 0; n < 64; n += 8) {
        u64 type = value >> n & 0xff;
        if (!memory_type(type) && !(pat && type == 7)) return false;
    }
    return true;
}

/// Index into mtrr_fixed, or -1.
int fixed_mtrr(u32 index) {
    if (index == kMtrrFix64k) return 0;
    if (index == kMtrrFix16k || index == kMtrrFix16k + 1)
        return static_cast<int>(index - kMtrrFix16k) + 1;
    if (index >= kMtrrFix4k && index < kMtrrFix4k + 8)
        return static_cast<int>(index - kMtrrFix4k) + 3;
    return -1;
}

bool valid_variable_mtrr(const VcpuFrame& f, u32 index, u64 value) {
    if (index & 1) return !(value & ~(f.physical_mask | 0x800)) && !(value & 0x7ff);
    return !(value & ~f.physical_mask) && !(value & 0xf00) && memory_type(value & 0xff);
}

// --- EFER ----------------------------------------------------------------------------------------

bool write_efer(VcpuFrame& f, u64 value) {
    u64 allowed = kEferSce | kEferLma;
    if (features(f).has(Feature::kLongMode)) allowed |= kEferLme;
    if (features(f).has(Feature::kNx)) allowed |= kEferNxe;
    if (features(f).has(Feature::kNotVulnerable) && !intel(f)) allowed |= kEferAutoIbrs;
    if (value & ~allowed) return false;
    u64 old = f.msr.efer;
    if ((f.cr0 & bit(31)) && ((value ^ old) & kEferLme)) return false;
    f.msr.efer = (value & ~kEferLma) | (old & kEferLma);
    if ((value ^ old) & kEferNxe) flush_tlb(f);
    return true;
}

void note_unknown(VcpuFrame& f, const char* what, u32 index, u64 value) {
    Log* log = environment(f).log;
    if (log == nullptr) return;
    char line[96];
    std::snprintf(line, sizeof line, "%s of unknown MSR %#x (%#llx): #GP", what, index,
                  static_cast<unsigned long long>(value));
    log->note("msr", line);
}

/// MSRs whose absence guests probe for; no line in the log.
bool known_absent(u32 index) {
    return (index >= 0xc1 && index <= 0xc8) || (index >= 0x186 && index <= 0x18d) ||  // counters
           (index >= 0x309 && index <= 0x30c) || (index >= 0x38d && index <= 0x390) ||
           (index >= 0x600 && index <= 0x650) ||  // RAPL
           (index >= 0x280 && index <= 0x289) || index == 0x345 || index == 0x140 ||
           index == 0x122 || index == 0x1a2 || index == 0x1ad ||
           (index >= 0xc0010000 && index <= 0xc0010007) ||
           (index >= 0xc0010200 && index <= 0xc001020b) ||
           (index >= 0xc0010299 && index <= 0xc001029b) ||
           (index >= 0xc0010060 && index <= 0xc001006b);
}

bool read_amd(const VcpuFrame& f, u32 index, u64& value) {
    if (intel(f)) return false;
    switch (index) {
        case kAmdHwcr:
            value = bit(24);
            return true;  // the TSC counts at the P0 frequency
        case kAmdDeCfg:
            value = bit(1);
            return true;  // LFENCE serializes
        case kAmdSyscfg:
        case kAmdTopMem:
        case kAmdTopMem2:
        case kAmdNbCfg:
        case kAmdIntPending:
        case kAmdMmioConfBase:
        case kAmdLsCfg:
        case kAmdIcCfg:
        case kAmdDcCfg:
        case kAmdBuCfg2:
            value = 0;
            return true;
        default:
            return false;
    }
}

bool write_amd(const VcpuFrame& f, u32 index) {
    if (intel(f)) return false;
    switch (index) {
        case kAmdHwcr:
        case kAmdDeCfg:
        case kAmdSyscfg:
        case kAmdNbCfg:
        case kAmdIntPending:
        case kAmdPatchLoader:
        case kAmdLsCfg:
        case kAmdIcCfg:
        case kAmdDcCfg:
        case kAmdBuCfg2:
            return true;  // workarounds for errata that are not here
        default:
            return false;
    }
}

}  // namespace

bool read_msr(VcpuFrame& f, u32 index, u64& value) {
    const MsrState& m = f.msr;
    if (is_local_apic(index)) return apic_read(f, index, value);
    if (index >= kMtrrPhys0 && index <= kMtrrPhysEnd) {
        value = m.mtrr_variable[index - kMtrrPhys0];
        return true;
    }
    if (int n = fixed_mtrr(index); n >= 0) {
        value = m.mtrr_fixed[n];
        return true;
    }
    if (index >= kMc0Ctl && index <= kMcEnd) {
        value = 0;  // no bank has anything to report, nor can be enabled
        return true;
    }
    switch (index) {
        case kTscMsr:
            value = read_tsc(f);
            return true;
        case kTscAdjustMsr:
            value = m.tsc_adjust;
            return true;
        case kTscAuxMsr:
            value = m.tsc_aux;
            return true;
        case kFsBase:
            value = f.seg[kFs].base;
            return true;
        case kGsBase:
            value = f.seg[kGs].base;
            return true;
        case kKernelGsBase:
            value = m.kernel_gs_base;
            return true;
        case kEferMsr:
            value = m.efer;
            return true;
        case kStar:
            value = m.star;
            return true;
        case kLstar:
            value = m.lstar;
            return true;
        case kCstar:
            value = m.cstar;
            return true;
        case kSfmask:
            value = m.sfmask;
            return true;
        case kSysenterCs:
            value = m.sysenter_cs;
            return true;
        case kSysenterEsp:
            value = m.sysenter_esp;
            return true;
        case kSysenterEip:
            value = m.sysenter_eip;
            return true;
        case kPatMsr:
            value = m.pat;
            return true;
        case kMtrrDefType:
            value = m.mtrr_def_type;
            return true;
        case kMtrrCap:
            value = kVariableMtrrs | bit(8) | bit(10);
            return true;  // fixed ranges, WC
        case kMiscEnable:
            value = m.misc_enable;
            return true;
        case kMcgCap:
            value = kMceBanks;
            return true;
        case kFeatureControl:
            value = 1;
            return intel(f);  // locked, nothing enabled
        case kUpdateRevision:
            value = intel(f) ? bit(32) : 0x01000065;
            return true;
        case kArchCapabilitiesMsr:
            value = kArchCapabilities;
            return intel(f) && features(f).has(Feature::kNotVulnerable);
        case kSpecCtrl:
            value = m.spec_ctrl;
            return intel(f) && features(f).has(Feature::kNotVulnerable);
        case kXss:
            value = m.xss;
            return features(f).has(Feature::kXsaves);
        case kMcgStatus:
        case kPlatformId:
        case kEblCrPoweron:
        case kSmiCount:
        case kFsbFrequency:
        case kPlatformInfo:
        case kPerfStatus:
        case kPerfCtl:
        case kThermStatus:
        case kDebugCtl:
            value = 0;
            return true;
        case kMsrKvmWallClock:
        case kMsrKvmWallClockOld:
            value = m.kvm_wall_clock;
            return features(f).has(Feature::kKvmClock);
        case kMsrKvmSystemTime:
        case kMsrKvmSystemTimeOld:
            value = m.kvm_system_time;
            return features(f).has(Feature::kKvmClock);
        default:
            break;
    }
    if (read_amd(f, index, value)) return true;
    if (!known_absent(index)) note_unknown(f, "read", index, 0);
    return false;
}

bool write_msr(VcpuFrame& f, u32 index, u64 value) {
    MsrState& m = f.msr;
    if (is_local_apic(index)) return apic_write(f, index, value);
    if (index >= kMtrrPhys0 && index <= kMtrrPhysEnd) {
        if (!valid_variable_mtrr(f, index, value)) return false;
        m.mtrr_variable[index - kMtrrPhys0] = value;
        return true;
    }
    if (int n = fixed_mtrr(index); n >= 0) {
        if (!valid_types(value, false)) return false;
        m.mtrr_fixed[n] = value;
        return true;
    }
    if (index >= kMc0Ctl && index <= kMcEnd) {
        // Control registers take all ones or zero, status registers only zero.
        return (index & 3) == 0 ? value == 0 || value == ~u64{0} || value == 0xffffffff
                                : (index & 3) != 1 || value == 0;
    }
    auto canonical = [&](u64& field) {
        if (!is_canonical(f, value)) return false;
        field = value;
        return true;
    };
    switch (index) {
        case kTscMsr:
            shift_tsc(f, value - read_tsc(f));
            return true;
        case kTscAdjustMsr:
            shift_tsc(f, value - m.tsc_adjust);
            return true;
        case kTscAuxMsr:
            if (value >> 32) return false;
            m.tsc_aux = value;
            return true;
        case kFsBase:
            return canonical(f.seg[kFs].base);
        case kGsBase:
            return canonical(f.seg[kGs].base);
        case kKernelGsBase:
            return canonical(m.kernel_gs_base);
        case kEferMsr:
            return write_efer(f, value);
        case kStar:
            m.star = value;
            return true;
        case kLstar:
            return canonical(m.lstar);
        case kCstar:
            return canonical(m.cstar);
        case kSfmask:
            m.sfmask = value & 0xffffffff;
            return true;
        case kSysenterCs:
            m.sysenter_cs = value & 0xffffffff;
            return true;
        case kSysenterEsp:
            return canonical(m.sysenter_esp);
        case kSysenterEip:
            return canonical(m.sysenter_eip);
        case kPatMsr:
            if (!valid_types(value, true)) return false;
            m.pat = value;
            return true;
        case kMtrrDefType:
            if ((value & ~u64{0xcff}) || !memory_type(value & 0xff)) return false;
            m.mtrr_def_type = value;
            return true;
        case kMiscEnable:
            m.misc_enable = value;
            return true;
        case kSpecCtrl:
            if (!intel(f) || !features(f).has(Feature::kNotVulnerable) || (value & ~u64{7})) {
                return false;
            }
            m.spec_ctrl = value;
            return true;
        case kPredCmd:
            return intel(f) && features(f).has(Feature::kNotVulnerable) && !(value & ~u64{1});
        case kXss:
            if (!features(f).has(Feature::kXsaves) || value != 0) return false;
            m.xss = value;
            return true;
        case kMcgStatus:
        case kDebugCtl:
            return value == 0 || index == kDebugCtl;
        case kBiosUpdateTrigger:
        case kUpdateRevision:
        case kPerfCtl:
        case kEblCrPoweron:
            return true;
        case kMsrKvmWallClock:
        case kMsrKvmWallClockOld:
            if (!features(f).has(Feature::kKvmClock)) return false;
            m.kvm_wall_clock = value;
            write_wall_clock(f, value);
            return true;
        case kMsrKvmSystemTime:
        case kMsrKvmSystemTimeOld:
            if (!features(f).has(Feature::kKvmClock)) return false;
            m.kvm_system_time = value;
            update_kvm_clock(f);
            return true;
        default:
            break;
    }
    if (write_amd(f, index)) return true;
    if (!known_absent(index)) note_unknown(f, "write", index, value);
    return false;
}

}  // namespace polyvisor::soft
