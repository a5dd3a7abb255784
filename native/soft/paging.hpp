// The PDPTE registers of PAE paging (SDM 3A, 4.4.1). Private to this folder.
#pragma once

#include "soft/environment.hpp"

namespace polyvisor::soft {

/// PAE paging outside IA-32e mode would be in use with these registers.
constexpr bool uses_pdptes(u64 cr0, u64 cr4, u64 efer) {
    return (cr0 & bit(31)) && (cr4 & bit(5)) && !(efer & bit(10));
}

/// Reads the four PDPTEs that `cr3` points to. False: one has a reserved bit set.
bool read_pdptes(const VcpuFrame& f, u64 cr3, u64 (&pdpte)[4]);

}  // namespace polyvisor::soft
