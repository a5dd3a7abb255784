// SIMD floating-point exceptions that the guest has unmasked.
#pragma once

#include "soft/ops.hpp"

namespace polyvisor::soft {

/// Executes one instruction whose row has kFpExcept, in a block made with kModeFpException. The
/// host's MXCSR keeps everything masked, so the instruction is executed and looked at afterwards:
/// when it raised a flag that the guest has unmasked, its destination gets its old value back and
/// #XM (without CR4.OSXMMEXCPT: #UD) is raised. SDM 1, 11.5. One thing is not as on hardware: an
/// unmasked underflow of a tiny but exact result is not seen, because masked operations do not
/// report it.
bool run_checked_simd(VcpuFrame& f, const Insn& i, u64 ea, Operation operation);

}  // namespace polyvisor::soft
