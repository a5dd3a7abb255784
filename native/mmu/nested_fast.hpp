// The common case of a two-dimensional walk (see mmu/walk_fast.hpp): both dimensions' entries are
// followed, and what they must be is compared at the end of each. Private to native/mmu.
#pragma once

#include "mmu/nested.hpp"
#include "mmu/walk_fast.hpp"

namespace polyvisor::mmu_detail {

/// The second dimension as far as it does not depend on the address: where its tables are, and the
/// plans of the two accesses that a walk makes.
struct SecondPlans {
    TableWindow window;
    const u8* root =
        nullptr;             ///< host address of the first table; nullptr: there is no common case
    Plan table, page;        ///< of the guest's table entries, and of what they lead to
    u64 table_reserved = 0;  ///< EPT: in entries that lead to a table
    bool pages_1gb = true, pages_2mb = true;
};

inline SecondPlans plan_second(TableReader& tables, const EptState& ept, PageAccess a, bool sets) {
    SecondPlans p;
    // Execute rights of their own for user mode are not common, nor are five levels.
    if (ept.capabilities.mode_based_execute || ept.levels != 4) return p;
    p.pages_1gb = ept.capabilities.pages_1gb, p.pages_2mb = ept.capabilities.pages_2mb;
    sets &= ept.access_dirty;
    auto plan = [&](bool write, bool fetch) {
        Plan plan{};
        plan.tables_want = kEpteRead | (write ? u64{kEpteWrite} : 0) |
                           (fetch ? u64{kEpteExecute} : 0) | (sets ? u64{kEpteAccessed} : 0);
        plan.tables_care = plan.tables_want;
        plan.tables_forbid = (kPteAddress & ~ept.capabilities.physical_mask) | 0x78;
        plan.leaf_want = plan.tables_want | (sets && write ? u64{kEpteDirty} : 0);
        plan.leaf_care = plan.leaf_want | (kPteAddress & ~ept.capabilities.physical_mask);
        return plan;
    };
    p.window = tables.window(ept.root);
    if (!p.window.host) return p;
    p.root = p.window.host + (ept.root & p.window.mask);
    p.table = plan(ept.access_dirty, false).within(p.window);
    p.page = plan(a.write, a.fetch).within(p.window);
    return p;
}

inline SecondPlans plan_second(TableReader& tables, const NptState& npt, PageAccess a, bool sets) {
    SecondPlans p;
    const PagingState& s = npt.paging;
    if (s.mode != PagingMode::k4Level || ~s.a20_mask) return p;
    p.pages_1gb = s.pages_1gb;
    u64 root = s.cr3 & kPteAddress;
    p.window = tables.window(root);
    if (!p.window.host) return p;
    p.root = p.window.host + (root & p.window.mask);
    PageAccess page{.write = a.write, .fetch = a.fetch, .user = true};
    p.table = make_plan<kFormat4Level>(s, {.write = true, .user = true}, sets).within(p.window);
    p.page = make_plan<kFormat4Level>(s, page, sets).within(p.window);
    return p;
}

/// Follows the second dimension's entries for `gpa`; not zero when that is not the common case.
template <bool ept>
PV_INLINE u64 follow_second(const SecondPlans& p, const Plan& plan, u64 gpa, Followed& f) {
    constexpr const PagingFormat& F = kFormatEpt4;  // NPT's levels are at the same places
    const u8* table = p.root;
    u64 wrong = gpa >> (F.level[0].shift + 9);
    f.shift = 12;
#pragma GCC unroll 5
    for (unsigned level = 0; level < F.levels; ++level) {
        const unsigned shift = F.level[level].shift;
        u64 entry = read_entry<8>(table + entry_offset<F>(level, gpa));
        if (level + 1 == F.levels) {
            f.leaf = entry;
            break;
        }
        if (F.level[level].large != LargePage::kReserved && (entry & kPtePageSize)) {
            // Reserved bits below the address; the PAT bit (12) is none in ordinary tables.
            wrong |= entry & (bit(shift) - 1) & ~(ept ? kPageMask : u64{0x1fff});
            wrong |= !(shift == 30 ? p.pages_1gb : p.pages_2mb);
            f.leaf = entry;
            f.shift = shift;
            break;
        }
        f.all &= entry;
        f.any |= entry;
        table = p.window.host + (entry & p.window.mask);
    }
    u64 offset = bit(f.shift) - 1;
    f.address = (f.leaf & kPteAddress & ~offset) | (gpa & offset);
    // EPT memory types 2, 3 and 7 are reserved.
    if constexpr (ept) wrong |= 0x8c >> bits(f.leaf, 5, 3) & 1;
    return wrong | f.wrong(plan);
}

/// The common case of walk_nested() with four levels of guest tables; false: it is another.
template <bool ept>
PV_INLINE bool follow_nested(TableReader& tables, const PagingState& guest, const SecondPlans& p,
                             u64 gva, Followed& f, Followed& second) {
    auto load = [&](u64 address) -> const u8* {
        Followed at;
        if (PV_UNLIKELY(follow_second<ept>(p, p.table, address, at))) return nullptr;
        return tables.entry(at.address);
    };
    if (PV_UNLIKELY(!follow<kFormat4Level>(guest, gva, load, f))) return false;
    return !follow_second<ept>(p, p.page, f.address, second);
}

/// Whether the guest and the second dimension are what follow_nested() follows.
inline bool nested_common(const PagingState& guest, const SecondPlans& p) {
    return p.root && guest.mode == PagingMode::k4Level && !~guest.a20_mask;
}

}  // namespace polyvisor::mmu_detail
