// What an address space maps: every page in order, or joined into ranges.
//
//     MappingScanner scanner(space);
//     for (MappedRange page; scanner.next(page);) ...      // one page at a time
//     RangeList list = list_ranges(space, {.limit = 1000});
//
// The tables are read as they stand and never trusted: the descent has a frame for each level and
// no recursion, tables outside memory read as all ones, entries with reserved bits map nothing.
// Tables that refer to themselves map up to 2^36 pages (5-level: 2^45), each of which a processor
// would find too; so both the entries looked at and the ranges kept have limits, and whoever meets
// one is told where to go on.
#pragma once

#include <array>
#include <vector>

#include "mmu/address_space.hpp"

namespace polyvisor {

/// Adjacent pages with the same rights.
struct MappedRange {
    u64 gva = 0;
    u64 physical = 0;  ///< of the first byte, in the memory that was given (HPA if nested)
    u64 size = 0;      ///< bytes
    u8 shift = 12;     ///< log2 of the pages (nested: of the smaller); joined by rights: the least
    bool user = false, writable = false, executable = false;
    bool global = false;

    bool same_rights(const MappedRange& other) const {
        return user == other.user && writable == other.writable && executable == other.executable &&
               global == other.global;
    }
};

/// Yields the pages between two addresses, ascending. What it holds on to is the AddressSpace.
class MappingScanner {
  public:
    /// From `start` up to and including `last`; either may be non-canonical.
    explicit MappingScanner(const AddressSpace& space, u64 start = 0, u64 last = ~u64{0});

    /// The next page, cut to the two addresses; false when there is none, or `budget` is used up.
    bool next(MappedRange& page);

    /// Entries of tables that may still be looked at.
    u64 budget = ~u64{0};
    /// Whether next() returned false for want of budget.
    bool exhausted() const { return exhausted_; }
    /// What lies below has been looked at.
    u64 position() const { return widen(position_); }

  private:
    struct Level {
        u8 shift;
        LargePage large;
        bool leaf;       ///< every entry maps a page
        bool register_;  ///< PAE: one of the PDPTE registers
    };
    struct Frame {
        const u8* table;
        u64 base;  ///< linear address of entry 0
        u32 index, last;
        u64 rights;  ///< R/W and U/S of all levels above
        bool no_execute;
    };

    void enter(const u8* table, u64 base, u64 rights, bool no_execute);
    const u8* table_at(u64 address);
    bool take(const Frame& frame, u64 entry, u64 linear);
    bool next_piece(MappedRange& page);
    u64 widen(u64 linear) const;

    const AddressSpace& space_;
    const PagingState& paging_;
    TableReader tables_;
    std::array<Level, 6> levels_{};
    std::array<Frame, 6> frames_{};
    unsigned level_count_ = 0, entry_bytes_ = 8, width_ = 48;
    int depth_ = -1;
    u64 start_ = 0, last_ = 0;  // linear: as many bits as the format translates
    u64 position_ = 0;
    u64 reserved_ = 0;
    MappedRange leaf_;  // of the first dimension, what is left of it
    bool have_leaf_ = false;
    bool exhausted_ = false;
};

struct RangeOptions {
    enum class Join : u8 {
        kPhysical,  ///< neighbours in both address spaces, with the same rights and page size
        kRights,    ///< neighbours in the virtual one with the same rights
    };
    u64 start = 0, last = ~u64{0};
    Join join = Join::kPhysical;
    u64 limit = u64{1} << 20;   ///< ranges
    u64 budget = u64{1} << 28;  ///< entries looked at: some tenths of a second
};

struct RangeList {
    std::vector<MappedRange> ranges;
    bool truncated = false;  ///< a limit was met
    u64 next = 0;            ///< then: where the rest begins
};

RangeList list_ranges(const AddressSpace& space, const RangeOptions& options = {});

}  // namespace polyvisor
