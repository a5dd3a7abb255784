// The common case of a walk, without its branches. Private to native/mmu: include mmu/walker.hpp or
// mmu/bulk.hpp instead.
//
// A walk that goes through and has nothing to write back needs no decision before its end: what all
// entries must have set shows in the AND of them, what none may have in the OR. So the common case
// follows the entries and compares twice at the end. Whatever it does not know (a fault, bits to be
// set, an odd reserved bit) fails that comparison, and mmu/walk_generic.hpp walks again and says
// what it is. Two ways of following entries:
//
//   follow_window()  4 KiB pages, all tables in a naturally aligned power of two of memory. Masked
//                    with that, an address cannot miss the memory, so that even where the tables
//                    lie is only compared at the end. This is the one that is nearly free.
//   follow()         any format, page size and place.
#pragma once

#include <utility>

#include "mmu/walk_generic.hpp"

#define PV_INLINE [[gnu::always_inline]] inline

namespace polyvisor::mmu_detail {

/// What entries are like when an access goes through and nothing has to be set. "Tables" are all
/// entries but the last.
struct Plan {
    u64 tables_care, tables_want;  ///< of the AND of the tables
    u64 tables_forbid;             ///< of the OR of the tables
    u64 leaf_care, leaf_want;
    u64 all_forbid;              ///< of the AND of all entries: U, where SMEP or SMAP forbid it
    u64 store_care, store_want;  ///< of the AND of all entries, for a store of the same kind

    /// With a window, the tables must be in it.
    PV_INLINE Plan within(const TableWindow& w) const {
        Plan p = *this;
        p.tables_care |= w.start;
        p.tables_want |= w.start;
        p.tables_forbid |= w.outside;
        return p;
    }
};

/// `sets`: the walk sets A/D bits, so they must be set already.
template <const PagingFormat& F>
PV_INLINE Plan make_plan(const PagingState& s, PageAccess a, bool sets) {
    // Arithmetic rather than branches: accesses of all kinds come in no order.
    auto when = [](bool condition, u64 mask) { return u64{condition} * mask; };
    static_assert(kPteWritable == 2 && kPteUser == 4);
    const bool smap = s.smap & !a.user & (a.implicit | !a.ac);
    const bool smep = s.smep & !a.user;
    const bool writes_checked = a.user | s.wp;
    Plan p;
    p.tables_want = kPtePresent | when(sets, kPteAccessed) | when(a.user, kPteUser) |
                    when(a.write & writes_checked, kPteWritable);
    p.tables_care = p.tables_want;
    p.tables_forbid = 0;
    if constexpr (F.entry_bytes == 8) {
        p.tables_forbid = s.reserved | (F.ignores_high_bits ? 0 : 0x7ff0'0000'0000'0000) |
                          when(a.fetch, kPteNoExecute);  // without NXE it is reserved anyway
    }
    p.leaf_want = p.tables_want | when(sets & a.write, kPteDirty);
    p.leaf_care = p.leaf_want | p.tables_forbid;
    p.all_forbid = when((a.fetch & smep) | (!a.fetch & smap), kPteUser);
    p.store_want = when(a.user, kPteUser) | when(writes_checked, kPteWritable);
    p.store_care = p.store_want | when(smap, kPteUser);
    return p;
}

/// What following the entries gave. Only wrong() says whether it means anything.
struct Followed {
    u64 all = ~u64{0}, any = 0;  ///< AND and OR of the tables
    u64 leaf = 0;
    u64 address = 0;
    u8 shift = 12;

    // Not zero: the access needs more than to be let through.
    PV_INLINE u64 tables_wrong(const Plan& p) const {
        return ((all & p.tables_care) ^ p.tables_want) | (any & p.tables_forbid);
    }
    PV_INLINE u64 leaf_wrong(const Plan& p) const {
        return ((leaf & p.leaf_care) ^ p.leaf_want) | (all & leaf & p.all_forbid);
    }
    PV_INLINE u64 wrong(const Plan& p) const { return tables_wrong(p) | leaf_wrong(p); }
};

template <const PagingFormat& F>
PV_INLINE u64 entry_offset(unsigned level, u64 gva) {
    const PagingLevel& at = F.level[level];
    return bits(gva, at.shift + at.index_bits - 1, at.shift) * F.entry_bytes;
}

/// `table`: host address of the table that the walk starts with, that of level `first`.
template <const PagingFormat& F, unsigned first = 0>
PV_INLINE Followed follow_window(const TableWindow& w, const u8* table, u64 gva) {
    static_assert(F.entry_bytes == 8 && !F.pdpte_registers);
    Followed f;
#pragma GCC unroll 5
    for (unsigned level = first; level + 1 < F.levels; ++level) {
        u64 entry = read_entry<8>(table + entry_offset<F>(level, gva));
        f.all &= entry;
        f.any |= entry;
        table = w.host + (entry & w.mask);
    }
    f.leaf = read_entry<8>(table + entry_offset<F>(F.levels - 1, gva));
    f.address = (f.leaf & kPteAddress) | (gva & kPageMask);
    return f;
}

/// `load(address)` gives the host address of an entry, or nullptr to give up.
template <const PagingFormat& F, class Load>
PV_INLINE bool follow(const PagingState& s, u64 gva, Load&& load, Followed& f) {
    constexpr u64 kTable = F.entry_bytes == 4 ? 0xffff'f000 : kPteAddress;
    u64 table = s.cr3 & kTable;
    if constexpr (F.pdpte_registers) {
        u64 pdpte = s.pdpte[bits(gva, 31, 30)];
        if (PV_UNLIKELY(!(pdpte & kPtePresent))) return false;
        table = pdpte & s.physical_mask & kPteAddress;
    }
#pragma GCC unroll 5
    for (unsigned level = 0; level < F.levels; ++level) {
        const u8* host = load(table + entry_offset<F>(level, gva));
        if (PV_UNLIKELY(!host)) return false;
        u64 entry = read_entry<F.entry_bytes>(host);
        table = entry & kTable;
        bool bad = false, leaf = level + 1 == F.levels;
        if (!leaf && (entry & kPtePageSize)) judge_entry<F>(s, level, entry, bad, leaf);
        if (PV_UNLIKELY(bad)) return false;
        if (leaf) {
            f.leaf = entry;
            f.shift = F.level[level].shift;
            break;
        }
        f.all &= entry;
        f.any |= entry;
    }
    u64 offset = bit(f.shift) - 1;
    if constexpr (F.entry_bytes == 4) {
        if (f.shift == 22) table = (f.leaf & 0xffc0'0000) | bits(f.leaf, 20, 13) << 32;
    }
    f.address = (table & ~offset) | (gva & offset);
    return true;
}

template <const PagingFormat& F>
PV_INLINE void describe(const PagingState& s, const Plan& p, const Followed& f, Translation& page) {
    u64 all = f.all & f.leaf;
    page.gpa = f.address;
    page.shift = f.shift;
    page.user = all & kPteUser;
    page.writable = all & kPteWritable;
    page.nx = F.entry_bytes == 8 && (f.any | f.leaf) >> 63;  // reserved without NXE
    page.global = s.pge & bool(f.leaf & kPteGlobal);
    page.memory_type =
        bits(f.leaf, 4, 3) | bits(f.leaf, f.shift == 12 ? 7 : 12, f.shift == 12 ? 7 : 12) << 2;
    if constexpr (F.protection_keys) page.key = bits(f.leaf, 62, 59);
    page.dirty = f.leaf & kPteDirty;
    page.store_ok = (all & p.store_care) == p.store_want;
}

/// Whether the keys let the access pass; takes store_ok away when they forbid that.
PV_INLINE bool keys_allow(const PagingState& s, PageAccess a, Translation& page) {
    if (PV_LIKELY(!(s.pke | s.pks))) return true;
    if (key_denies(s, page.user, a.user, true, page.key)) page.store_ok = false;
    return a.fetch || !key_denies(s, page.user, a.user, a.write, page.key);
}

/// Not zero for addresses that are not canonical.
template <const PagingFormat& F>
PV_INLINE u64 not_canonical(u64 gva) {
    constexpr unsigned kWidth = F.level[0].shift + 9;
    return (gva + bit(kWidth - 1)) >> kWidth;
}

/// One bit for each protection key of user pages and, from bit 16, of supervisor pages: whether it
/// forbids the access.
inline u32 denied_keys(const PagingState& s, PageAccess a) {
    u32 denied = 0;
    for (unsigned key = 0; key < 16 && !a.fetch; ++key) {
        if (key_denies(s, true, a.user, a.write, key)) denied |= 1u << key;
        if (key_denies(s, false, a.user, a.write, key)) denied |= 0x1'0000u << key;
    }
    return denied;
}

/// Addresses in one go. Those of a go tend to lie close together: what they share of the walk, at
/// most all but the last level, is walked once.
constexpr size_t kGo = 64;

/// Address bits that are not the same in all of the addresses (at least one).
PV_INLINE u64 differing_bits(const u64* gvas, size_t count) {
    u64 differ = 0;
    for (size_t n = 1; n < count; ++n) differ |= gvas[n] ^ gvas[0];
    return differ;
}

}  // namespace polyvisor::mmu_detail
