// walk_many_nested(). As in mmu/bulk.cpp, what a go of addresses shares of the guest's walk is
// walked once, and the host waits for the entries of a whole go together: one walk of four by four
// levels is a chain of 24 loads, too long for the host's processor to start on the next meanwhile.
#include <algorithm>

#include "mmu/bulk.hpp"
#include "mmu/nested_fast.hpp"

namespace polyvisor {
namespace {

using namespace mmu_detail;

template <bool ept>
struct NestedBulk {
    TableReader& tables;
    const PagingState& guest;
    const SecondDimension& second;
    PageAccess access;
    BulkEffects effects;
    SecondPlans plans;
    Plan plan;  ///< of the guest's entries
    u64 faults = 0;

    [[gnu::noinline]] u64 slow(u64 gva) {
        u64 hpa = kNoTranslation;
        if (is_canonical(guest.mode, gva)) {
            NestedResult r = effects == BulkEffects::kSet
                                 ? walk_nested(tables, guest, second, gva, access)
                                 : walk_nested_pure(tables, guest, second, gva, access);
            if (r.ok()) hpa = r.hpa;
        }
        faults += hpa == kNoTranslation;
        return hpa;
    }

    /// Host address of a guest's entry; nullptr: not the common case.
    PV_INLINE const u8* entry(u64 gpa) {
        Followed f;
        if (PV_UNLIKELY(follow_second<ept>(plans, plans.table, gpa, f))) return nullptr;
        return tables.entry(f.address);
    }

    void one_by_one(const u64* gvas, u64* hpas, size_t count) {
        for (size_t n = 0; n < count; ++n) {
            Followed f, last;
            bool found = !not_canonical<kFormat4Level>(gvas[n]) &&
                         follow_nested<ept>(tables, guest, plans, gvas[n], f, last) &&
                         !f.wrong(plan);
            hpas[n] = PV_LIKELY(found) ? last.address : slow(gvas[n]);
        }
    }

    /// Addresses within 1 GB. False, with nothing done, when not all are in 4 KiB pages of the
    /// guest's that the access may have.
    bool together(const u64* gvas, u64* hpas, size_t count) {
        constexpr const PagingFormat& F = kFormat4Level;
        if (not_canonical<F>(gvas[0])) return false;
        Followed shared;
        u64 table = guest.cr3 & kPteAddress;
        for (unsigned level = 0; level < 2; ++level) {
            const u8* host = entry(table + entry_offset<F>(level, gvas[0]));
            if (!host) return false;
            u64 found = read_entry<8>(host);
            shared.all &= found;
            shared.any |= found;
            table = found & kPteAddress;
        }
        const u8* directory = entry(table);
        if (!directory) return false;

        const u8* leaves[kGo];
        for (size_t n = 0; n < count; ++n) {
            u64 found = read_entry<8>(directory + entry_offset<F>(2, gvas[n]));
            shared.all &= found;
            shared.any |= found;
            leaves[n] = entry((found & kPteAddress) + entry_offset<F>(3, gvas[n]));
            if (PV_UNLIKELY(!leaves[n])) return false;
            __builtin_prefetch(leaves[n]);
        }
        if ((shared.any & kPtePageSize) || shared.tables_wrong(plan)) return false;

        u64 wrong = 0;
        for (size_t n = 0; n < count; ++n) {
            u64 leaf = read_entry<8>(leaves[n]);
            wrong |= (leaf & plan.leaf_care) ^ plan.leaf_want;
            hpas[n] = (leaf & kPteAddress) | (gvas[n] & kPageMask);
            prefetch_last(hpas[n]);
        }
        if (PV_UNLIKELY(wrong)) return false;

        for (size_t n = 0; n < count; ++n) {
            Followed f;
            u64 odd = follow_second<ept>(plans, plans.page, hpas[n], f);
            hpas[n] = PV_LIKELY(!odd) ? f.address : slow(gvas[n]);
        }
        return true;
    }

    /// Wherever the masked address leads, it leads into memory.
    PV_INLINE void prefetch_last(u64 gpa) {
        const u8* table = plans.root;
        for (unsigned level = 0; level < 3; ++level) {
            u64 found = read_entry<8>(table + entry_offset<kFormatEpt4>(level, gpa));
            table = plans.window.host + (found & plans.window.mask);
        }
        __builtin_prefetch(table + entry_offset<kFormatEpt4>(3, gpa));
    }
};

template <bool ept, class Second>
u64 many_nested(TableReader& tables, const PagingState& guest, const Second& kind,
                const SecondDimension& second, std::span<const u64> gvas, PageAccess access,
                std::span<u64> hpas, BulkEffects effects) {
    const bool sets = effects == BulkEffects::kSet;
    NestedBulk<ept> b{tables,
                      guest,
                      second,
                      access,
                      effects,
                      plan_second(tables, kind, access, sets),
                      make_plan<kFormat4Level>(guest, access, sets)};
    const bool common = nested_common(guest, b.plans) && !denied_keys(guest, access);
    // Where SMEP or SMAP forbid user pages, that depends on all levels of each.
    const bool may_share = !b.plan.all_forbid;
    for (size_t start = 0; start < gvas.size(); start += kGo) {
        const u64* go = gvas.data() + start;
        u64* to = hpas.data() + start;
        size_t count = std::min(kGo, gvas.size() - start);
        if (!common) {
            for (size_t n = 0; n < count; ++n) to[n] = b.slow(go[n]);
        } else if (!may_share || differing_bits(go, count) >> 30 || !b.together(go, to, count)) {
            b.one_by_one(go, to, count);
        }
    }
    return b.faults;
}

}  // namespace

u64 walk_many_nested(TableReader& tables, const PagingState& guest, const SecondDimension& second,
                     std::span<const u64> gvas, PageAccess access, std::span<u64> hpas,
                     BulkEffects effects) {
    if (const EptState* ept = std::get_if<EptState>(&second)) {
        return many_nested<true>(tables, guest, *ept, second, gvas, access, hpas, effects);
    }
    const NptState& npt = *std::get_if<NptState>(&second);
    return many_nested<false>(tables, guest, npt, second, gvas, access, hpas, effects);
}

}  // namespace polyvisor
