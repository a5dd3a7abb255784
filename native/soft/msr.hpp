// Model-specific registers. Private to this folder.
#pragma once

#include "soft/ops.hpp"

namespace polyvisor::soft {

/// False: #GP(0) is for the caller to raise.
bool read_msr(VcpuFrame& f, u32 index, u64& value);
bool write_msr(VcpuFrame& f, u32 index, u64 value);

}  // namespace polyvisor::soft
