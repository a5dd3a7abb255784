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
#include "mmu/paging.hpp"

namespace polyvisor {

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

/// A naturally aligned power of two of a region: what of it a table's address can be masked with.
struct TableWindow {
    const u8* host = nullptr;  ///< of `start`
    u64 start = 0;
    u64 mask = 0;               ///< address bits within the window, without those within a page
    u64 outside = kPteAddress;  ///< bits that no entry with a table in the window has: those of
                                ///< the address that are zero in all of the window, and PS
    bool holds(u64 address) const {
        return !((address & outside) | (~address & start)) && host != nullptr;
    }
};

/// Where a walk reads its tables: memory, remembering the region last used.
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
    /// The largest window around a table: without host address when the table is not in memory.
    const TableWindow& window(u64 table) {
        if (PV_UNLIKELY(!window_.holds(table))) find_window(table);
        return window_;
    }
    GuestMemory& memory() { return memory_; }

  private:
    void find_window(u64 table);

    GuestMemory& memory_;
    const GuestMemory::Region* hint_ = nullptr;
    TableWindow window_;
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
