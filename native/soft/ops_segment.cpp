// Segment registers and descriptor tables: loads with all descriptor checks (SDM 3A, 5.4 to 5.6),
// LAR/LSL/VERR/VERW/ARPL, LGDT and its family with UMIP, FS/GS bases.
#include "soft/bindings.hpp"
#include "soft/descriptors.hpp"

namespace polyvisor::soft {

// --- Descriptors ---------------------------------------------------------------------------------

u64 descriptor_address(const VcpuFrame& f, u16 selector) {
    return (selector & 4 ? f.ldtr.base : f.gdtr.base) + (selector & 0xfff8);
}

namespace {

bool in_table(const VcpuFrame& f, u16 selector, u32 size) {
    u32 last = (selector & 0xfff8u) + size - 1;
    if (selector & 4) return !f.ldtr.unusable() && last <= f.ldtr.limit;
    return last <= f.gdtr.limit;
}

}  // namespace

bool fetch_descriptor(VcpuFrame& f, u16 selector, Descriptor& d, u8 vector, u32 ext) {
    if (PV_UNLIKELY(!in_table(f, selector, 8))) {
        return raise(f, vector, selector_error(selector, ext));
    }
    d.upper = 0;
    return read_system(f, descriptor_address(f, selector), d.raw);
}

bool fetch_upper(VcpuFrame& f, u16 selector, Descriptor& d, u8 vector, u32 ext) {
    if (!in_table(f, selector, 16)) return raise(f, vector, selector_error(selector, ext));
    return read_system(f, descriptor_address(f, selector) + 8, d.upper);
}

bool mark_accessed(VcpuFrame& f, u16 selector, Descriptor& d) {
    if (PV_LIKELY(d.raw & bit(40))) return true;
    d.raw |= bit(40);
    u64 at = descriptor_address(f, selector) + 5;
    if (u8* host = writable_host(f, at, 1, Privilege::kSupervisor)) {
        __atomic_fetch_or(host, u8{1}, __ATOMIC_SEQ_CST);
        return true;
    }
    if (f.fault.pending != Pending::kNone) return false;
    u8 access = static_cast<u8>(d.raw >> 40);
    return write_system(f, at, access);
}

void load_real_segment(VcpuFrame& f, u8 seg, u16 selector) {
    Segment& s = f.seg[seg];
    s.selector = selector;
    s.base = u64{selector} << 4;
    if (f.vm86()) {
        s.limit = 0xffff;
        s.attributes = 0xf3;
        return;
    }
    // Real mode keeps the hidden limit and size ("unreal mode"), but any segment can be written.
    if (s.unusable()) s.limit = 0xffff;
    s.attributes = (s.attributes & static_cast<u32>(bit(14) | bit(15))) | 0x93;
}

bool check_stack_segment(VcpuFrame& f, u16 selector, u8 cpl, u8 vector, u32 ext, Segment& ss) {
    if (null_selector(selector)) return raise(f, vector, ext);
    Descriptor d;
    if (!fetch_descriptor(f, selector, d, vector, ext)) return false;
    if ((selector & 3) != cpl || !d.writable_data() || d.dpl() != cpl) {
        return raise(f, vector, selector_error(selector, ext));
    }
    if (!d.present()) return raise(f, kSsFault, selector_error(selector, ext));
    if (!mark_accessed(f, selector, d)) return false;
    ss = make_segment(selector, d);
    return true;
}

bool load_segment(VcpuFrame& f, u8 seg, u16 selector) {
    if (!f.protected_mode()) {
        load_real_segment(f, seg, selector);
        return true;
    }
    if (seg == kSs) {
        if (PV_UNLIKELY(null_selector(selector))) {
            bool allowed = f.long64() && f.cpl != 3 && (selector & 3) == f.cpl;
            if (!allowed) return raise_gp(f);
            f.seg[kSs] = null_segment(selector, f.cpl);
            return true;
        }
        return check_stack_segment(f, selector, f.cpl, kGp, 0, f.seg[kSs]);
    }
    if (null_selector(selector)) {
        f.seg[seg] = null_segment(selector);
        return true;
    }
    Descriptor d;
    if (!fetch_descriptor(f, selector, d)) return false;
    u8 rpl = selector & 3;
    bool good = d.s() && d.readable() && (d.conforming() || (d.dpl() >= f.cpl && d.dpl() >= rpl));
    if (!good) return raise_gp(f, selector_error(selector));
    if (!d.present()) return raise(f, kNp, selector_error(selector));
    if (!mark_accessed(f, selector, d)) return false;
    f.seg[seg] = make_segment(selector, d);
    return true;
}

void drop_privileged_segments(VcpuFrame& f) {
    for (u8 seg : {kEs, kDs, kFs, kGs}) {
        const Segment& s = f.seg[seg];
        if (s.unusable()) {
            // A null selector's RPL may survive, but not in a register that looks loaded.
            continue;
        }
        bool conforming = (s.type() & 0xc) == 0xc;
        if (s.s() && !conforming && s.dpl() < f.cpl) f.seg[seg] = null_segment(0);
    }
}

namespace {

// --- MOV, PUSH, POP of segment registers ---------------------------------------------------------

bool mov_mw_sw(VcpuFrame& f, const Insn& i, u64 ea) {
    if (i.reg > kGs) return raise_ud(f);
    return store<u16>(f, i, ea, f.seg[i.reg].selector);
}

bool mov_rv_sw(VcpuFrame& f, const Insn& i, u64) {
    if (i.reg > kGs) return raise_ud(f);
    write_reg(f, i.rm, i.opsize, f.seg[i.reg].selector);
    return true;
}

void shadow_after_ss(VcpuFrame& f, u8 seg) {
    if (seg == kSs) f.shadow = f.shadow_ss = true;
}

bool mov_sw_ew(VcpuFrame& f, const Insn& i, u64 ea) {
    if (i.reg > kGs || i.reg == kCs) return raise_ud(f);
    u16 selector;
    if (i.has_mem) {
        if (!load(f, i, ea, selector)) return false;
    } else {
        selector = static_cast<u16>(f.gpr[i.rm]);
    }
    if (!load_segment(f, i.reg, selector)) return false;
    shadow_after_ss(f, i.reg);
    update_mode(f);
    return true;
}

template <u8 seg>
bool push_segment(VcpuFrame& f, const Insn& i, u64) {
    // A 32-bit push of a segment register writes two bytes on Intel CPUs and leaves the rest of the
    // slot; the slot is checked as a whole by neither vendor's manual. Zero-extended as AMD does.
    return push(f, f.seg[seg].selector, i.opsize);
}

template <u8 seg>
bool pop_segment(VcpuFrame& f, const Insn& i, u64) {
    u64 rsp = f.gpr[kRsp];
    u64 value;
    if (!pop(f, value, i.opsize)) return false;
    if (!load_segment(f, seg, static_cast<u16>(value))) {
        f.gpr[kRsp] = rsp;
        return false;
    }
    shadow_after_ss(f, seg);
    update_mode(f);
    return true;
}

template <u8 seg>
bool load_far_pointer(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 bytes[10];
    if (!load_bytes(f, i, ea, bytes, i.opsize + 2)) return false;
    u64 offset = 0;
    u16 selector;
    std::memcpy(&offset, bytes, i.opsize);
    std::memcpy(&selector, bytes + i.opsize, 2);
    if (!load_segment(f, seg, selector)) return false;
    write_reg(f, i.reg, i.opsize, offset);
    update_mode(f);
    return true;
}

// --- Questions about descriptors -----------------------------------------------------------------

void set_zf(VcpuFrame& f, bool zf) {
    constexpr u16 kZfBit = kFlagZ << 8;
    f.oszapc = static_cast<u16>(zf ? f.oszapc | kZfBit : f.oszapc & ~kZfBit);
}

bool selector_operand(VcpuFrame& f, const Insn& i, u64 ea, u16& selector) {
    if (i.has_mem) return load(f, i, ea, selector);
    selector = static_cast<u16>(f.gpr[i.rm]);
    return true;
}

/// Reads the descriptor of a selector whose invalidity is no fault. False: a page fault is pending,
/// or (`found` false) there is no such descriptor.
bool peek_descriptor(VcpuFrame& f, u16 selector, Descriptor& d, bool& found) {
    found = !null_selector(selector) && in_table(f, selector, 8);
    return !found || read_system(f, descriptor_address(f, selector), d.raw);
}

bool visible(const VcpuFrame& f, u16 selector, const Descriptor& d) {
    if (d.code() && d.conforming()) return true;
    return d.dpl() >= f.cpl && d.dpl() >= (selector & 3);
}

template <bool want_limit>
bool lar_lsl(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 selector;
    if (!selector_operand(f, i, ea, selector)) return false;
    Descriptor d;
    bool found;
    if (!peek_descriptor(f, selector, d, found)) return false;
    if (found && !d.s()) {
        switch (d.type()) {
            case kTss16:
            case kTss16Busy:
                found = !long_active(f);
                break;
            case kCallGate16:
            case kTaskGate:
                found = !want_limit && !long_active(f);
                break;
            case kCallGate:
                found = !want_limit;
                break;
            case kLdt:
            case kTss:
            case kTssBusy:
                break;
            default:
                found = false;
        }
    }
    found = found && visible(f, selector, d);
    set_zf(f, found);
    if (found) {
        u64 value = want_limit ? d.limit() : (d.raw >> 32) & 0x00ffff00;
        write_reg(f, i.reg, i.opsize, value);
    }
    return true;
}

template <bool write>
bool verify(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 selector;
    if (!selector_operand(f, i, ea, selector)) return false;
    Descriptor d;
    bool found;
    if (!peek_descriptor(f, selector, d, found)) return false;
    bool ok =
        found && d.s() && visible(f, selector, d) && (write ? d.writable_data() : d.readable());
    set_zf(f, ok);
    return true;
}

bool arpl(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 dst;
    if (!selector_operand(f, i, ea, dst)) return false;
    u16 src = static_cast<u16>(f.gpr[i.reg]);
    bool raised = (dst & 3) < (src & 3);
    if (raised) {
        dst = static_cast<u16>((dst & ~3) | (src & 3));
        if (i.has_mem) {
            if (!store(f, i, ea, dst)) return false;
        } else {
            write_reg(f, i.rm, 2, dst);
        }
    }
    set_zf(f, raised);
    return true;
}

// --- Table registers -----------------------------------------------------------------------------

/// UMIP: SGDT, SIDT, SLDT, STR and SMSW are for CPL 0.
bool umip_denies(VcpuFrame& f) {
    if (PV_LIKELY(!(f.cr4 & bit(11)) || f.cpl == 0)) return false;
    raise_gp(f);
    return true;
}

template <DescriptorTable VcpuFrame::* table>
bool store_table(VcpuFrame& f, const Insn& i, u64 ea) {
    if (umip_denies(f)) return false;
    const DescriptorTable& t = f.*table;
    u8 bytes[10];
    std::memcpy(bytes, &t.limit, 2);
    std::memcpy(bytes + 2, &t.base, 8);
    return store_bytes(f, i, ea, bytes, f.long64() ? 10 : 6);
}

template <DescriptorTable VcpuFrame::* table>
bool load_table(VcpuFrame& f, const Insn& i, u64 ea) {
    u8 bytes[10]{};
    if (!load_bytes(f, i, ea, bytes, f.long64() ? 10 : 6)) return false;
    DescriptorTable t;
    std::memcpy(&t.limit, bytes, 2);
    std::memcpy(&t.base, bytes + 2, 8);
    if (!f.long64()) t.base &= i.opsize == 2 ? 0xffffff : 0xffffffff;
    if (!is_canonical(f, t.base)) return raise_gp(f);
    f.*table = t;
    return true;
}

bool store_selector(VcpuFrame& f, const Insn& i, u64 ea, u16 selector) {
    if (umip_denies(f)) return false;
    if (i.has_mem) return store(f, i, ea, selector);
    write_reg(f, i.rm, i.opsize, selector);
    return true;
}

bool sldt(VcpuFrame& f, const Insn& i, u64 ea) {
    return store_selector(f, i, ea, f.ldtr.selector);
}
bool str(VcpuFrame& f, const Insn& i, u64 ea) {
    return store_selector(f, i, ea, f.tr.selector);
}

bool lldt(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 selector;
    if (!selector_operand(f, i, ea, selector)) return false;
    if (null_selector(selector)) {
        f.ldtr = null_segment(selector);
        return true;
    }
    if (selector & 4) return raise_gp(f, selector_error(selector));
    Descriptor d;
    if (!fetch_descriptor(f, selector, d)) return false;
    if (d.s() || d.type() != kLdt) return raise_gp(f, selector_error(selector));
    if (!d.present()) return raise(f, kNp, selector_error(selector));
    if (long_active(f)) {
        if (!fetch_upper(f, selector, d)) return false;
        if (!is_canonical(f, d.base64())) return raise_gp(f, selector_error(selector));
    }
    f.ldtr = make_segment(selector, d);
    f.ldtr.base = d.base64();
    return true;
}

bool ltr(VcpuFrame& f, const Insn& i, u64 ea) {
    u16 selector;
    if (!selector_operand(f, i, ea, selector)) return false;
    if (null_selector(selector)) return raise_gp(f);
    if (selector & 4) return raise_gp(f, selector_error(selector));
    Descriptor d;
    if (!fetch_descriptor(f, selector, d)) return false;
    bool available = d.type() == kTss || (d.type() == kTss16 && !long_active(f));
    if (d.s() || !available) return raise_gp(f, selector_error(selector));
    if (!d.present()) return raise(f, kNp, selector_error(selector));
    if (long_active(f)) {
        if (!fetch_upper(f, selector, d)) return false;
        if (!is_canonical(f, d.base64()) || bits(d.upper, 44, 40)) {
            return raise_gp(f, selector_error(selector));
        }
    }
    d.raw |= bit(41);  // busy
    if (!write_system(f, descriptor_address(f, selector) + 5, static_cast<u8>(d.raw >> 40))) {
        return false;
    }
    f.tr = make_segment(selector, d);
    f.tr.base = d.base64();
    return true;
}

// --- FS and GS bases -----------------------------------------------------------------------------

bool fsgsbase_off(VcpuFrame& f) {
    if (PV_LIKELY(f.cr4 & bit(16))) return false;
    raise_ud(f);
    return true;
}

template <u8 seg>
bool read_base(VcpuFrame& f, const Insn& i, u64) {
    if (fsgsbase_off(f)) return false;
    write_reg(f, i.rm, i.rex_w ? 8 : 4, f.seg[seg].base);
    return true;
}

template <u8 seg>
bool write_base(VcpuFrame& f, const Insn& i, u64) {
    if (fsgsbase_off(f)) return false;
    u64 base = read_reg(f, i.rm, i.rex_w ? 8 : 4);
    if (!is_canonical(f, base)) return raise_gp(f);
    f.seg[seg].base = base;
    return true;
}

bool swapgs(VcpuFrame& f, const Insn&, u64) {
    std::swap(f.seg[kGs].base, f.msr.kernel_gs_base);
    return true;
}

const OpBinding kSegmentOps[] = {
    bind<Op::MOV_Mw_Sw, mov_mw_sw>(),
    bind<Op::MOV_Rv_Sw, mov_rv_sw>(),
    bind<Op::MOV_Sw_Ew, mov_sw_ew>(),
    bind<Op::PUSH_ES, push_segment<kEs>>(),
    bind<Op::PUSH_CS, push_segment<kCs>>(),
    bind<Op::PUSH_SS, push_segment<kSs>>(),
    bind<Op::PUSH_DS, push_segment<kDs>>(),
    bind<Op::PUSH_FS, push_segment<kFs>>(),
    bind<Op::PUSH_GS, push_segment<kGs>>(),
    bind<Op::POP_ES, pop_segment<kEs>>(),
    bind<Op::POP_SS, pop_segment<kSs>>(),
    bind<Op::POP_DS, pop_segment<kDs>>(),
    bind<Op::POP_FS, pop_segment<kFs>>(),
    bind<Op::POP_GS, pop_segment<kGs>>(),
    bind<Op::LES_Gv_Mp, load_far_pointer<kEs>>(),
    bind<Op::LDS_Gv_Mp, load_far_pointer<kDs>>(),
    bind<Op::LSS_Gv_Mp, load_far_pointer<kSs>>(),
    bind<Op::LFS_Gv_Mp, load_far_pointer<kFs>>(),
    bind<Op::LGS_Gv_Mp, load_far_pointer<kGs>>(),
    bind<Op::LAR_Gv_Ew, lar_lsl<false>>(),
    bind<Op::LSL_Gv_Ew, lar_lsl<true>>(),
    bind<Op::VERR_Ew, verify<false>>(),
    bind<Op::VERW_Ew, verify<true>>(),
    bind<Op::ARPL_Ew_Gw, arpl>(),
    bind<Op::SGDT_Ms, store_table<&VcpuFrame::gdtr>>(),
    bind<Op::SIDT_Ms, store_table<&VcpuFrame::idtr>>(),
    bind<Op::LGDT_Ms, load_table<&VcpuFrame::gdtr>>(),
    bind<Op::LIDT_Ms, load_table<&VcpuFrame::idtr>>(),
    bind<Op::SLDT_Mw, sldt>(),
    bind<Op::SLDT_Rv, sldt>(),
    bind<Op::STR_Mw, str>(),
    bind<Op::STR_Rv, str>(),
    bind<Op::LLDT_Ew, lldt>(),
    bind<Op::LTR_Ew, ltr>(),
    bind<Op::RDFSBASE_Ry, read_base<kFs>>(),
    bind<Op::RDGSBASE_Ry, read_base<kGs>>(),
    bind<Op::WRFSBASE_Ry, write_base<kFs>>(),
    bind<Op::WRGSBASE_Ry, write_base<kGs>>(),
    bind<Op::SWAPGS, swapgs>(),
};

}  // namespace

std::span<const OpBinding> segment_ops() {
    return kSegmentOps;
}

}  // namespace polyvisor::soft
