#include "mmu/bulk.hpp"

namespace polyvisor {

u64 walk_many(TableReader& tables, const PagingState& paging, std::span<const u64> gvas,
              PageAccess access, std::span<u64> gpas, BulkEffects effects) {
    u64 faults = 0;
    for (size_t n = 0; n < gvas.size(); ++n) {
        gpas[n] = kNoTranslation;
        if (is_canonical(paging.mode, gvas[n])) {
            WalkResult r = effects == BulkEffects::kSet
                               ? walk(tables, paging, gvas[n], access)
                               : walk_pure(tables, paging, gvas[n], access);
            if (r.ok()) gpas[n] = r.page.gpa;
        }
        faults += gpas[n] == kNoTranslation;
    }
    return faults;
}

u64 walk_many_nested(TableReader& tables, const PagingState& guest, const SecondDimension& second,
                     std::span<const u64> gvas, PageAccess access, std::span<u64> hpas,
                     BulkEffects effects) {
    u64 faults = 0;
    for (size_t n = 0; n < gvas.size(); ++n) {
        hpas[n] = kNoTranslation;
        if (is_canonical(guest.mode, gvas[n])) {
            NestedResult r = effects == BulkEffects::kSet
                                 ? walk_nested(tables, guest, second, gvas[n], access)
                                 : walk_nested_pure(tables, guest, second, gvas[n], access);
            if (r.ok()) hpas[n] = r.hpa;
        }
        faults += hpas[n] == kNoTranslation;
    }
    return faults;
}

}  // namespace polyvisor
