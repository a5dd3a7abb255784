// The lists of operations, one per source file; soft/dispatch joins them into one table.
#pragma once

#include <span>

#include "soft/ops.hpp"

namespace polyvisor::soft {

std::span<const OpBinding>
arithmetic_ops();  // ops_arithmetic.cpp: ADD..CMP, INC, NEG, MUL, DIV, BCD
std::span<const OpBinding>
bit_ops();  // ops_bits.cpp: shifts, rotates, BT*, BSF, BMI, POPCNT, CRC32
std::span<const OpBinding> data_ops();  // ops_data.cpp: MOV*, XCHG, LEA, PUSH, POP, CMPXCHG*, flags
std::span<const OpBinding> string_ops();  // ops_string.cpp: MOVS, STOS, LODS, CMPS, SCAS
std::span<const OpBinding> branch_ops();  // ops_branch.cpp: near JMP, CALL, RET, Jcc, LOOP
std::span<const OpBinding>
far_ops();  // ops_far.cpp: far JMP, CALL, RET, IRET, INT, SYSCALL, SYSENTER
std::span<const OpBinding>
segment_ops();  // ops_segment.cpp: MOV Sreg, LDS.., LGDT.., LAR, VERR, ARPL
std::span<const OpBinding>
system_ops();                          // ops_system.cpp: MOV CR/DR, MSRs, CPUID, HLT, INVLPG, RDTSC
std::span<const OpBinding> io_ops();   // ops_io.cpp: IN, OUT, INS, OUTS
std::span<const OpBinding> x87_ops();  // ops_x87.cpp
std::span<const OpBinding>
fpu_state_ops();                       // ops_fpu_state.cpp: FXSAVE, XSAVE, LDMXCSR, EMMS, XGETBV
std::span<const OpBinding> mmx_ops();  // ops_mmx.cpp
std::span<const OpBinding> sse_ops();  // ops_sse*.cpp
std::span<const OpBinding> avx_ops();  // ops_avx*.cpp

}  // namespace polyvisor::soft
