#include "mmu/bulk.hpp"

#include <algorithm>

#include "mmu/walk_fast.hpp"

namespace polyvisor {
namespace {

using namespace mmu_detail;

/// What is left to one address at a time.
[[gnu::noinline]] u64 walk_one(TableReader& tables, const PagingState& paging, u64 gva,
                               PageAccess access, BulkEffects effects) {
    if (!is_canonical(paging.mode, gva)) return kNoTranslation;
    WalkResult r = effects == BulkEffects::kSet ? walk(tables, paging, gva, access)
                                                : walk_pure(tables, paging, gva, access);
    return r.ok() ? r.page.gpa : kNoTranslation;
}

struct Bulk {
    TableReader& tables;
    const PagingState& paging;
    PageAccess access;
    BulkEffects effects;
    TableWindow window;
    const u8* root;  ///< host address of the first table
    Plan plan;       ///< within `window`
    u32 denied;      ///< keys
    u64 faults = 0;

    u64 one(u64 gva) {
        u64 gpa = walk_one(tables, paging, gva, access, effects);
        faults += gpa == kNoTranslation;
        return gpa;
    }
};

/// Walks the last two levels, first the one and then the other for all addresses, so that the host
/// waits for many last entries at once. False, with nothing done, when not all of them are those of
/// 4 KiB pages that the access may have. `table`: host address of the last table but one.
template <const PagingFormat& F>
bool walk_leaves(Bulk& b, const u8* table, const u64* gvas, u64* gpas, size_t count) {
    const Plan plan = b.plan;
    const TableWindow window = b.window;
    const u8* leaves[kGo];
    const u64 care = plan.tables_care | plan.tables_forbid;  // of one entry: one comparison
    u64 wrong = 0;
    for (size_t n = 0; n < count; ++n) {
        u64 entry = read_entry<8>(table + entry_offset<F>(F.levels - 2, gvas[n]));
        wrong |= (entry & care) ^ plan.tables_want;
        leaves[n] = window.host + (entry & window.mask) + entry_offset<F>(F.levels - 1, gvas[n]);
        __builtin_prefetch(leaves[n]);
    }
    if (PV_UNLIKELY(wrong)) return false;
    for (size_t n = 0; n < count; ++n) {
        u64 leaf = read_entry<8>(leaves[n]);
        u64 gpa = (leaf & kPteAddress) | (gvas[n] & kPageMask);
        if (PV_UNLIKELY((leaf & plan.leaf_care) ^ plan.leaf_want)) gpa = b.one(gvas[n]);
        gpas[n] = gpa;
    }
    return true;
}

/// Walks the last `rest` levels for each address, the others for all.
template <const PagingFormat& F, unsigned rest, bool keys>
void walk_go(Bulk& b, const u64* gvas, u64* gpas, size_t count) {
    const TableWindow window = b.window;
    Followed shared;
    const u8* first = b.root;
    for (unsigned level = 0; level + rest < F.levels; ++level) {
        u64 entry = read_entry<8>(first + entry_offset<F>(level, gvas[0]));
        shared.all &= entry;
        shared.any |= entry;
        first = window.host + (entry & window.mask);
    }
    if (rest < F.levels && (shared.tables_wrong(b.plan) | not_canonical<F>(gvas[0]))) {
        for (size_t n = 0; n < count; ++n) gpas[n] = b.one(gvas[n]);
        return;
    }
    Plan plan = b.plan;
    plan.all_forbid &= shared.all;
    if constexpr (rest == 2 && !keys) {
        if (!plan.all_forbid && walk_leaves<F>(b, first, gvas, gpas, count)) return;
    }
    for (size_t n = 0; n < count; ++n) {
        const u64 gva = gvas[n];
        Followed f = follow_window<F, F.levels - rest>(window, first, gva);
        u64 wrong = f.leaf_wrong(plan) | (rest == F.levels ? not_canonical<F>(gva) : 0);
        if constexpr (rest == 2) {
            // One table: what it must have and must not have is one comparison.
            wrong |= (f.any & (plan.tables_care | plan.tables_forbid)) ^ plan.tables_want;
        } else if constexpr (rest > 2) {
            wrong |= f.tables_wrong(plan);
        }
        if constexpr (keys) {
            bool user = shared.all & f.all & f.leaf & kPteUser;
            wrong |= b.denied >> (bits(f.leaf, 62, 59) + (user ? 0 : 16)) & 1;
        }
        if (PV_UNLIKELY(wrong)) f.address = b.one(gva);
        gpas[n] = f.address;
    }
}

template <const PagingFormat& F, bool keys>
void walk_all(Bulk& b, std::span<const u64> gvas, u64* gpas) {
    for (size_t start = 0; start < gvas.size(); start += kGo) {
        const u64* go = gvas.data() + start;
        size_t count = std::min(kGo, gvas.size() - start);
        u64 differ = differing_bits(go, count);
        if (!(differ >> 21)) {
            walk_go<F, 1, keys>(b, go, gpas + start, count);
        } else if (!(differ >> 30)) {
            walk_go<F, 2, keys>(b, go, gpas + start, count);
        } else {
            walk_go<F, F.levels, keys>(b, go, gpas + start, count);
        }
    }
}

template <const PagingFormat& F>
u64 many(TableReader& tables, const PagingState& s, std::span<const u64> gvas, PageAccess a,
         std::span<u64> gpas, BulkEffects effects) {
    u64 root = s.cr3 & kPteAddress;
    Bulk b{tables, s, a, effects, tables.window(root)};
    b.root = b.window.host + (root & b.window.mask);
    b.plan = make_plan<F>(s, a, effects == BulkEffects::kSet).within(b.window);
    b.denied = denied_keys(s, a);
    if (b.denied) {
        walk_all<F, true>(b, gvas, gpas.data());
    } else {
        walk_all<F, false>(b, gvas, gpas.data());
    }
    return b.faults;
}

}  // namespace

u64 walk_many(TableReader& tables, const PagingState& paging, std::span<const u64> gvas,
              PageAccess access, std::span<u64> gpas, BulkEffects effects) {
    if (!~paging.a20_mask && tables.window(paging.cr3 & kPteAddress).host) {
        if (paging.mode == PagingMode::k4Level) {
            return many<kFormat4Level>(tables, paging, gvas, access, gpas, effects);
        }
        if (paging.mode == PagingMode::k5Level) {
            return many<kFormat5Level>(tables, paging, gvas, access, gpas, effects);
        }
    }
    u64 faults = 0;
    for (size_t n = 0; n < gvas.size(); ++n) {
        gpas[n] = walk_one(tables, paging, gvas[n], access, effects);
        faults += gpas[n] == kNoTranslation;
    }
    return faults;
}

}  // namespace polyvisor
