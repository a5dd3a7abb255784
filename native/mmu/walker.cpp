#include "mmu/walker.hpp"

namespace polyvisor {
namespace {

constexpr u64 kPhysicalField = 0x000f'ffff'ffff'f000;

enum class Effects { kNone, kSetBits, kTrace };

struct Step {
    u8* host;
    u64 gpa;
    u64 entry;
};

template <const PagingFormat& F>
u64 read_entry(const u8* host) {
    // Other CPUs may be writing: one access of the entry's own size, as the hardware's.
    if constexpr (F.entry_bytes == 4) {
        return __atomic_load_n(reinterpret_cast<const u32*>(host), __ATOMIC_RELAXED);
    } else {
        return __atomic_load_n(reinterpret_cast<const u64*>(host), __ATOMIC_RELAXED);
    }
}

/// Sets bits in an entry that must still be `expected`; false when another CPU changed it.
template <const PagingFormat& F>
bool set_bits(u8* host, u64 expected, u64 set) {
    if constexpr (F.entry_bytes == 4) {
        u32 old = static_cast<u32>(expected);
        return __atomic_compare_exchange_n(reinterpret_cast<u32*>(host), &old,
                                           static_cast<u32>(expected | set), false,
                                           __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    } else {
        u64 old = expected;
        return __atomic_compare_exchange_n(reinterpret_cast<u64*>(host), &old, expected | set,
                                           false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    }
}

/// The P, W, U and I bits that a fault by this access reports whatever its reason. I is defined
/// only where instruction fetches can be forbidden (SDM 3A, 4.7).
u32 access_error(const PagingState& s, PageAccess a) {
    bool fetch_bit = a.fetch && (s.smep || (s.nxe && s.mode != PagingMode::k32Bit));
    return (a.write ? u32{kPfWrite} : 0) | (a.user ? u32{kPfUser} : 0) |
           (fetch_bit ? u32{kPfFetch} : 0);
}

WalkResult fault(u32 error) {
    WalkResult result;
    result.fault = true;
    result.error = error;
    return result;
}

/// Whether protection keys forbid the access (SDM 3A, 4.6.2): data accesses to user pages only.
bool key_denies(const PagingState& s, bool user, bool write, u8 key) {
    u32 rights = s.pkru >> (key * 2);
    return (rights & 1) || ((rights & 2) && write && (user || s.wp));
}

/// Permission checks on the rights of all levels together (SDM 3A, 4.6.1). Fills in what the page
/// allows and returns the error bits beyond access_error() (0: allowed).
u32 check_rights(const PagingState& s, PageAccess a, Translation& page) {
    bool denied;
    if (a.user) {
        page.store_ok = page.user && page.writable;
        denied = !page.user || (a.write && !page.writable) || (a.fetch && page.nx);
    } else {
        bool smap_denies = s.smap && page.user && (a.implicit || !a.ac);
        page.store_ok = (page.writable || !s.wp) && !smap_denies;
        if (a.fetch) {
            denied = page.nx || (s.smep && page.user);
        } else {
            denied = smap_denies || (a.write && !page.store_ok);
        }
    }
    u32 error = denied ? u32{kPfPresent} : 0;
    if (s.pke && page.user) {
        if (key_denies(s, a.user, true, page.key)) page.store_ok = false;
        if (!a.fetch && key_denies(s, a.user, a.write, page.key)) {
            error |= kPfPresent | kPfProtectionKey;
        }
    }
    return error;
}

enum class Outcome { kDone, kRetry };

template <const PagingFormat& F, Effects effects>
Outcome walk_once(TableReader& tables, const PagingState& s, u64 gva, PageAccess a,
                  WalkResult& result, WalkTrace* trace) {
    constexpr u64 kHighReserved = F.ignores_high_bits ? 0 : 0x7ff0'0000'0000'0000;
    const u64 reserved = F.entry_bytes == 4 ? 0 : s.reserved | kHighReserved;
    u64 table = s.cr3 & kPhysicalField;
    if constexpr (F.entry_bytes == 4) table &= 0xffff'f000;
    if constexpr (F.pdpte_registers) {
        u64 pdpte = s.pdpte[bits(gva, 31, 30)];
        if constexpr (effects == Effects::kTrace) {
            trace->steps[trace->count++] = {~u64{0}, pdpte, 30};
        }
        if (!(pdpte & kPtePresent)) {
            result = fault(access_error(s, a));
            return Outcome::kDone;
        }
        table = pdpte & s.physical_mask & kPhysicalField;
    }

    Step steps[F.levels];
    u64 rights = kPteWritable | kPteUser;
    u64 no_execute = 0;
    unsigned level = 0;
    u64 entry;
    u8 shift;
    for (;; ++level) {
        const PagingLevel& format = F.level[level];
        shift = format.shift;
        u64 index = bits(gva, shift + format.index_bits - 1, shift);
        u64 gpa = (table + index * F.entry_bytes) & s.a20_mask;
        u8* host = tables.entry(gpa);
        entry = PV_LIKELY(host) ? read_entry<F>(host)
                                : (F.entry_bytes == 4 ? u64{0xffff'ffff} : ~u64{0});
        if constexpr (effects == Effects::kTrace) {
            trace->steps[trace->count++] = {gpa, entry, shift};
        }
        if (PV_UNLIKELY(!(entry & kPtePresent))) {
            result = fault(access_error(s, a));
            return Outcome::kDone;
        }
        steps[level] = {host && tables.writable() ? host : nullptr, gpa, entry};

        bool last = level + 1 == F.levels;
        bool bad = entry & reserved;
        bool leaf = last;
        if (!last && (entry & kPtePageSize)) {
            switch (format.large) {
                case LargePage::kReserved:
                    bad = true;
                    break;
                case LargePage::kAlways:
                    leaf = true;
                    break;
                case LargePage::kIfPse:
                    leaf = s.pse;
                    break;
                case LargePage::kIf1Gb:
                    leaf = s.pages_1gb;
                    bad |= !leaf;
                    break;
            }
            if (leaf) {
                bad |= F.entry_bytes == 4
                           ? (entry & s.reserved_large32) != 0
                           : (entry & (bit(shift) - 1) & ~u64{0x1fff}) != 0;  // below the address
            }
        }
        if (PV_UNLIKELY(bad)) {
            result = fault(access_error(s, a) | kPfPresent | kPfReserved);
            return Outcome::kDone;
        }
        rights &= entry;
        if constexpr (F.entry_bytes == 8) no_execute |= entry;
        if (leaf) break;
        table = entry & (F.entry_bytes == 4 ? 0xffff'f000 : kPhysicalField);
    }

    Translation& page = result.page;
    u64 address = entry & kPhysicalField;
    if constexpr (F.entry_bytes == 4) {
        if (shift == 22) address = (entry & 0xffc0'0000) | bits(entry, 20, 13) << 32;  // PSE-36
    }
    u64 offset = bit(shift) - 1;
    page.gpa = ((address & ~offset) | (gva & offset)) & s.a20_mask;
    page.shift = shift;
    page.user = rights & kPteUser;
    page.writable = rights & kPteWritable;
    page.nx = F.entry_bytes == 8 && s.nxe && (no_execute & kPteNoExecute);
    page.global = s.pge && (entry & kPteGlobal);
    page.memory_type =
        bits(entry, 4, 3) | (entry & (shift == 12 ? kPtePatSmall : kPtePatLarge) ? 4 : 0);
    if constexpr (F.protection_keys) page.key = bits(entry, 62, 59);
    page.dirty = entry & kPteDirty;

    u32 error = check_rights(s, a, page);
    if (PV_UNLIKELY(error)) {
        result.fault = true;
        result.error = error | access_error(s, a);
        return Outcome::kDone;
    }
    if constexpr (effects == Effects::kSetBits) {
        for (unsigned n = 0; n <= level; ++n) {
            u64 want = kPteAccessed | (n == level && a.write ? u64{kPteDirty} : 0);
            if (PV_LIKELY((steps[n].entry & want) == want)) continue;
            if (!steps[n].host) continue;  // ROM, or nothing there: the write goes nowhere
            if (!set_bits<F>(steps[n].host, steps[n].entry, want)) return Outcome::kRetry;
            tables.entry(steps[n].gpa);  // make it the one last looked up
            tables.note_write(steps[n].gpa, F.entry_bytes);
            if (n == level && a.write) page.dirty = true;
        }
    }
    return Outcome::kDone;
}

template <const PagingFormat& F, Effects effects>
WalkResult walk_format(TableReader& tables, const PagingState& s, u64 gva, PageAccess a,
                       WalkTrace* trace) {
    for (;;) {  // each retry means that another CPU made progress on the same entry
        WalkResult result;
        if (walk_once<F, effects>(tables, s, gva, a, result, trace) == Outcome::kDone) {
            return result;
        }
    }
}

template <Effects effects>
WalkResult walk_any(TableReader& tables, const PagingState& s, u64 gva, PageAccess a,
                    WalkTrace* trace = nullptr) {
    switch (s.mode) {
        case PagingMode::k4Level:
            return walk_format<kFormat4Level, effects>(tables, s, gva, a, trace);
        case PagingMode::k5Level:
            return walk_format<kFormat5Level, effects>(tables, s, gva, a, trace);
        case PagingMode::kPae:
            return walk_format<kFormatPae, effects>(tables, s, gva, a, trace);
        case PagingMode::k32Bit:
            return walk_format<kFormat32Bit, effects>(tables, s, gva, a, trace);
        case PagingMode::kNone:
            break;
    }
    WalkResult result;  // no paging: every access is allowed, addresses are 32 bits wide
    result.page.gpa = gva & 0xffff'ffff & s.a20_mask;
    result.page.user = result.page.writable = result.page.dirty = result.page.store_ok = true;
    return result;
}

}  // namespace

PagingState make_paging_state(const PagingRegisters& r) {
    PagingState s;
    s.mode = paging_mode_of(r.cr0, r.cr4, r.efer);
    s.wp = r.cr0 & bit(16);
    s.nxe = r.efer & bit(11);
    s.pse = r.cr4 & bit(4);
    s.pge = r.cr4 & bit(7);
    s.smep = r.cr4 & bit(20);
    s.smap = r.cr4 & bit(21);
    s.pke = (r.cr4 & bit(22)) && (s.mode == PagingMode::k4Level || s.mode == PagingMode::k5Level);
    s.pages_1gb = r.pages_1gb;
    s.pkru = r.pkru;
    s.cr3 = r.cr3 & r.physical_mask;
    s.physical_mask = r.physical_mask;
    s.a20_mask = r.a20_mask;
    if (r.pdpte) {
        for (int n = 0; n < 4; ++n) s.pdpte[n] = r.pdpte[n];
    }
    s.reserved = (kPhysicalField & ~r.physical_mask) | (s.nxe ? 0 : u64{kPteNoExecute});
    // PDE of a 4 MB page: bits 20:13 are address bits 39:32, as far as MAXPHYADDR reaches.
    u64 high = r.pse36 ? bits(r.physical_mask, 39, 32) : 0;
    s.reserved_large32 = bit(21) | ((~high & 0xff) << 13);
    return s;
}

WalkResult walk(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access) {
    return walk_any<Effects::kSetBits>(tables, paging, gva, access);
}

WalkResult walk_pure(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access) {
    return walk_any<Effects::kNone>(tables, paging, gva, access);
}

WalkResult walk_trace(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access,
                      WalkTrace& trace) {
    trace.count = 0;
    return walk_any<Effects::kTrace>(tables, paging, gva, access, &trace);
}

}  // namespace polyvisor
