// The slow path of every memory access: what a soft TLB miss comes to.
#include <algorithm>

#include "soft/host_mxcsr.hpp"
#include "soft/soft_tlb.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

namespace {

/// Where one access within a page goes.
struct Place {
    const GuestMemory::Region* region = nullptr;  ///< nullptr: not memory
    u64 gpa = 0;
    u8* host = nullptr;
};

bool canonical(const VcpuFrame& f, u64 linear) {
    unsigned width = f.cr4 & bit(12) ? 57 : 48;
    return static_cast<u64>(sign_extend(linear, width)) == linear;
}

TlbContext context_of(const VcpuFrame& f, Privilege privilege) {
    bool smap = f.cr4 & bit(21);
    if (privilege == Privilege::kUser) return kTlbUser;
    if (privilege == Privilege::kSupervisor) return smap ? kTlbSupervisor : kTlbSupervisorAc;
    if (f.cpl == 3) return kTlbUser;
    return smap && !(f.rflags_rest & kFlagAc) ? kTlbSupervisor : kTlbSupervisorAc;
}

bool breakpoint_in_page(const u64 (&dr)[4], u64 dr7, u64 linear) {
    for (unsigned n = 0; n < 4; ++n) {
        if ((dr7 >> (2 * n) & 3) && (dr7 >> (16 + 4 * n) & 3) &&
            ((dr[n] ^ linear) >> kPageShift) == 0) {
            return true;
        }
    }
    return false;
}

bool breakpoint_in_page(const VcpuFrame& f, u64 linear) {
    return breakpoint_in_page(f.dr, f.dr7, linear) ||
           breakpoint_in_page(f.host_dr, f.host_dr7, linear);
}

// Notes which data breakpoints an access meets (SDM 3B, 17.2.5). They trap after the instruction.
u64 breakpoints_met(const u64 (&dr)[4], u64 dr7, u64 linear, u32 size, bool write) {
    static constexpr u8 kLength[4] = {1, 2, 8, 4};
    u64 hits = 0;
    for (unsigned n = 0; n < 4; ++n) {
        if (!(dr7 >> (2 * n) & 3)) continue;
        unsigned kind = dr7 >> (16 + 4 * n) & 3;
        if (kind != 3 && !(kind == 1 && write)) continue;
        u64 length = kLength[dr7 >> (18 + 4 * n) & 3];
        u64 start = dr[n] & ~(length - 1);
        if (linear < start + length && start < linear + size) hits |= bit(n);
    }
    return hits;
}

void note_breakpoints(VcpuFrame& f, u64 linear, u32 size, bool write) {
    f.debug_hits |= breakpoints_met(f.dr, f.dr7, linear, size, write) |
                    breakpoints_met(f.host_dr, f.host_dr7, linear, size, write) << 16;
}

[[gnu::cold]] bool raise_page_fault(VcpuFrame& f, u64 linear, u32 error) {
    raise(f, kPf, error);
    f.fault.cr2 = linear;
    return false;
}

// Translates one access that stays within a page, and fills the TLB when that is allowed.
bool find_place(VcpuFrame& f, u64 linear, bool write, Privilege privilege, u8 seg, Place& place) {
    SoftVcpu& vcpu = *f.vcpu;
    if ((f.mode & kModeLongActive) && !canonical(f, linear)) {
        return raise(f, seg == kSs ? kSsFault : kGp, 0);
    }
    bool user = privilege == Privilege::kUser || (privilege == Privilege::kCurrent && f.cpl == 3);
    WalkResult result = walk(vcpu.tables, vcpu.paging, linear,
                             {.write = write,
                              .user = user,
                              .implicit = privilege == Privilege::kSupervisor,
                              .ac = (f.rflags_rest & kFlagAc) != 0});
    if (result.fault) return raise_page_fault(f, linear, result.error);
    place.gpa = result.page.gpa;
    place.region = vcpu.env.memory.find(Gpa(place.gpa));
    if (place.region == nullptr) return true;
    place.host = place.region->host(place.gpa);
    if (PV_UNLIKELY(f.breakpoints()) && breakpoint_in_page(f, linear)) return true;
    u64 page = align_down(linear, kPageSize);
    unsigned n = (linear >> kPageShift) & 255;
    u8 flags = place.region->flags(place.gpa).load(std::memory_order_seq_cst);
    bool may_write = result.page.store_ok && result.page.dirty && !place.region->read_only &&
                     !(flags & kPageWriteTraps);
    Tlb& tlb = f.tlb[context_of(f, privilege)];
    tlb.neg_r[n] = -page;
    tlb.neg_w[n] = may_write ? -page : tlb_invalid(n);
    tlb.addend[n] = reinterpret_cast<u64>(place.host) - linear;
    ++vcpu.stats.tlb_fills;
    return true;
}

void device_read(VcpuFrame& f, u64 gpa, void* into, u32 size) {
    Environment& env = f.vcpu->env;
    ++f.vcpu->stats.mmio;
    if (env.deterministic) read_tsc(f);  // devices see the time of the instruction
    OutsideGuest outside(*f.vcpu);
    HostMxcsr usual_mxcsr;
    std::span<u8> data(static_cast<u8*>(into), size);
    if (env.lapic != nullptr && (gpa & ~kPageMask) == env.lapic->mmio_base()) {
        env.lapic->mmio_read(gpa & kPageMask, data);
    } else {
        env.mmio.read(gpa, data);
    }
}

void device_write(VcpuFrame& f, u64 gpa, const void* from, u32 size) {
    Environment& env = f.vcpu->env;
    ++f.vcpu->stats.mmio;
    if (env.deterministic) read_tsc(f);  // devices see the time of the instruction
    OutsideGuest outside(*f.vcpu);
    HostMxcsr usual_mxcsr;
    std::span<const u8> data(static_cast<const u8*>(from), size);
    if (env.lapic != nullptr && (gpa & ~kPageMask) == env.lapic->mmio_base()) {
        env.lapic->mmio_write(gpa & kPageMask, data);
    } else {
        env.mmio.write(gpa, data);
    }
}

template <class T>
void copy_as(u8* host, const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    std::memcpy(host, &value, sizeof value);
}

// A store of 1, 2, 4 or 8 aligned bytes is one host store: another vCPU sees all of it or nothing.
void copy_in(u8* host, const void* from, u32 size) {
    switch (size) {
        case 1:
            copy_as<u8>(host, from);
            break;
        case 2:
            copy_as<u16>(host, from);
            break;
        case 4:
            copy_as<u32>(host, from);
            break;
        case 8:
            copy_as<u64>(host, from);
            break;
        default:
            std::memcpy(host, from, size);
    }
}

// Before or after a store to a page with write traps: tells those who watch the page.
void note_trapped_store(VcpuFrame& f, const Place& place, u32 size) {
    u8 traps = place.region->flags(place.gpa).load(std::memory_order_relaxed);
    if (traps & kPageDirtyTrack) place.region->note_first_store(place.gpa);
    if (traps & kPageCode) {
        ++f.vcpu->stats.code_stores;
        HostMxcsr usual_mxcsr;
        f.vcpu->blocks.note_store(place.gpa, size);
    }
}

void write_place(VcpuFrame& f, const Place& place, const void* from, u32 size) {
    if (place.region == nullptr) {
        device_write(f, place.gpa, from, size);
    } else if (!place.region->read_only) {  // ROM ignores stores
        copy_in(place.host, from, size);
        note_trapped_store(f, place, size);
    }
}

// Vectors of 16 and 32 bytes are checked for 16, the ten bytes of an x87 register for 8.
bool misaligned(VcpuFrame& f, u64 linear, u32 size, Privilege privilege) {
    if (PV_LIKELY(!(f.mode & kModeAlignCheck))) return false;
    u64 mask = size == 2 || size == 4 || size == 8 ? size - 1
               : size == 16 || size == 32          ? 15
               : size == 10                        ? 7
                                                   : 0;
    bool wrong =
        privilege == Privilege::kCurrent && (linear & mask) &&
        (!(f.mode & kModeLongActive) || canonical(f, linear));  // else #GP or #SS comes first
    if (wrong) raise(f, kAcFault, 0);
    return wrong;
}

u64 next_page(const VcpuFrame& f, u64 linear) {
    u64 next = align_down(linear, kPageSize) + kPageSize;
    return f.mode & kModeLongActive ? next : static_cast<u32>(next);
}

u32 in_first_page(u64 linear, u32 size) {
    return static_cast<u32>(std::min<u64>(size, kPageSize - (linear & kPageMask)));
}

}  // namespace

bool raise(VcpuFrame& f, u8 vector) {
    f.fault = Fault{.pending = Pending::kException, .vector = vector};
    return false;
}

bool raise(VcpuFrame& f, u8 vector, u32 error) {
    f.fault =
        Fault{.pending = Pending::kException, .vector = vector, .has_error = true, .error = error};
    return false;
}

bool raise_trap(VcpuFrame& f, u8 vector) {
    f.fault = Fault{.pending = Pending::kException, .vector = vector, .trap = true};
    return false;
}

// SDM 3A, 5.3 and 5.4: limit and type checks of a data access outside 64-bit mode.
bool segmented_address(VcpuFrame& f, u8 seg, u64 ea, u32 size, bool write, u64& linear) {
    const Segment& s = f.seg[seg];
    u32 offset = static_cast<u32>(ea);
    linear = static_cast<u32>(s.base + offset);
    u8 vector = seg == kSs ? kSsFault : kGp;
    // Flat: only the very end of the segment can be run over. CS is not in the mode bit, and cannot
    // be written.
    if (!(f.mode & kModeSegCheck) && seg < kFs && seg != kCs) {
        return PV_LIKELY(u64{offset} + size - 1 <= 0xffffffff) ? true : raise(f, vector, 0);
    }
    if (f.protected_mode()) {
        if (s.unusable()) return raise(f, vector, 0);
        bool code = s.attributes & 8;
        if (write ? code || !(s.attributes & 2) : code && !(s.attributes & 2)) {
            return raise(f, vector, 0);
        }
    }
    u64 last = u64{offset} + size - 1;
    bool expand_down = (s.attributes & 0xc) == 4;
    if (PV_UNLIKELY(expand_down)) {
        u64 top = s.db() ? 0xffffffff : 0xffff;
        if (offset <= s.limit || last > top) return raise(f, vector, 0);
    } else if (last > s.limit) {
        return raise(f, vector, 0);
    }
    return true;
}

bool read_linear(VcpuFrame& f, u64 linear, void* into, u32 size, Privilege privilege, u8 seg) {
    ++f.vcpu->stats.slow_accesses;
    if (misaligned(f, linear, size, privilege)) return false;
    auto* out = static_cast<u8*>(into);
    u32 first = in_first_page(linear, size);
    Place places[2];
    if (!find_place(f, linear, false, privilege, seg, places[0])) return false;
    if (first != size && !find_place(f, next_page(f, linear), false, privilege, seg, places[1])) {
        return false;
    }
    for (const Place& place : places) {
        u32 here = &place == places ? first : size - first;
        if (here == 0) break;
        if (place.region != nullptr) {
            std::memcpy(out, place.host, here);
        } else {
            device_read(f, place.gpa, out, here);
        }
        out += here;
    }
    if (PV_UNLIKELY(f.breakpoints())) note_breakpoints(f, linear, size, false);
    return true;
}

bool write_linear(VcpuFrame& f, u64 linear, const void* from, u32 size, Privilege privilege,
                  u8 seg) {
    ++f.vcpu->stats.slow_accesses;
    if (misaligned(f, linear, size, privilege)) return false;
    const auto* in = static_cast<const u8*>(from);
    u32 first = in_first_page(linear, size);
    Place place;
    if (!find_place(f, linear, true, privilege, seg, place)) return false;
    Place second;
    if (first != size && !find_place(f, next_page(f, linear), true, privilege, seg, second)) {
        return false;
    }
    write_place(f, place, in, first);
    if (first != size) write_place(f, second, in + first, size - first);
    if (PV_UNLIKELY(f.breakpoints())) note_breakpoints(f, linear, size, true);
    return true;
}

bool probe_write_linear(VcpuFrame& f, u64 linear, u32 size, Privilege privilege, u8 seg) {
    if (misaligned(f, linear, size, privilege)) return false;
    Place place;
    if (!find_place(f, linear, true, privilege, seg, place)) return false;
    return in_first_page(linear, size) == size ||
           find_place(f, next_page(f, linear), true, privilege, seg, place);
}

u8* writable_host(VcpuFrame& f, u64 linear, u32 size, Privilege privilege, u8 seg) {
    unsigned n = (linear >> kPageShift) & 255;
    if (privilege == Privilege::kCurrent && linear + f.tlb_now->neg_w[n] <= kPageSize - size) {
        return reinterpret_cast<u8*>(linear + f.tlb_now->addend[n]);
    }
    if (misaligned(f, linear, size, privilege)) return nullptr;
    if ((linear & kPageMask) + size > kPageSize) return nullptr;
    Place place;
    if (!find_place(f, linear, true, privilege, seg, place)) return nullptr;
    if (place.region == nullptr || place.region->read_only) return nullptr;
    if (PV_UNLIKELY(f.breakpoints())) note_breakpoints(f, linear, size, true);
    note_trapped_store(f, place, size);
    return place.host;
}

const u8* readable_host(VcpuFrame& f, u64 linear, u32 size, Privilege privilege, u8 seg) {
    unsigned n = (linear >> kPageShift) & 255;
    if (privilege == Privilege::kCurrent && linear + f.tlb_now->neg_r[n] <= kPageSize - size) {
        return reinterpret_cast<const u8*>(linear + f.tlb_now->addend[n]);
    }
    if (misaligned(f, linear, size, privilege)) return nullptr;
    if ((linear & kPageMask) + size > kPageSize) return nullptr;
    Place place;
    if (!find_place(f, linear, false, privilege, seg, place)) return nullptr;
    if (PV_UNLIKELY(f.breakpoints())) note_breakpoints(f, linear, size, false);
    return place.host;
}

bool fill_tlb(VcpuFrame& f, u64 linear, bool write, u8 seg) {
    Place place;
    return find_place(f, linear, write, Privilege::kCurrent, seg, place);
}

bool load_bytes(VcpuFrame& f, const Insn& i, u64 ea, void* into, u32 size) {
    u64 linear;
    return linear_address(f, i.segment, ea, size, false, linear) &&
           read_linear(f, linear, into, size, Privilege::kCurrent, i.segment);
}

bool store_bytes(VcpuFrame& f, const Insn& i, u64 ea, const void* from, u32 size) {
    u64 linear;
    return linear_address(f, i.segment, ea, size, true, linear) &&
           write_linear(f, linear, from, size, Privilege::kCurrent, i.segment);
}

void flush_tlb(VcpuFrame& f) {
    SoftVcpu& vcpu = *f.vcpu;
    clear_tlbs(f);
    ++f.epoch;
    ++vcpu.stats.tlb_flushes;
    vcpu.paging = make_paging_state({.cr0 = f.cr0,
                                     .cr3 = f.cr3,
                                     .cr4 = f.cr4,
                                     .efer = f.msr.efer,
                                     .pkru = f.pkru,
                                     .physical_mask = f.physical_mask,
                                     .a20_mask = f.a20_mask,
                                     .pdpte = f.pdpte});
}

void flush_page(VcpuFrame& f, u64) {
    // A large page is cached as many 4 KiB ones, and which belong to it is not recorded: INVLPG of
    // any of its addresses must drop them all. It is rare enough (some 140 in a Linux boot).
    clear_tlbs(f);
    ++f.epoch;
    ++f.vcpu->stats.tlb_flushes;
}

}  // namespace polyvisor::soft
