// Task state segments: inner stacks, I/O and redirection bitmaps, and hardware task switches
// (SDM 3A, chapter 7).
//
// A task switch is checked before anything changes: both TSSs are read or probed first. From the
// point where TR is loaded, faults belong to the new task (SDM 3A, 7.3, steps 11 and 12): they are
// raised with fault.trap set, so that the new task's EIP is kept.
#include "soft/descriptors.hpp"
#include "soft/paging.hpp"

namespace polyvisor::soft {
namespace {

bool tss_is_wide(const Segment& tr) {
    return tr.type() & 8;
}

}  // namespace

bool inner_stack(VcpuFrame& f, u8 cpl, u32 ext, u16& ss, u32& esp) {
    const u32 tr_error = selector_error(f.tr.selector, ext);
    if (tss_is_wide(f.tr)) {
        u32 offset = 4 + cpl * 8u;
        if (offset + 5 > f.tr.limit) return raise(f, kTs, tr_error);
        return read_system(f, f.tr.base + offset, esp) &&
               read_system(f, f.tr.base + offset + 4, ss);
    }
    u32 offset = 2 + cpl * 4u;
    if (offset + 3 > f.tr.limit) return raise(f, kTs, tr_error);
    u16 sp;
    if (!read_system(f, f.tr.base + offset, sp)) return false;
    esp = sp;
    return read_system(f, f.tr.base + offset + 2, ss);
}

bool inner_stack64(VcpuFrame& f, u8 cpl, u8 ist, u32 ext, u64& rsp) {
    u32 offset = ist ? 0x1c + ist * 8u : 4 + cpl * 8u;
    if (offset + 7 > f.tr.limit) return raise(f, kTs, selector_error(f.tr.selector, ext));
    return read_system(f, f.tr.base + offset, rsp);
}

bool io_bitmap_allows(VcpuFrame& f, u16 port, u32 size) {
    constexpr u32 kMapBase = 0x66;
    if (f.tr.unusable() || !tss_is_wide(f.tr) || kMapBase + 1 > f.tr.limit) return raise_gp(f);
    u16 base;
    if (!read_system(f, f.tr.base + kMapBase, base)) return false;
    // Two bytes are always read, so the byte after the last port's must be inside the segment too.
    u32 at = base + port / 8u;
    if (at + 1 > f.tr.limit) return raise_gp(f);
    u16 map;
    if (!read_system(f, f.tr.base + at, map)) return false;
    u32 mask = (1u << size) - 1;
    return (map >> (port & 7) & mask) == 0 || raise_gp(f);
}

bool vme_redirects(VcpuFrame& f, u8 vector, bool& redirects) {
    constexpr u32 kMapBase = 0x66;
    if (!tss_is_wide(f.tr) || kMapBase + 1 > f.tr.limit) return raise_gp(f);
    u16 base;
    if (!read_system(f, f.tr.base + kMapBase, base)) return false;
    u32 at = base - 32u + vector / 8u;
    if (base < 32 || at > f.tr.limit) return raise_gp(f);
    u8 map;
    if (!read_system(f, f.tr.base + at, map)) return false;
    redirects = !(map >> (vector & 7) & 1);
    return true;
}

bool fetch_tss(VcpuFrame& f, u16 selector, Descriptor& tss, u32 ext) {
    if (null_selector(selector) || (selector & 4)) {
        return raise_gp(f, selector_error(selector, ext));
    }
    if (!fetch_descriptor(f, selector, tss, kGp, ext)) return false;
    if (tss.s() || (tss.type() != kTss && tss.type() != kTss16)) {
        return raise_gp(f, selector_error(selector, ext));
    }
    if (!tss.present()) return raise(f, kNp, selector_error(selector, ext));
    return true;
}

namespace {

// Images as they stand in memory. The 16-bit one is converted to this one's fields.
struct Task {
    u32 cr3 = 0;
    u32 eip = 0, eflags = 0;
    u32 gpr[8]{};
    u16 seg[6]{};  // ES CS SS DS FS GS
    u16 ldt = 0;
    bool trap = false;
};

struct Tss32 {
    u32 link, esp0, ss0, esp1, ss1, esp2, ss2, cr3;
    u32 eip, eflags, gpr[8], seg[6];  // the part that a switch saves
    u32 ldt;
    u16 trap, io_map;
};
static_assert(sizeof(Tss32) == 0x68);

struct Tss16 {
    u16 link, sp0, ss0, sp1, ss1, sp2, ss2;
    u16 ip, flags, gpr[8], seg[4];  // the part that a switch saves
    u16 ldt;
};
static_assert(sizeof(Tss16) == 0x2c);

constexpr u32 kSaved32 = 0x20, kSaved32Size = 0x40, kSaved16 = 0x0e, kSaved16Size = 0x1c;

bool read_task(VcpuFrame& f, u64 base, bool wide, Task& task) {
    if (wide) {
        Tss32 t;
        if (!read_system(f, base, t)) return false;
        task.cr3 = t.cr3, task.eip = t.eip, task.eflags = t.eflags;
        for (int n = 0; n < 8; ++n) task.gpr[n] = t.gpr[n];
        for (int n = 0; n < 6; ++n) task.seg[n] = static_cast<u16>(t.seg[n]);
        task.ldt = static_cast<u16>(t.ldt);
        task.trap = t.trap & 1;
        return true;
    }
    Tss16 t;
    if (!read_system(f, base, t)) return false;
    task.eip = t.ip, task.eflags = t.flags;
    for (int n = 0; n < 8; ++n) task.gpr[n] = t.gpr[n] | 0xffff0000;
    for (int n = 0; n < 4; ++n) task.seg[n] = t.seg[n];
    task.ldt = t.ldt;
    return true;
}

bool save_task(VcpuFrame& f, u64 base, bool wide, u64 flags) {
    if (wide) {
        u32 image[kSaved32Size / 4];
        image[0] = static_cast<u32>(f.rip);
        image[1] = static_cast<u32>(flags);
        for (int n = 0; n < 8; ++n) image[2 + n] = static_cast<u32>(f.gpr[n]);
        for (int n = 0; n < 6; ++n) image[10 + n] = f.seg[n].selector;
        return write_system(f, base + kSaved32, image);
    }
    u16 image[kSaved16Size / 2];
    image[0] = static_cast<u16>(f.rip);
    image[1] = static_cast<u16>(flags);
    for (int n = 0; n < 8; ++n) image[2 + n] = static_cast<u16>(f.gpr[n]);
    for (int n = 0; n < 4; ++n) image[10 + n] = f.seg[n].selector;
    return write_system(f, base + kSaved16, image);
}

bool set_busy(VcpuFrame& f, u16 selector, bool busy) {
    u64 at = descriptor_address(f, selector) + 5;
    u8 access;
    if (!read_system(f, at, access)) return false;
    access = static_cast<u8>(busy ? access | 2 : access & ~2);
    return write_system(f, at, access);
}

bool load_task_ldt(VcpuFrame& f, u16 selector, u32 ext) {
    f.ldtr = null_segment(selector);
    if (null_selector(selector)) return true;
    const u32 error = selector_error(selector, ext);
    if (selector & 4) return raise(f, kTs, error);
    Descriptor d;
    if (!fetch_descriptor(f, selector, d, kTs, ext)) return false;
    if (d.s() || d.type() != kLdt || !d.present()) return raise(f, kTs, error);
    f.ldtr = make_segment(selector, d);
    return true;
}

bool load_task_code(VcpuFrame& f, u16 selector, u32 ext) {
    const u32 error = selector_error(selector, ext);
    if (null_selector(selector)) return raise(f, kTs, error);
    Descriptor d;
    if (!fetch_descriptor(f, selector, d, kTs, ext)) return false;
    const u8 rpl = selector & 3;
    if (!d.code() || (d.conforming() ? d.dpl() > rpl : d.dpl() != rpl)) {
        return raise(f, kTs, error);
    }
    if (!d.present()) return raise(f, kNp, error);
    if (!mark_accessed(f, selector, d)) return false;
    f.seg[kCs] = make_segment(selector, d);
    return true;
}

bool load_task_data(VcpuFrame& f, u8 seg, u16 selector, u32 ext) {
    if (null_selector(selector)) return true;  // already null
    const u32 error = selector_error(selector, ext);
    Descriptor d;
    if (!fetch_descriptor(f, selector, d, kTs, ext)) return false;
    bool good = d.s() && d.readable() &&
                (d.conforming() || (d.dpl() >= f.cpl && d.dpl() >= (selector & 3)));
    if (!good) return raise(f, kTs, error);
    if (!d.present()) return raise(f, kNp, error);
    if (!mark_accessed(f, selector, d)) return false;
    f.seg[seg] = make_segment(selector, d);
    return true;
}

/// Everything that a fault in the new task's context can interrupt.
bool load_task_segments(VcpuFrame& f, const Task& task, u32 ext) {
    for (u8 seg = 0; seg < kSegmentCount; ++seg) f.seg[seg] = null_segment(task.seg[seg]);
    if (!load_task_ldt(f, task.ldt, ext)) return false;
    if (f.rflags_rest & kFlagVm) {
        f.cpl = 3;
        f.mode |= kModeVm86;
        for (u8 seg = 0; seg < kSegmentCount; ++seg) load_real_segment(f, seg, task.seg[seg]);
        return true;
    }
    f.mode &= ~u32{kModeVm86};
    f.mode |= kModeProtected;
    f.cpl = task.seg[kCs] & 3;
    if (!load_task_code(f, task.seg[kCs], ext)) return false;
    if (!check_stack_segment(f, task.seg[kSs], f.cpl, kTs, ext, f.seg[kSs])) return false;
    for (u8 seg : {kEs, kDs, kFs, kGs}) {
        if (!load_task_data(f, seg, task.seg[seg], ext)) return false;
    }
    return true;
}

bool enter_task(VcpuFrame& f, const Task& task, bool wide, u32 ext, const u32* error) {
    bool ok = load_task_segments(f, task, ext);
    update_mode(f);
    if (ok && f.rip > f.seg[kCs].limit) ok = raise_gp(f, ext);
    if (ok && error != nullptr) {
        StackFrame stack(f, f.seg[kSs], f.gpr[kRsp], false, f.cpl, ext);
        ok = stack.push(*error, wide ? 4 : 2);
        if (ok) stack.commit();
    }
    if (ok && task.trap) {
        raise(f, kDb);
        f.fault.dr6 = bit(15);
        ok = false;
    }
    if (!ok) f.fault.trap = true;  // the new task's EIP stays
    return ok;
}

}  // namespace

bool task_switch(VcpuFrame& f, u16 selector, const Descriptor& tss, TaskSwitch kind, u32 ext,
                 const u32* error) {
    const bool wide = tss.type() & 8;
    const bool old_wide = tss_is_wide(f.tr);
    const u32 minimum = wide ? sizeof(Tss32) - 1 : sizeof(Tss16) - 1;
    if (tss.limit() < minimum) return raise(f, kTs, selector_error(selector, ext));
    if (f.tr.limit < (old_wide ? 0x5fu : 0x29u)) {
        return raise(f, kTs, selector_error(f.tr.selector, ext));
    }

    // Everything that can fault without harm, first.
    Task task;
    if (!read_task(f, tss.base(), wide, task)) return false;
    const bool nested = kind == TaskSwitch::kCall || kind == TaskSwitch::kEvent;
    if (nested && !probe_write_linear(f, tss.base(), 2, Privilege::kSupervisor)) return false;
    const bool new_cr3 = wide && (f.cr0 & bit(31));
    u64 pdpte[4];
    const bool pae = uses_pdptes(f.cr0, f.cr4, f.msr.efer);
    if (new_cr3 && pae && !read_pdptes(f, task.cr3, pdpte)) return raise_gp(f, ext);

    u64 flags = f.rflags();
    if (kind == TaskSwitch::kReturn) flags &= ~u64{kFlagNt};
    if (!save_task(f, f.tr.base, old_wide, flags)) return false;
    if (!nested && !set_busy(f, f.tr.selector, false)) return false;
    if (kind != TaskSwitch::kReturn && !set_busy(f, selector, true)) return false;
    if (nested && !write_system(f, tss.base(), f.tr.selector)) return false;

    // Commit: from here on the new task is current.
    f.tr = make_segment(selector, tss);
    f.tr.attributes |= 2;
    f.cr0 |= bit(3);
    if (new_cr3) {
        f.cr3 = task.cr3;
        if (pae) std::memcpy(f.pdpte, pdpte, sizeof pdpte);
        flush_tlb(f);
    }
    f.dr7 &= ~u64{0x55};  // local breakpoint enables
    u64 mask = wide ? 0x3f7fd7 : 0x7fd7;
    f.set_rflags((task.eflags & mask) | (nested ? u64{kFlagNt} : 0));
    for (int n = 0; n < 8; ++n) f.gpr[n] = task.gpr[n];
    f.rip = task.eip;
    return enter_task(f, task, wide, ext, error);
}

}  // namespace polyvisor::soft
