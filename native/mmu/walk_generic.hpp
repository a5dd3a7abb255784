// The walk itself, for every format and for every way of getting at a table's entries. Private to
// native/mmu: include mmu/walker.hpp instead.
//
// How an entry is loaded is a Loader, so that a nested walk is this same walk with a Loader that
// translates the entry's address first:
//
//     bool find(u64 address, EntryPlace&)          where the entry is; false: the walk ends here
//     bool may_set_bits(u64 address, EntryPlace&)  before A/D bits are set; false likewise
//     void note_write(const EntryPlace&, u64 size) after they were
//     void note_step(u64 address, u64 entry, u8 shift) for traces: what was loaded
//
// A walk that a Loader ended is Outcome::kAborted: the Loader knows why.
#pragma once

#include "mmu/walker.hpp"

namespace polyvisor::mmu_detail {

enum class Effects { kNone, kSetBits, kTrace };
enum class Outcome { kDone, kRetry, kAborted };

struct EntryPlace {
    u8* host = nullptr;  ///< nullptr: not in memory, reads as all ones
    u64 address = 0;     ///< in the memory that TableReader reads
    bool writable = false;
};

/// Entries lie in memory at the address itself.
struct FlatLoader {
    TableReader& tables;
    WalkTrace* trace = nullptr;

    bool find(u64 address, EntryPlace& place) {
        place.host = tables.entry(address);
        place.address = address;
        place.writable = place.host && tables.writable();
        return true;
    }
    bool may_set_bits(u64, EntryPlace&) { return true; }
    void note_write(const EntryPlace& place, u64 size) {
        tables.entry(place.address);  // make it the one last looked up
        tables.note_write(place.address, size);
    }
    void note_step(u64 address, u64 entry, u8 shift) {
        trace->steps[trace->count++] = {address, entry, shift};
    }
};

template <unsigned bytes>
u64 read_entry(const u8* host) {
    // Other CPUs may be writing: one access of the entry's own size, as the hardware's.
    if constexpr (bytes == 4) {
        return __atomic_load_n(reinterpret_cast<const u32*>(host), __ATOMIC_RELAXED);
    } else {
        return __atomic_load_n(reinterpret_cast<const u64*>(host), __ATOMIC_RELAXED);
    }
}

/// Sets bits in an entry that must still be `expected`; false when another CPU changed it.
template <unsigned bytes>
bool set_bits(u8* host, u64 expected, u64 set) {
    if constexpr (bytes == 4) {
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
inline u32 access_error(const PagingState& s, PageAccess a) {
    bool fetch_bit = a.fetch && (s.smep || (s.nxe && s.mode != PagingMode::k32Bit));
    return (a.write ? u32{kPfWrite} : 0) | (a.user ? u32{kPfUser} : 0) |
           (fetch_bit ? u32{kPfFetch} : 0);
}

inline void set_fault(WalkResult& result, u32 error) {
    result.fault = true;
    result.error = error;
}

/// Whether protection keys forbid a data access to a page (SDM 3A, 4.6.2): PKRU those of user
/// pages, by anybody; IA32_PKRS those of supervisor pages.
inline bool key_denies(const PagingState& s, bool user_page, bool user, bool write, u8 key) {
    if (!(user_page ? s.pke : s.pks)) return false;
    u32 rights = (user_page ? s.pkru : s.pkrs) >> (key * 2);
    return (rights & 1) || ((rights & 2) && write && ((user_page && user) || s.wp));
}

/// Permission checks on the rights of all levels together (SDM 3A, 4.6.1). Fills in what the page
/// allows and returns the error bits beyond access_error() (0: allowed).
inline u32 check_rights(const PagingState& s, PageAccess a, Translation& page) {
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
    if (s.pke || s.pks) {
        if (key_denies(s, page.user, a.user, true, page.key)) page.store_ok = false;
        if (!a.fetch && key_denies(s, page.user, a.user, a.write, page.key)) {
            error |= kPfPresent | kPfProtectionKey;
        }
    }
    return error;
}

/// What an entry that is present says about going on: wrong, the page, or the next table.
template <const PagingFormat& F>
void judge_entry(const PagingState& s, unsigned level, u64 entry, bool& bad, bool& leaf) {
    constexpr u64 kHighReserved = F.ignores_high_bits ? 0 : 0x7ff0'0000'0000'0000;
    bad = F.entry_bytes == 8 && (entry & (s.reserved | kHighReserved));
    leaf = level + 1 == F.levels;
    if (leaf || !(entry & kPtePageSize)) return;
    switch (F.level[level].large) {
        case LargePage::kReserved:
            bad = true;
            return;
        case LargePage::kAlways:
        case LargePage::kIf2Mb:
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
    if (!leaf) return;
    bad |= F.entry_bytes == 4 ? (entry & s.reserved_large32) != 0  // below: under the address
                              : (entry & (bit(F.level[level].shift) - 1) & ~u64{0x1fff}) != 0;
}

template <const PagingFormat& F, Effects effects, class Loader>
Outcome walk_once(Loader& loader, const PagingState& s, u64 gva, PageAccess a, WalkResult& result) {
    u64 table = s.cr3 & (F.entry_bytes == 4 ? 0xffff'f000 : kPteAddress);
    if constexpr (F.pdpte_registers) {
        u64 pdpte = s.pdpte[bits(gva, 31, 30)];
        if constexpr (effects == Effects::kTrace) {
            loader.note_step(~u64{0}, pdpte, 30);
        }
        if (!(pdpte & kPtePresent)) {
            set_fault(result, access_error(s, a));
            return Outcome::kDone;
        }
        table = pdpte & s.physical_mask & kPteAddress;
    }

    struct Step {
        EntryPlace place;
        u64 gpa;
        u64 entry;
    } steps[F.levels];
    u64 rights = kPteWritable | kPteUser;
    u64 no_execute = 0;
    unsigned level = 0;
    u64 entry;
    u8 shift;
    for (;; ++level) {
        const PagingLevel& format = F.level[level];
        shift = format.shift;
        u64 index = bits(gva, shift + format.index_bits - 1, shift);
        Step& step = steps[level];
        step.gpa = (table + index * F.entry_bytes) & s.a20_mask;
        if (!loader.find(step.gpa, step.place)) return Outcome::kAborted;
        entry = PV_LIKELY(step.place.host) ? read_entry<F.entry_bytes>(step.place.host)
                                           : (F.entry_bytes == 4 ? u64{0xffff'ffff} : ~u64{0});
        step.entry = entry;
        if constexpr (effects == Effects::kTrace) {
            loader.note_step(step.gpa, entry, shift);
        }
        if (PV_UNLIKELY(!(entry & kPtePresent))) {
            set_fault(result, access_error(s, a));
            return Outcome::kDone;
        }
        bool bad, leaf;
        judge_entry<F>(s, level, entry, bad, leaf);
        if (PV_UNLIKELY(bad)) {
            set_fault(result, access_error(s, a) | kPfPresent | kPfReserved);
            return Outcome::kDone;
        }
        rights &= entry;
        if constexpr (F.entry_bytes == 8) no_execute |= entry;
        if (leaf) break;
        table = entry & (F.entry_bytes == 4 ? 0xffff'f000 : kPteAddress);
    }

    Translation& page = result.page;
    u64 address = entry & kPteAddress;
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
        set_fault(result, error | access_error(s, a));
        return Outcome::kDone;
    }
    if constexpr (effects == Effects::kSetBits) {
        for (unsigned n = 0; n <= level; ++n) {
            u64 want = kPteAccessed | (n == level && a.write ? u64{kPteDirty} : 0);
            Step& step = steps[n];
            if (PV_LIKELY((step.entry & want) == want)) continue;
            if (!loader.may_set_bits(step.gpa, step.place)) return Outcome::kAborted;
            if (!step.place.writable) continue;  // ROM, or nothing there: the write goes nowhere
            if (!set_bits<F.entry_bytes>(step.place.host, step.entry, want)) return Outcome::kRetry;
            loader.note_write(step.place, F.entry_bytes);
            if (n == level && a.write) page.dirty = true;
        }
    }
    return Outcome::kDone;
}

/// kDone or kAborted.
template <const PagingFormat& F, Effects effects, class Loader>
Outcome walk_format(Loader& loader, const PagingState& s, u64 gva, PageAccess a,
                    WalkResult& result) {
    for (;;) {  // each retry means that another CPU made progress on the same entry
        result = {};
        Outcome outcome = walk_once<F, effects>(loader, s, gva, a, result);
        if (outcome != Outcome::kRetry) return outcome;
    }
}

template <Effects effects, class Loader>
Outcome walk_any(Loader& loader, const PagingState& s, u64 gva, PageAccess a, WalkResult& result) {
    switch (s.mode) {
        case PagingMode::k4Level:
            return walk_format<kFormat4Level, effects>(loader, s, gva, a, result);
        case PagingMode::k5Level:
            return walk_format<kFormat5Level, effects>(loader, s, gva, a, result);
        case PagingMode::kPae:
            return walk_format<kFormatPae, effects>(loader, s, gva, a, result);
        case PagingMode::k32Bit:
            return walk_format<kFormat32Bit, effects>(loader, s, gva, a, result);
        case PagingMode::kNone:
            break;
    }
    result = {};  // no paging: every access is allowed, addresses are 32 bits wide
    Translation& page = result.page;
    page.gpa = gva & 0xffff'ffff & s.a20_mask;
    page.user = page.writable = page.dirty = page.store_ok = true;
    return Outcome::kDone;
}

}  // namespace polyvisor::mmu_detail
