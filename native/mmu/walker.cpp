#include "mmu/walker.hpp"

#include "mmu/walk_fast.hpp"

namespace polyvisor {

using mmu_detail::Effects;

PagingState make_paging_state(const PagingRegisters& r) {
    PagingState s;
    s.mode = paging_mode_of(r.cr0, r.cr4, r.efer);
    bool ia32e = s.mode == PagingMode::k4Level || s.mode == PagingMode::k5Level;
    s.wp = r.cr0 & bit(16);
    s.nxe = r.efer & bit(11);
    s.pse = r.cr4 & bit(4);
    s.pge = r.cr4 & bit(7);
    s.smep = r.cr4 & bit(20);
    s.smap = r.cr4 & bit(21);
    s.pke = (r.cr4 & bit(22)) && ia32e;
    s.pks = (r.cr4 & bit(24)) && ia32e;
    s.pages_1gb = r.pages_1gb;
    s.pkru = r.pkru;
    s.pkrs = r.pkrs;
    s.cr3 = r.cr3 & r.physical_mask;
    s.physical_mask = r.physical_mask;
    s.a20_mask = r.a20_mask;
    if (r.pdpte) {
        for (int n = 0; n < 4; ++n) s.pdpte[n] = r.pdpte[n];
    }
    s.reserved = (kPteAddress & ~r.physical_mask) | (s.nxe ? 0 : u64{kPteNoExecute});
    // PDE of a 4 MB page: bits 20:13 are address bits 39:32, as far as MAXPHYADDR reaches.
    u64 high = r.pse36 ? bits(r.physical_mask, 39, 32) : 0;
    s.reserved_large32 = bit(21) | ((~high & 0xff) << 13);
    return s;
}

void TableReader::find_window(u64 table) {
    window_ = {};
    const GuestMemory::Region* region = memory_.find(Gpa(table));
    if (!region) return;
    u64 first = region->start.value, size = kPageSize;
    // The first larger block that leaves the region ends it: the next ones are larger yet.
    auto inside = [&](u64 bytes) {
        u64 start = align_down(table, bytes);
        return start >= first && start - first <= region->size - bytes;
    };
    while (size <= region->size / 2 && inside(size * 2)) size *= 2;
    window_.start = align_down(table, size);
    window_.host = region->host(window_.start);
    window_.mask = (size - 1) & ~kPageMask;
    window_.outside = (kPteAddress & ~window_.mask & ~window_.start) | kPtePageSize;
}

namespace mmu_detail {
namespace {

/// The common case in tables of any kind; false: walk_generic.hpp must say.
template <const PagingFormat& F, bool sets>
[[gnu::noinline]] bool walk_any_place(TableReader& tables, const PagingState& s, u64 gva,
                                      PageAccess a, WalkResult& result) {
    Followed f;
    if (!follow<F>(s, gva, [&](u64 address) { return tables.entry(address); }, f)) return false;
    const Plan plan = make_plan<F>(s, a, sets);
    if (f.wrong(plan)) return false;
    describe<F>(s, plan, f, result.page);
    return keys_allow(s, a, result.page);
}

/// The same for what is most common.
template <const PagingFormat& F, bool sets>
PV_INLINE bool walk_window(TableReader& tables, const PagingState& s, u64 gva, PageAccess a,
                           WalkResult& result) {
    u64 root = s.cr3 & kPteAddress;
    const TableWindow& window = tables.window(root);
    if (PV_UNLIKELY(!window.host)) return false;
    const Plan plan = make_plan<F>(s, a, sets);
    const Followed f = follow_window<F>(window, window.host + (root & window.mask), gva);
    if (PV_UNLIKELY(f.wrong(plan.within(window)))) {
        return walk_any_place<F, sets>(tables, s, gva, a, result);
    }
    describe<F>(s, plan, f, result.page);
    return keys_allow(s, a, result.page);
}

template <bool sets>
PV_INLINE bool walk_fast(TableReader& tables, const PagingState& s, u64 gva, PageAccess a,
                         WalkResult& result) {
    if (PV_UNLIKELY(~s.a20_mask)) return false;
    if (PV_LIKELY(s.mode == PagingMode::k4Level)) {
        return walk_window<kFormat4Level, sets>(tables, s, gva, a, result);
    }
    switch (s.mode) {
        case PagingMode::k5Level:
            return walk_window<kFormat5Level, sets>(tables, s, gva, a, result);
        case PagingMode::kPae:
            return walk_any_place<kFormatPae, sets>(tables, s, gva, a, result);
        case PagingMode::k32Bit:
            return walk_any_place<kFormat32Bit, sets>(tables, s, gva, a, result);
        default:
            return false;
    }
}

template <Effects effects>
[[gnu::noinline]] void walk_slow(TableReader& tables, const PagingState& s, u64 gva, PageAccess a,
                                 WalkResult& result) {
    FlatLoader loader{tables};
    walk_any<effects>(loader, s, gva, a, result);
}

}  // namespace
}  // namespace mmu_detail

// One variable is returned from both paths, so that it is made where the caller wants it.
WalkResult walk(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access) {
    WalkResult result;
    if (PV_UNLIKELY(!mmu_detail::walk_fast<true>(tables, paging, gva, access, result))) {
        mmu_detail::walk_slow<Effects::kSetBits>(tables, paging, gva, access, result);
    }
    return result;
}

WalkResult walk_pure(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access) {
    WalkResult result;
    if (PV_UNLIKELY(!mmu_detail::walk_fast<false>(tables, paging, gva, access, result))) {
        mmu_detail::walk_slow<Effects::kNone>(tables, paging, gva, access, result);
    }
    return result;
}

WalkResult walk_trace(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access,
                      WalkTrace& trace) {
    trace.count = 0;
    WalkResult result;
    mmu_detail::FlatLoader loader{tables, &trace};
    mmu_detail::walk_any<Effects::kTrace>(loader, paging, gva, access, result);
    return result;
}

}  // namespace polyvisor
