// CPU state in and out of the frame; INIT and start-up; what the engine implements.
#include <cstring>

#include "mmu/walker.hpp"
#include "soft/descriptors.hpp"
#include "soft/kvm_clock.hpp"
#include "soft/paging.hpp"

namespace polyvisor::soft {
namespace {

// Offsets in an FXSAVE64 image (SDM 1, table 10-2).
enum FxsaveOffset {
    kFcw = 0,
    kFsw = 2,
    kFtw = 4,
    kFop = 6,
    kFip = 8,
    kFdp = 16,
    kMxcsr = 24,
    kMxcsrMask = 28,
    kSt0 = 32,
    kXmm0 = 160
};

template <class T>
void put(FpuState& fpu, unsigned offset, T value) {
    std::memcpy(fpu.legacy.data() + offset, &value, sizeof value);
}
template <class T>
T get(const FpuState& fpu, unsigned offset) {
    T value;
    std::memcpy(&value, fpu.legacy.data() + offset, sizeof value);
    return value;
}

void save_fpu(const VcpuFrame& f, FpuState& fpu) {
    const X87State& x = f.x87;
    fpu = {};
    put(fpu, kFcw, x.control);
    put(fpu, kFsw, x.status);
    put(fpu, kFtw, x.tags);
    put(fpu, kFop, x.opcode);
    put(fpu, kFip, x.ip);
    put(fpu, kFdp, x.dp);
    put(fpu, kMxcsr, f.mxcsr);
    put(fpu, kMxcsrMask, u32{0xffff});
    unsigned top = x.status >> 11 & 7;
    for (unsigned n = 0; n < 8; ++n) {
        std::memcpy(fpu.legacy.data() + kSt0 + n * 16, x.reg[(top + n) & 7], 10);
    }
    for (unsigned n = 0; n < 16; ++n) {
        std::memcpy(fpu.legacy.data() + kXmm0 + n * 16, f.ymm[n], 16);
        std::memcpy(fpu.ymm_high[n].data(), f.ymm[n] + 16, 16);
    }
}

void load_fpu(VcpuFrame& f, const FpuState& fpu) {
    X87State& x = f.x87;
    x = {};
    x.control = get<u16>(fpu, kFcw);
    x.status = get<u16>(fpu, kFsw);
    x.tags = get<u8>(fpu, kFtw);
    x.opcode = get<u16>(fpu, kFop);
    x.ip = get<u64>(fpu, kFip);
    x.dp = get<u64>(fpu, kFdp);
    f.mxcsr = get<u32>(fpu, kMxcsr);
    unsigned top = x.status >> 11 & 7;
    for (unsigned n = 0; n < 8; ++n) {
        std::memcpy(x.reg[(top + n) & 7], fpu.legacy.data() + kSt0 + n * 16, 10);
    }
    for (unsigned n = 0; n < 16; ++n) {
        std::memcpy(f.ymm[n], fpu.legacy.data() + kXmm0 + n * 16, 16);
        std::memcpy(f.ymm[n] + 16, fpu.ymm_high[n].data(), 16);
    }
}

}  // namespace

bool read_pdptes(const VcpuFrame& f, u64 cr3, u64 (&pdpte)[4]) {
    u64 at = (cr3 & 0xffffffe0) & f.a20_mask;
    auto span = environment(f).memory.span(Gpa(at), sizeof pdpte);
    if (span.empty()) return false;  // reads as ones: reserved bits
    u64 read[4];
    std::memcpy(read, span.data(), sizeof read);
    for (u64 entry : read) {
        if (!pdpte_valid(entry, f.physical_mask)) return false;
    }
    std::memcpy(pdpte, read, sizeof read);
    return true;
}

void save_state(const VcpuFrame& f, CpuState& s) {
    s = {};
    for (int n = 0; n < 16; ++n) s.gpr[n] = f.gpr[n];
    s.rip = f.rip;
    s.rflags = f.rflags();
    for (int n = 0; n < kSegmentCount; ++n) s.segments[n] = f.seg[n];
    s.ldtr = f.ldtr;
    s.tr = f.tr;
    s.gdtr = f.gdtr;
    s.idtr = f.idtr;
    s.cr0 = f.cr0, s.cr2 = f.cr2, s.cr3 = f.cr3, s.cr4 = f.cr4, s.xcr0 = f.xcr0;
    for (int n = 0; n < 4; ++n) s.dr[n] = f.dr[n];
    s.dr6 = f.dr6, s.dr7 = f.dr7;
    s.msr = f.msr;
    save_fpu(f, s.fpu);
    s.activity = f.activity;
    s.interrupt_shadow = f.shadow;
    s.nmi_blocked = f.nmi_blocked;
    s.nmi_pending = f.nmi_pending;
    s.event = f.event;
    s.instructions = f.retired;
}

void load_state(VcpuFrame& f, const CpuState& s) {
    for (int n = 0; n < 16; ++n) f.gpr[n] = s.gpr[n];
    f.gpr[16] = 0;
    f.rip = s.rip;
    f.set_rflags(s.rflags);
    for (int n = 0; n < kSegmentCount; ++n) f.seg[n] = s.segments[n];
    f.ldtr = s.ldtr;
    f.tr = s.tr;
    f.gdtr = s.gdtr;
    f.idtr = s.idtr;
    f.cr0 = s.cr0, f.cr2 = s.cr2, f.cr3 = s.cr3, f.cr4 = s.cr4, f.xcr0 = s.xcr0;
    for (int n = 0; n < 4; ++n) f.dr[n] = s.dr[n];
    f.dr6 = s.dr6, f.dr7 = s.dr7;
    f.msr = s.msr;
    load_fpu(f, s.fpu);
    f.activity = s.activity;
    f.shadow = s.interrupt_shadow;
    f.shadow_ss = false;
    f.nmi_blocked = s.nmi_blocked;
    f.nmi_pending = s.nmi_pending;
    f.event = s.event;
    f.retired = s.instructions;
    f.debug_hits = 0;
    f.fault = {};

    f.cpl = privilege_level(s);
    for (u64& entry : f.pdpte) entry = 0;
    if (uses_pdptes(f.cr0, f.cr4, f.msr.efer)) read_pdptes(f, f.cr3, f.pdpte);
    flush_tlb(f);
    update_mode(f);
    update_kvm_clock(f);
}

// SDM 3A, table 9-1: what INIT leaves alone is the FPU, the MSRs but EFER, XCR0 and the caches'
// bits.
void init_reset(VcpuFrame& f, bool bootstrap) {
    CpuState s;
    save_state(f, s);
    CpuState fresh = reset_state(bootstrap);
    fresh.cr0 = (s.cr0 & (bit(30) | bit(29))) | bit(4);
    fresh.fpu = s.fpu;
    fresh.xcr0 = s.xcr0;
    fresh.msr = s.msr;
    fresh.msr.efer = 0;
    fresh.msr.kvm_system_time = 0;
    fresh.instructions = s.instructions;
    fresh.gpr[kRdx] = environment(f).cpuid.find(1, 0, 0).eax;
    load_state(f, fresh);
}

void start_up(VcpuFrame& f, u8 vector) {
    f.seg[kCs].selector = static_cast<u16>(vector << 8);
    f.seg[kCs].base = u64{vector} << 12;
    f.rip = 0;
    f.activity = Activity::kRunning;
    update_mode(f);
}

FeatureSet implemented_features() {
    FeatureSet set;
    // A feature with instructions is implemented when the table has them.
    for (unsigned n = 0; n < kOpCount; ++n) set.set(op_info(static_cast<Op>(n)).feature);
    for (Feature feature :
         {Feature::kLongMode,  Feature::kPae,           Feature::kPse,      Feature::kPse36,
          Feature::kPge,       Feature::kPat,           Feature::kMtrr,     Feature::kNx,
          Feature::kPage1Gb,   Feature::kSmep,          Feature::kSmap,     Feature::kUmip,
          Feature::kPcid,      Feature::kLa57,          Feature::kX2apic,   Feature::kTscDeadline,
          Feature::kTscAdjust, Feature::kArat,          Feature::kDe,       Feature::kVme,
          Feature::kApic,      Feature::kMce,           Feature::kMca,      Feature::kErms,
          Feature::kFsrm,      Feature::kNotVulnerable, Feature::kKvmClock, Feature::kHypercall}) {
        set.set(feature);
    }
    for (Feature feature :
         {Feature::kXsaveErrorPointers, Feature::kLfenceSerializing, Feature::kNullClearsBase}) {
        set.set(feature);
    }
    set.set(Feature::kPku, false);
    set.set(Feature::kMonitor, false);  // the rows are there for policies that add it
    return set;
}

}  // namespace polyvisor::soft
