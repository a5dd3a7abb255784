// One address space to look at from outside: the memory that its tables are in, the paging state,
// and a second dimension when there is one. What debuggers, introspection and Python use; a CPU
// uses mmu/walker.hpp itself.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mmu/nested.hpp"

namespace polyvisor {

enum class WalkEffects : u8 {
    kNone,   ///< of a debugger: changes nothing
    kSet,    ///< of a CPU: sets accessed and dirty bits
    kProbe,  ///< changes nothing, asks for no rights: only what is not mapped at all is a fault
};

/// How a walk ended, in words for people and in the architecture's numbers.
struct WalkReport {
    enum Fault : u8 {
        kNone,
        kNotCanonical,  ///< #GP(0) (#SS for stacks)
        kPageFault,     ///< #PF: error_code
        kEptViolation,
        kEptMisconfiguration,
        kNestedPageFault,
    };
    Fault fault = kNone;
    u8 vector = 0;          ///< 13 or 14 when the guest gets an exception
    u32 error_code = 0;     ///< of #PF
    u64 qualification = 0;  ///< of an EPT violation; EXITINFO1 of #VMEXIT(NPF)
    u64 fault_gpa = 0;      ///< of the second dimension's faults
    bool during_walk = false;

    bool mapped = false;  ///< what follows is known: no fault, or one of rights only
    u64 physical = 0;     ///< where the byte is in the memory that was given: GPA, or HPA if nested
    u64 gpa = 0;
    u8 shift = 12;  ///< log2 of the page (nested: of the smaller)
    bool user = false, writable = false, executable = false;
    bool global = false, accessed = false, dirty = false;
    u8 memory_type = 0;  ///< index into IA32_PAT
    u8 key = 0;          ///< protection key

    std::vector<NestedTrace::Step> steps;  ///< every entry, in order (PDPTE registers: address ~0)
    bool ok() const { return fault == kNone; }
};

class AddressSpace {
  public:
    AddressSpace(std::shared_ptr<GuestMemory> memory, const PagingState& paging,
                 std::optional<SecondDimension> second = {});

    WalkReport walk(u64 gva, PageAccess access, WalkEffects effects) const;
    /// Where the byte is in memory, whatever the rights; nothing when it is not mapped or not
    /// canonical. (`physical` of a probing walk, without the rest.)
    std::optional<u64> translate(u64 gva) const;

    const PagingState& paging() const { return paging_; }
    const std::optional<SecondDimension>& second() const { return second_; }
    GuestMemory& memory() const { return *memory_; }
    const std::shared_ptr<GuestMemory>& shared_memory() const { return memory_; }

  private:
    std::shared_ptr<GuestMemory> memory_;
    PagingState paging_;
    PagingState probing_;  ///< paging_, as translate() asks
    std::optional<SecondDimension> second_;
};

}  // namespace polyvisor
