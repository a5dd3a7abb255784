// Many translations at once. All that does not depend on the address (which format, what the rights
// must be, where the tables' memory is) is worked out once.
#pragma once

#include <span>

#include "mmu/nested.hpp"

namespace polyvisor {

/// Where walk_many() found no translation.
inline constexpr u64 kNoTranslation = ~u64{0};

/// What walk_many() does to the tables.
enum class BulkEffects : u8 {
    kNone,  ///< nothing, as walk_pure()
    kSet,   ///< accessed and dirty bits, as walk()
};

/// Translates each of `gvas` as walk() or walk_pure() does, after checking that it is canonical.
/// `gpas` has the same size and does not overlap `gvas`; addresses that fault get kNoTranslation.
/// Returns how many faulted.
u64 walk_many(TableReader& tables, const PagingState& paging, std::span<const u64> gvas,
              PageAccess access, std::span<u64> gpas, BulkEffects effects = BulkEffects::kNone);

/// The same through two dimensions, as walk_nested() or walk_nested_pure(): `hpas` is where the
/// bytes are in the memory that holds all the tables.
u64 walk_many_nested(TableReader& tables, const PagingState& guest, const SecondDimension& second,
                     std::span<const u64> gvas, PageAccess access, std::span<u64> hpas,
                     BulkEffects effects = BulkEffects::kNone);

}  // namespace polyvisor
