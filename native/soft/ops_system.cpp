// Control and debug registers, MSRs, CPUID, time, flags with privilege, and the rest of ring 0.
#include "soft/bindings.hpp"
#include "soft/descriptors.hpp"
#include "soft/msr.hpp"
#include "soft/paging.hpp"

namespace polyvisor::soft {
namespace {

enum Cr0 : u64 {
    kCr0Pe = bit(0),
    kCr0Mp = bit(1),
    kCr0Em = bit(2),
    kCr0Ts = bit(3),
    kCr0Et = bit(4),
    kCr0Ne = bit(5),
    kCr0Wp = bit(16),
    kCr0Am = bit(18),
    kCr0Nw = bit(29),
    kCr0Cd = bit(30),
    kCr0Pg = bit(31),
    kCr0Known = kCr0Pe | kCr0Mp | kCr0Em | kCr0Ts | kCr0Et | kCr0Ne | kCr0Wp | kCr0Am | kCr0Nw |
                kCr0Cd | kCr0Pg,
};
enum Cr4 : u64 {
    kCr4Vme = bit(0),
    kCr4Pvi = bit(1),
    kCr4Tsd = bit(2),
    kCr4De = bit(3),
    kCr4Pse = bit(4),
    kCr4Pae = bit(5),
    kCr4Mce = bit(6),
    kCr4Pge = bit(7),
    kCr4Pce = bit(8),
    kCr4Osfxsr = bit(9),
    kCr4Osxmmexcpt = bit(10),
    kCr4Umip = bit(11),
    kCr4La57 = bit(12),
    kCr4Fsgsbase = bit(16),
    kCr4Pcide = bit(17),
    kCr4Osxsave = bit(18),
    kCr4Smep = bit(20),
    kCr4Smap = bit(21),
    kCr4Pke = bit(22),
};
constexpr u64 kEferLme = bit(8), kEferLma = bit(10);

const FeatureSet& features(const VcpuFrame& f) {
    return environment(f).cpuid.features;
}

u64 allowed_cr4(const FeatureSet& has) {
    struct Row {
        Feature feature;
        u64 bits;
    };
    static constexpr Row kRows[] = {
        {Feature::kVme, kCr4Vme | kCr4Pvi},
        {Feature::kTsc, kCr4Tsd},
        {Feature::kDe, kCr4De},
        {Feature::kPse, kCr4Pse},
        {Feature::kPae, kCr4Pae},
        {Feature::kMce, kCr4Mce},
        {Feature::kPge, kCr4Pge},
        {Feature::kFxsr, kCr4Osfxsr},
        {Feature::kSse, kCr4Osxmmexcpt},
        {Feature::kUmip, kCr4Umip},
        {Feature::kLa57, kCr4La57},
        {Feature::kFsgsbase, kCr4Fsgsbase},
        {Feature::kPcid, kCr4Pcide},
        {Feature::kXsave, kCr4Osxsave},
        {Feature::kSmep, kCr4Smep},
        {Feature::kSmap, kCr4Smap},
        {Feature::kPku, kCr4Pke},
    };
    u64 allowed = kCr4Pce;
    for (const Row& row : kRows) {
        if (has.has(row.feature)) allowed |= row.bits;
    }
    return allowed;
}

// --- Control registers ---------------------------------------------------------------------------

/// CR0 with everything that follows from it: paging on and off, EFER.LMA, PDPTEs (SDM
/// 3A, 2.5, 9.8.5).
bool write_cr0(VcpuFrame& f, u64 value) {
    if (value >> 32) return raise_gp(f);
    value = (value & kCr0Known) | kCr0Et;
    if ((value & kCr0Pg) && !(value & kCr0Pe)) return raise_gp(f);
    if ((value & kCr0Nw) && !(value & kCr0Cd)) return raise_gp(f);
    const u64 changed = value ^ f.cr0;
    u64 efer = f.msr.efer;
    if (changed & kCr0Pg) {
        if (value & kCr0Pg) {
            if (efer & kEferLme) {
                // Into IA-32e mode: PAE must be on, CS.L off, and TR no 16-bit TSS.
                bool ok =
                    (f.cr4 & kCr4Pae) && !f.seg[kCs].l() && (f.tr.unusable() || (f.tr.type() & 8));
                if (!ok) return raise_gp(f);
                efer |= kEferLma;
            }
        } else {
            if (f.long64() || (f.cr4 & kCr4Pcide)) return raise_gp(f);
            efer &= ~kEferLma;
        }
    }
    if (uses_pdptes(value, f.cr4, efer) && (changed & (kCr0Pg | kCr0Cd | kCr0Nw))) {
        u64 pdpte[4];
        if (!read_pdptes(f, f.cr3, pdpte)) return raise_gp(f);
        std::memcpy(f.pdpte, pdpte, sizeof pdpte);
    }
    f.cr0 = value;
    f.msr.efer = efer;
    // The segment registers keep what they hold; only what CPL means changes with PE.
    if (changed & kCr0Pe) f.cpl = 0;
    if (changed & (kCr0Pg | kCr0Wp | kCr0Pe)) flush_tlb(f);
    update_mode(f);
    return true;
}

bool write_cr3(VcpuFrame& f, u64 value) {
    if (f.mode & kModeLongActive) {
        if (f.cr4 & kCr4Pcide) value &= ~bit(63);  // "do not flush" is only a hint
        if (value & ~f.physical_mask) return raise_gp(f);
    } else {
        value = static_cast<u32>(value);
        if (uses_pdptes(f.cr0, f.cr4, f.msr.efer)) {
            u64 pdpte[4];
            if (!read_pdptes(f, value, pdpte)) return raise_gp(f);
            std::memcpy(f.pdpte, pdpte, sizeof pdpte);
        }
    }
    f.cr3 = value;
    flush_tlb(f);
    return true;
}

bool write_cr4(VcpuFrame& f, u64 value) {
    if (value & ~allowed_cr4(features(f))) return raise_gp(f);
    const u64 changed = value ^ f.cr4;
    const bool lma = f.msr.efer & kEferLma;
    if (lma && !(value & kCr4Pae)) return raise_gp(f);
    if (lma && (changed & kCr4La57)) return raise_gp(f);
    if ((changed & value & kCr4Pcide) && (!lma || (f.cr3 & 0xfff))) return raise_gp(f);
    if (uses_pdptes(f.cr0, value, f.msr.efer) &&
        (changed & (kCr4Pae | kCr4Pge | kCr4Pse | kCr4Smep))) {
        u64 pdpte[4];
        if (!read_pdptes(f, f.cr3, pdpte)) return raise_gp(f);
        std::memcpy(f.pdpte, pdpte, sizeof pdpte);
    }
    f.cr4 = value;
    if (changed &
        (kCr4Pse | kCr4Pae | kCr4Pge | kCr4La57 | kCr4Pcide | kCr4Smep | kCr4Smap | kCr4Pke)) {
        flush_tlb(f);
    }
    update_mode(f);
    return true;
}

bool mov_to_cr(VcpuFrame& f, const Insn& i, u64) {
    u64 value = read_reg(f, i.rm, f.long64() ? 8 : 4);
    switch (i.reg) {
        case 0:
            return write_cr0(f, value);
        case 2:
            f.cr2 = value;
            return true;
        case 3:
            return write_cr3(f, value);
        case 4:
            return write_cr4(f, value);
        case 8:
            if (value & ~u64{15}) return raise_gp(f);
            if (LocalInterrupts* lapic = environment(f).lapic) {
                lapic->set_cr8(static_cast<u8>(value));
            }
            return true;
        default:
            return raise_ud(f);
    }
}

bool mov_from_cr(VcpuFrame& f, const Insn& i, u64) {
    u64 value;
    switch (i.reg) {
        case 0:
            value = f.cr0;
            break;
        case 2:
            value = f.cr2;
            break;
        case 3:
            value = f.cr3;
            break;
        case 4:
            value = f.cr4;
            break;
        case 8:
            value = environment(f).lapic ? environment(f).lapic->cr8() : 0;
            break;
        default:
            return raise_ud(f);
    }
    write_reg(f, i.rm, f.long64() ? 8 : 4, value);
    return true;
}

bool clts(VcpuFrame& f, const Insn&, u64) {
    f.cr0 &= ~u64{kCr0Ts};
    update_mode(f);
    return true;
}

bool lmsw(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 value;
    if (i.has_mem) {
        if (!load(f, i, ea, value)) return false;
    } else {
        value = static_cast<u16>(f.gpr[i.rm]);
    }
    constexpr u64 kWritable = kCr0Pe | kCr0Mp | kCr0Em | kCr0Ts;
    u64 keep = f.cr0 & ~(kWritable & ~u64{kCr0Pe});  // PE can be set but not cleared
    return write_cr0(f, keep | (value & kWritable));
}

bool smsw(VcpuFrame& f, const Insn& i, u64 ea) {
    if ((f.cr4 & kCr4Umip) && f.cpl != 0) return raise_gp(f);
    if (i.has_mem) return store(f, i, ea, static_cast<u16>(f.cr0));
    write_reg(f, i.rm, i.opsize, f.cr0);
    return true;
}

// --- Debug registers -----------------------------------------------------------------------------

/// DR4 and DR5 are DR6 and DR7 without CR4.DE. False: #UD, or #DB for general detect.
bool debug_register(VcpuFrame& f, const Insn& i, u8& n) {
    n = i.reg;
    if (n > 7) return raise_ud(f);
    if (n == 4 || n == 5) {
        if (f.cr4 & kCr4De) return raise_ud(f);
        n += 2;
    }
    if (f.dr7 & bit(13)) {
        raise(f, kDb);
        f.fault.dr6 = bit(13);
        return false;
    }
    return true;
}

bool mov_from_dr(VcpuFrame& f, const Insn& i, u64) {
    u8 n;
    if (!debug_register(f, i, n)) return false;
    u64 value = n < 4 ? f.dr[n] : n == 6 ? f.dr6 : f.dr7;
    write_reg(f, i.rm, f.long64() ? 8 : 4, value);
    return true;
}

bool mov_to_dr(VcpuFrame& f, const Insn& i, u64) {
    u8 n;
    if (!debug_register(f, i, n)) return false;
    u64 value = read_reg(f, i.rm, f.long64() ? 8 : 4);
    if (n >= 6 && value >> 32) return raise_gp(f);
    if (n < 4) {
        f.dr[n] = value;
    } else if (n == 6) {
        f.dr6 = (value & 0xe00f) | 0xffff0ff0;
        return true;
    } else {
        f.dr7 = (value & 0xffff23ff) | 0x400;
    }
    // Pages with data breakpoints are kept out of the soft TLB.
    flush_tlb(f);
    update_mode(f);
    return true;
}

// --- MSRs, CPUID, time ---------------------------------------------------------------------------

bool rdmsr(VcpuFrame& f, const Insn&, u64) {
    u64 value;
    if (!read_msr(f, static_cast<u32>(f.gpr[kRcx]), value)) return raise_gp(f);
    f.gpr[kRax] = static_cast<u32>(value);
    f.gpr[kRdx] = value >> 32;
    return true;
}

bool wrmsr(VcpuFrame& f, const Insn&, u64) {
    u64 value = static_cast<u32>(f.gpr[kRax]) | f.gpr[kRdx] << 32;
    if (!write_msr(f, static_cast<u32>(f.gpr[kRcx]), value)) return raise_gp(f);
    return true;
}

/// Bytes of an XSAVE area for these components, standard format.
u32 xsave_size(u64 components) {
    return components & 4 ? 832 : 576;
}

bool cpuid(VcpuFrame& f, const Insn&, u64) {
    const u32 leaf = static_cast<u32>(f.gpr[kRax]), subleaf = static_cast<u32>(f.gpr[kRcx]);
    const Environment& env = environment(f);
    CpuidLeaf r = env.cpuid.find(leaf, subleaf, env.id);
    switch (leaf) {
        case 1:
            if (f.cr4 & kCr4Osxsave) r.ecx |= static_cast<u32>(bit(27));
            break;
        case 7:
            if (subleaf == 0 && (f.cr4 & kCr4Pke)) r.ecx |= static_cast<u32>(bit(4));
            break;
        case 0xd:
            if (subleaf <= 1 && r.ebx != 0) r.ebx = xsave_size(f.xcr0 | (subleaf ? f.msr.xss : 0));
            break;
        default:
            break;
    }
    f.gpr[kRax] = r.eax;
    f.gpr[kRbx] = r.ebx;
    f.gpr[kRcx] = r.ecx;
    f.gpr[kRdx] = r.edx;
    return true;
}

bool tsc_denied(VcpuFrame& f) {
    if (PV_LIKELY(!(f.cr4 & kCr4Tsd) || f.cpl == 0)) return false;
    raise_gp(f);
    return true;
}

bool rdtsc(VcpuFrame& f, const Insn&, u64) {
    if (tsc_denied(f)) return false;
    u64 tsc = read_tsc(f);
    f.gpr[kRax] = static_cast<u32>(tsc);
    f.gpr[kRdx] = tsc >> 32;
    return true;
}

bool rdtscp(VcpuFrame& f, const Insn& i, u64 ea) {
    if (!rdtsc(f, i, ea)) return false;
    f.gpr[kRcx] = static_cast<u32>(f.msr.tsc_aux);
    return true;
}

bool rdpid(VcpuFrame& f, const Insn& i, u64) {
    f.gpr[i.rm] = static_cast<u32>(f.msr.tsc_aux);
    return true;
}

bool rdpmc(VcpuFrame& f, const Insn&, u64) {
    return raise_gp(f);
}  // there are no counters

// --- Flags with privilege ------------------------------------------------------------------------

void set_if(VcpuFrame& f) {
    if (!(f.rflags_rest & kFlagI)) f.shadow = true;
    f.rflags_rest |= kFlagI;
}

/// CLI and STI without the IOPL for it: VME's and PVI's virtual flag (SDM 2A, CLI, table 3-7).
bool uses_virtual_if(const VcpuFrame& f) {
    if (f.vm86()) return f.cr4 & kCr4Vme;
    return f.cpl == 3 && (f.cr4 & kCr4Pvi);
}

bool cli(VcpuFrame& f, const Insn&, u64) {
    if (PV_LIKELY(f.cpl <= iopl(f))) {
        f.rflags_rest &= ~u64{kFlagI};
        return true;
    }
    if (!uses_virtual_if(f)) return raise_gp(f);
    f.rflags_rest &= ~u64{kFlagVif};
    return true;
}

bool sti(VcpuFrame& f, const Insn&, u64) {
    if (PV_LIKELY(f.cpl <= iopl(f))) {
        set_if(f);
        return true;
    }
    if (!uses_virtual_if(f) || (f.rflags_rest & kFlagVip)) return raise_gp(f);
    f.rflags_rest |= kFlagVif;
    return true;
}

bool pushf(VcpuFrame& f, const Insn& i, u64) {
    u64 image = f.rflags() & ~u64{kFlagVm | kFlagRf};
    if (PV_UNLIKELY(f.vm86() && iopl(f) < 3)) {
        if (!(f.cr4 & kCr4Vme) || i.opsize != 2) return raise_gp(f);
        image |= kFlagIopl;
        image = image & kFlagVif ? image | kFlagI : image & ~u64{kFlagI};
    }
    return push(f, image, i.opsize);
}

bool popf(VcpuFrame& f, const Insn& i, u64) {
    u64 mask = kFlagStatus | kFlagT | kFlagD | kFlagNt;
    if (i.opsize > 2) mask |= kFlagAc | kFlagId;
    bool virtual_if = false;
    if (PV_UNLIKELY(f.vm86())) {
        if (iopl(f) == 3) {
            mask |= kFlagI;
        } else {
            virtual_if = (f.cr4 & kCr4Vme) && i.opsize == 2;
            if (!virtual_if) return raise_gp(f);
        }
    } else {
        if (f.cpl <= iopl(f)) mask |= kFlagI;
        if (f.cpl == 0) mask |= kFlagIopl;
    }
    const u64 rsp = f.gpr[kRsp];
    u64 value;
    if (!pop(f, value, i.opsize)) return false;
    if (PV_UNLIKELY(virtual_if)) {
        bool wants_if = value & kFlagI;
        if ((value & kFlagT) || (wants_if && (f.rflags_rest & kFlagVip))) {
            f.gpr[kRsp] = rsp;
            return raise_gp(f);
        }
        mask |= kFlagVif;
        value = wants_if ? value | kFlagVif : value & ~u64{kFlagVif};
    }
    const u64 before = f.rflags();
    const u64 after = (before & ~mask & ~u64{kFlagRf}) | (value & mask);
    f.set_rflags(after);
    if ((before ^ after) & (kFlagT | kFlagAc)) update_mode(f);
    return true;
}

template <bool set>
bool access_check(VcpuFrame& f, const Insn&, u64) {
    if (f.cpl != 0 || f.vm86()) return raise_ud(f);
    f.rflags_rest = set ? f.rflags_rest | kFlagAc : f.rflags_rest & ~u64{kFlagAc};
    f.tlb_now = &f.tlb[!set && (f.cr4 & kCr4Smap) ? kTlbSupervisor : kTlbSupervisorAc];
    return true;
}

// --- The rest ------------------------------------------------------------------------------------

bool hlt(VcpuFrame& f, const Insn&, u64) {
    f.activity = Activity::kHalted;
    return true;
}

bool invlpg(VcpuFrame& f, const Insn& i, u64 ea) {
    u64 linear;
    if (f.long64()) {
        linear = i.segment < kFs ? ea : ea + f.seg[i.segment].base;
        if (!is_canonical(f, linear)) return true;  // does nothing, and does not fault
    } else {
        linear = static_cast<u32>(f.seg[i.segment].base + ea);
    }
    flush_page(f, linear);
    return true;
}

bool invpcid(VcpuFrame& f, const Insn& i, u64 ea) {
    u64 descriptor[2];
    if (!load(f, i, ea, descriptor)) return false;
    const u64 type = read_reg(f, i.reg, f.long64() ? 8 : 4);
    if (type > 3) return raise_gp(f);
    if (type <= 1) {
        if (descriptor[0] >> 12) return raise_gp(f);
        if (!(f.cr4 & kCr4Pcide) && descriptor[0]) return raise_gp(f);
    }
    if (type == 0) {
        if (!is_canonical(f, descriptor[1])) return raise_gp(f);
        flush_page(f, descriptor[1]);
    } else {
        flush_tlb(f);
    }
    return true;
}

bool nothing(VcpuFrame&, const Insn&, u64) {
    return true;
}

bool monitor(VcpuFrame& f, const Insn& i, u64) {
    if (f.cpl != 0) return raise_ud(f);
    if (static_cast<u32>(f.gpr[kRcx])) return raise_gp(f);
    u8 byte;  // checked like a load of DS:rAX
    return load(f, i, read_reg(f, kRax, i.addrsize), byte);
}

// No store is watched for, so MWAIT ends at once, as it may (SDM 2B, MWAIT).
bool mwait(VcpuFrame& f, const Insn&, u64) {
    if (f.cpl != 0) return raise_ud(f);
    return true;
}

bool xsetbv(VcpuFrame& f, const Insn&, u64) {
    if (!(f.cr4 & kCr4Osxsave)) return raise_ud(f);
    if (f.cpl != 0 || static_cast<u32>(f.gpr[kRcx]) != 0) return raise_gp(f);
    const u64 value = static_cast<u32>(f.gpr[kRax]) | f.gpr[kRdx] << 32;
    const u64 allowed = features(f).has(Feature::kAvx) ? 7 : 3;
    if ((value & ~allowed) || !(value & 1) || (value & 6) == 4) return raise_gp(f);
    f.xcr0 = value;
    update_mode(f);
    return true;
}

bool hypercall(VcpuFrame& f, const Insn&, u64) {
    Environment& env = environment(f);
    if (env.hypercall_exits) {
        env.exit = {};
        env.exit.reason = ExitReason::kHypercall;
        f.fault = Fault{.pending = Pending::kExit, .trap = true};  // RIP is already the next one's
        return false;
    }
    if (!features(f).has(Feature::kKvmClock)) return raise_ud(f);
    // What KVM answers: -EPERM outside ring 0, -ENOSYS to calls it does not know.
    f.gpr[kRax] = f.cpl != 0 ? static_cast<u64>(-1) : static_cast<u64>(-1000);
    if (!f.long64()) f.gpr[kRax] = static_cast<u32>(f.gpr[kRax]);
    return true;
}

const OpBinding kSystemOps[] = {
    bind<Op::MOV_Cd_Rv, mov_to_cr>(),
    bind<Op::MOV_Rv_Cd, mov_from_cr>(),
    bind<Op::MOV_Dd_Rv, mov_to_dr>(),
    bind<Op::MOV_Rv_Dd, mov_from_dr>(),
    bind<Op::CLTS, clts>(),
    bind<Op::LMSW_Ew, lmsw>(),
    bind<Op::SMSW_Mw, smsw>(),
    bind<Op::SMSW_Rv, smsw>(),
    bind<Op::RDMSR, rdmsr>(),
    bind<Op::WRMSR, wrmsr>(),
    bind<Op::CPUID, cpuid>(),
    bind<Op::RDTSC, rdtsc>(),
    bind<Op::RDTSCP, rdtscp>(),
    bind<Op::RDPID_Rv, rdpid>(),
    bind<Op::RDPMC, rdpmc>(),
    bind<Op::CLI, cli>(),
    bind<Op::STI, sti>(),
    bind<Op::PUSHF_Fv, pushf>(),
    bind<Op::POPF_Fv, popf>(),
    bind<Op::CLAC, access_check<false>>(),
    bind<Op::STAC, access_check<true>>(),
    bind<Op::HLT, hlt>(),
    bind<Op::INVLPG_M, invlpg>(),
    bind<Op::INVPCID_Gv_Mdq, invpcid>(),
    bind<Op::INVD, nothing>(),
    bind<Op::WBINVD, nothing>(),
    bind<Op::SERIALIZE, nothing>(),
    bind<Op::MONITOR, monitor>(),
    bind<Op::MWAIT, mwait>(),
    bind<Op::XSETBV, xsetbv>(),
    bind<Op::VMCALL, hypercall>(),
    bind<Op::VMMCALL, hypercall>(),
};

}  // namespace

std::span<const OpBinding> system_ops() {
    return kSystemOps;
}

}  // namespace polyvisor::soft
