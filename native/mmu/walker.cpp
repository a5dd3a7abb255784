#include "mmu/walker.hpp"

#include "mmu/walk_generic.hpp"

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

WalkResult walk(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access) {
    WalkResult result;
    mmu_detail::FlatLoader loader{tables};
    mmu_detail::walk_any<Effects::kSetBits>(loader, paging, gva, access, result);
    return result;
}

WalkResult walk_pure(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access) {
    WalkResult result;
    mmu_detail::FlatLoader loader{tables};
    mmu_detail::walk_any<Effects::kNone>(loader, paging, gva, access, result);
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
