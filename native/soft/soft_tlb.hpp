// The soft TLB's own operations; the format of an entry is described at Tlb in soft/frame.hpp.
#pragma once

#include "soft/frame.hpp"

namespace polyvisor::soft {

/// What neg_r/neg_w hold when entry n must not match.
constexpr u64 tlb_invalid(unsigned n) {
    return -(u64{n ^ 1} << kPageShift);
}

/// Empties every context.
void clear_tlbs(VcpuFrame& f);
/// Removes the entries of one linear page.
void clear_tlb_page(VcpuFrame& f, u64 linear);
/// Makes no entry writable, so that every page's next store takes the slow path.
void drop_writable(VcpuFrame& f);
/// Makes no entry writable whose page starts at this host address; true when there was one.
bool drop_writable_host(VcpuFrame& f, const u8* host_page);

}  // namespace polyvisor::soft
