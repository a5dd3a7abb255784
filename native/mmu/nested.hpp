// Two-dimensional walks: the guest's own paging structures, each of whose entries lies at a
// guest-physical address that a second walk translates, and the page likewise (SDM 3C 29.3, APM 2
// 15.25). The second dimension is Intel's EPT or AMD's NPT, whose tables are ordinary paging
// structures that every access walks as a user-mode one.
//
// The order of things is the processor's: the guest's walk with its permission checks and A/D bits
// comes first, then the page is translated. A guest's table entry counts in the second dimension as
//   EPT with A/D bits   a read and a write, always (both are in the qualification);
//   EPT without         a read; a read and a write when the walk has to set A/D bits in it;
//   NPT                 a write of user mode, always (APM 2, 15.25.5).
// PDPTEs of PAE guests are in registers (PagingState::pdpte) and need no translation.
#pragma once

#include <variant>
#include <vector>

#include "mmu/ept.hpp"

namespace polyvisor {

/// AMD's nested paging: nCR3 in `paging.cr3`, the host's CR0, CR4 and EFER for the rest. What only
/// concerns supervisors (WP, SMEP, SMAP) has no effect, and protection keys are not looked at.
struct NptState {
    PagingState paging;
};
using SecondDimension = std::variant<EptState, NptState>;

/// EXITINFO1 of #VMEXIT(NPF) beyond the page-fault error code (APM 2, 15.25.6).
enum NestedPageFault : u64 { kNpfFinal = bit(32), kNpfTable = bit(33) };

struct NestedResult {
    enum Fault : u8 {
        kNone,
        kGuest,             ///< a #PF in the guest: `error`
        kViolation,         ///< EPT violation: `qualification`
        kMisconfiguration,  ///< EPT misconfiguration
        kNested,            ///< #VMEXIT(NPF): `qualification` is EXITINFO1
    };
    Fault fault = kNone;
    bool during_walk = false;  ///< the second dimension failed for a guest's table entry
    u32 error = 0;
    u64 qualification = 0;
    u64 fault_gpa = 0;  ///< what the second dimension could not translate
    Translation guest;  ///< GVA to GPA, when the guest's walk was through
    u64 hpa = 0;
    u8 shift = 12;          ///< log2 of the smaller page of the two dimensions
    bool writable = false;  ///< by both
    bool executable = false;
    bool ok() const { return fault == kNone; }
};

/// What a walk looked at, in order.
struct NestedTrace {
    struct Step {
        u64 address;  ///< of the entry: guest-physical for the guest's, host-physical otherwise
        u64 entry;
        u8 shift;     ///< log2 of what the entry maps if it maps a page
        bool second;  ///< an entry of the second dimension, translating the guest's next address
    };
    std::vector<Step> steps;
};

/// Translates, setting A/D bits in both dimensions as the processor does.
NestedResult walk_nested(TableReader& tables, const PagingState& guest,
                         const SecondDimension& second, u64 gva, PageAccess access);
/// Without side effects; `trace` is optional.
NestedResult walk_nested_pure(TableReader& tables, const PagingState& guest,
                              const SecondDimension& second, u64 gva, PageAccess access,
                              NestedTrace* trace = nullptr);
/// Without side effects and asking for no rights: only what is not mapped at all is a fault.
NestedResult walk_nested_probe(TableReader& tables, const PagingState& guest,
                               const SecondDimension& second, u64 gva,
                               NestedTrace* trace = nullptr);

}  // namespace polyvisor
