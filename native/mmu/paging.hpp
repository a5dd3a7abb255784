// What a page walk depends on: how an address is used, and the registers that decide what that
// needs. Made from the registers once, looked at by every walk.
#pragma once

#include "mmu/format.hpp"

namespace polyvisor {

/// Page-fault error code (SDM 3A, figure 4-12).
enum PageFaultError : u32 {
    kPfPresent = 1,
    kPfWrite = 2,
    kPfUser = 4,
    kPfReserved = 8,
    kPfFetch = 16,
    kPfProtectionKey = 32,
};

/// How an address is used.
struct PageAccess {
    bool write = false;
    bool fetch = false;
    bool user = false;  ///< made at CPL 3 and not implicitly supervisor
    bool implicit =
        false;        ///< implicit supervisor access (descriptor tables, TSS): SMAP ignores AC
    bool ac = false;  ///< EFLAGS.AC
};

/// What paging depends on. Make one with make_paging_state(): the reserved masks follow from the
/// rest.
struct PagingState {
    PagingMode mode = PagingMode::kNone;
    bool wp = false, nxe = false, smep = false, smap = false;
    bool pke = false, pks = false, pse = false, pge = false;
    bool pages_1gb = true;
    u32 pkru = 0;  ///< rights of user pages' keys
    u32 pkrs = 0;  ///< IA32_PKRS: of supervisor pages' keys
    u64 cr3 = 0;
    u64 pdpte[4]{};            ///< PAE: the registers, checked when they were loaded
    u64 physical_mask = 0;     ///< bits below MAXPHYADDR
    u64 a20_mask = ~u64{0};    ///< and'ed to every physical address
    u64 reserved = 0;          ///< must be zero in every present entry
    u64 reserved_large32 = 0;  ///< ... in a 4 MB page's PDE (PSE-36 address bits)
};

struct PagingRegisters {
    u64 cr0 = 0, cr3 = 0, cr4 = 0, efer = 0;
    u32 pkru = 0, pkrs = 0;
    u64 physical_mask = bit(40) - 1;
    u64 a20_mask = ~u64{0};
    const u64* pdpte = nullptr;  ///< four, for PAE
    bool pages_1gb = true;
    bool pse36 = true;
};

PagingState make_paging_state(const PagingRegisters& registers);

/// The same tables with nothing that denies a supervisor's read: for walks that only ask whether
/// something is mapped.
constexpr PagingState probing(PagingState paging) {
    paging.smep = paging.smap = paging.pke = paging.pks = false;
    return paging;
}

/// A PDPTE with a reserved bit set: loading it is #GP(0) (SDM 3A, 4.4.1). Only when present.
constexpr bool pdpte_valid(u64 pdpte, u64 physical_mask) {
    u64 allowed =
        (physical_mask & ~kPageMask) | 0xe00 | kPtePresent | kPteWriteThrough | kPteCacheDisable;
    return !(pdpte & kPtePresent) || !(pdpte & ~allowed);
}

/// Whether `gva` is canonical for the paging mode: only those are walked (#GP or #SS otherwise).
/// Without IA-32e paging addresses are 32 bits wide.
constexpr bool is_canonical(PagingMode mode, u64 gva) {
    switch (mode) {
        case PagingMode::k5Level:
            return static_cast<u64>(static_cast<s64>(gva << 7) >> 7) == gva;
        case PagingMode::k4Level:
            return static_cast<u64>(static_cast<s64>(gva << 16) >> 16) == gva;
        default:
            return gva >> 32 == 0;
    }
}

}  // namespace polyvisor
