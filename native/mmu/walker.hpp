// The page walker: guest-virtual to guest-physical, exactly as the processor's (SDM 3A, chapter 4).
//
//     TableReader tables(memory);                        // one per vCPU or debugger
//     PagingState paging = make_paging_state({...});     // again after CR0, CR3, CR4, EFER, PKRU
//     WalkResult r = walk(tables, paging, gva, {.write = true, .user = true});
//     if (!r.ok()) deliver #PF with r.error
//
// walk() sets accessed and dirty bits as the processor does: with a locked compare-exchange, only
// once the permission checks have passed, starting over when another CPU changed an entry
// meanwhile. walk_pure() changes nothing. Tables outside memory read as all ones, as an empty bus
// does, so every CR3 a guest can load gives a translation or a page fault, never a host error. The
// caller has checked that the address is canonical: bits above the format's width are not looked
// at.
#pragma once

#include "memory/guest_memory.hpp"
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
    bool pke = false, pse = false, pge = false;
    bool pages_1gb = true;
    u32 pkru = 0;
    u64 cr3 = 0;
    u64 pdpte[4]{};            ///< PAE: the registers, checked when they were loaded
    u64 physical_mask = 0;     ///< bits below MAXPHYADDR
    u64 a20_mask = ~u64{0};    ///< and'ed to every physical address
    u64 reserved = 0;          ///< must be zero in every present entry
    u64 reserved_large32 = 0;  ///< ... in a 4 MB page's PDE (PSE-36 address bits)
};

struct PagingRegisters {
    u64 cr0 = 0, cr3 = 0, cr4 = 0, efer = 0;
    u32 pkru = 0;
    u64 physical_mask = bit(40) - 1;
    u64 a20_mask = ~u64{0};
    const u64* pdpte = nullptr;  ///< four, for PAE
    bool pages_1gb = true;
    bool pse36 = true;
};

PagingState make_paging_state(const PagingRegisters& registers);

/// A PDPTE with a reserved bit set: loading it is #GP(0) (SDM 3A, 4.4.1). Only when present.
constexpr bool pdpte_valid(u64 pdpte, u64 physical_mask) {
    u64 allowed =
        (physical_mask & ~kPageMask) | 0xe00 | kPtePresent | kPteWriteThrough | kPteCacheDisable;
    return !(pdpte & kPtePresent) || !(pdpte & ~allowed);
}

struct Translation {
    u64 gpa = 0;
    u8 shift = 12;          ///< log2 of the page: 12, 21, 22 or 30
    bool user = false;      ///< every level has U/S set
    bool writable = false;  ///< every level has R/W set
    bool nx = false;        ///< some level has XD set (and EFER.NXE is on)
    bool global = false;    ///< G, with CR4.PGE
    bool dirty = false;     ///< the leaf's D bit is set now
    bool store_ok = false;  ///< a store by the same kind of access would pass the permission checks
    u8 memory_type = 0;     ///< index into IA32_PAT: PWT | PCD << 1 | PAT << 2
    u8 key = 0;             ///< protection key
};

struct WalkResult {
    Translation page;
    u32 error = 0;
    bool fault = false;
    bool ok() const { return !fault; }
};

/// Where a walk reads its tables: guest memory, remembering the last region. A nested walk will
/// have a reader of its own that translates table addresses first.
class TableReader {
  public:
    explicit TableReader(GuestMemory& memory) : memory_(memory) {}

    /// Host address of the naturally aligned entry at gpa, or nullptr when it is not in memory.
    u8* entry(u64 gpa) {
        if (PV_UNLIKELY(!hint_ || !hint_->contains(gpa))) {
            hint_ = memory_.find(Gpa(gpa));
            if (!hint_) return nullptr;
        }
        return hint_->host(gpa);
    }
    /// Whether the entry last looked up may be written (read-only regions keep their A/D bits).
    bool writable() const { return !hint_->read_only; }
    /// The entry last looked up was changed: lets code caches and the dirty log know.
    void note_write(u64 gpa, u64 size) {
        u8 traps = hint_->flags(gpa).load(std::memory_order_relaxed);
        if (PV_LIKELY(!(traps & kPageWriteTraps))) return;
        if (traps & kPageDirtyTrack) hint_->note_first_store(gpa);
        memory_.recheck_code(Gpa(gpa), size);
    }
    GuestMemory& memory() { return memory_; }

  private:
    GuestMemory& memory_;
    const GuestMemory::Region* hint_ = nullptr;
};

/// Translates, setting A/D bits. Mode kNone: identity.
WalkResult walk(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access);
/// Translates without side effects.
WalkResult walk_pure(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access);

/// Every entry that a walk met, from the root, for debuggers.
struct WalkTrace {
    struct Step {
        u64 gpa;  ///< of the entry; ~0 for a PDPTE register
        u64 entry;
        u8 shift;
    };
    std::array<Step, 6> steps{};
    u8 count = 0;
};
/// walk_pure() that also reports the entries.
WalkResult walk_trace(TableReader& tables, const PagingState& paging, u64 gva, PageAccess access,
                      WalkTrace& trace);

}  // namespace polyvisor
