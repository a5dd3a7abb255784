// clang-format off
// The instruction table: one row per instruction form, the single source for decoder, interpreter, JIT
// and tests. The rows stand in optab_int.inc (integer and system), optab_x87.inc and optab_simd.inc
// (MMX, SSE, AVX, AES, SHA, ...), each row as
//
//   PV_OP(id, "mnemonic", map, opcode, prefix, ext, op1, op2, op3, op4, reads, writes, feature, attrs)
//
//   id        enumerator Op::id, unique: MNEMONIC_operands, e.g. ADD_Eb_Gb, PADDB_Vx_Wx, VPADDB_Vx_Hx_Wx
//   mnemonic  lower case as a disassembler prints it
//   map       One, M0F, M0F38, M0F3A (legacy), V0F, V0F38, V0F3A (VEX), X87 (opcode D8..DF)
//   opcode    last opcode byte. With attr kOpcodeReg the row covers opcode..opcode+7 (register in rm)
//   prefix    Any (66/F2/F3 keep their usual meaning), NP (no 66/F2/F3), P66, PF3, PF2 (mandatory)
//   ext       None (no ModRM), R (any ModRM), M (memory only), RR (register only),
//             X(n) /n any mod, MX(n) /n memory, RX(n) /n register, F(byte) exactly this ModRM byte
//   op1..4    operand codes below, `_` for none. In destination-first (Intel) order.
//   reads     status flags read: any of C P A Z S O D (direction), e.g. kC | kZ; 0 for none
//   writes    status flags written or left undefined (kAllFlags for most arithmetic)
//   feature   Feature enumerator without the k: Base, Sse2, Avx, ...
//   attrs     Attr bits or'ed, 0 for none
//
// Among rows that match, the first with all constraints met wins; a row with a mandatory prefix
// beats Any and NP wherever it stands (PF2/PF3 beat P66).
// clang-format on
#pragma once

#include <string_view>

#include "soft/insn.hpp"

namespace polyvisor::soft {

enum class Map : u8 { One, M0F, M0F38, M0F3A, V0F, V0F38, V0F3A, X87 };
enum class Mandatory : u8 { Any, NP, P66, PF3, PF2 };

// clang-format off
/// Operand codes, after the opcode-map appendix of the manuals (SDM 2D, A.2).
enum class Operand : u8 {
    _,
    Eb, Ew, Ed, Eq, Ev, Ey,   ///< ModRM.rm register or memory; v: operand size; y: 4, or 8 with REX.W
    Gb, Gw, Gd, Gq, Gv, Gy,   ///< ModRM.reg register
    Mb, Mw, Md, Mq, Mv, My, Mdq, Mqq, M,  ///< memory only; dq 16 bytes, qq 32; M: no size (LEA, INVLPG)
    Mp, Ms, Mt, M80, M28, M94, M512,  ///< far pointer, 6/10-byte table register, 10-byte x87/BCD, FLDENV, FNSAVE, FXSAVE
    Ma,                       ///< BOUND pair
    Rv, Ry, Rd, Rq,           ///< ModRM.rm, register only (mod ignored for MOV CR/DR)
    Zv, Zb,                   ///< register in the opcode's low bits
    Ib, sIb, Iw, Iz, Iv, I1, I3,  ///< immediate: unsigned byte, sign-extended byte, word, z (32 for 64-bit, sign extended), full
    Jb, Jz,                   ///< relative branch
    Ap,                       ///< far pointer immediate
    Ob, Ov,                   ///< moffs
    Sw,                       ///< segment register in ModRM.reg
    Cd, Dd,                   ///< control, debug register in ModRM.reg
    AL, CL, AX, eAX, rAX, DX, ES, CS, SS, DS, FS, GS,  ///< fixed; eAX: opsize 2/4, rAX: opsize 2/4/8
    Xb, Xv, Yb, Yv,           ///< string source DS:rSI, destination ES:rDI
    Fv,                       ///< flags
    Pq, Pd, Qq, Qd, Nq,       ///< MMX: ModRM.reg; ModRM.rm reg/mem; ModRM.rm register only
    Vx, Vdq, Vq, Vd, Vss, Vsd, Vps, Vpd,  ///< XMM/YMM in ModRM.reg (x: by VEX.L)
    Hx, Hdq, Hss, Hsd,        ///< XMM/YMM in VEX.vvvv
    Wx, Wdq, Wq, Wd, Ww, Wb, Wss, Wsd, Wps, Wpd,  ///< ModRM.rm register or memory of that size
    Ux, Udq, Uq,              ///< ModRM.rm, XMM/YMM register only
    Lx, Ldq,                  ///< XMM/YMM in imm8[7:4]
    By,                       ///< general register in VEX.vvvv (BMI)
    ST0, STi,                 ///< x87; STi in ModRM.rm
    Md_i, Mq_i, Mw_i, Md_f, Mq_f,  ///< x87 memory: integer and float widths
    VMx,                      ///< VSIB memory (gathers)
    XMM0,                     ///< implicit
};
// clang-format on

enum FlagBits : u8 { kC = 1, kP = 2, kA = 4, kZ = 8, kS = 16, kO = 32, kD = 64, kAllFlags = 63 };

// clang-format off
enum Attr : u32 {
    kLockable = 1 << 0,     ///< LOCK allowed (with a memory destination); otherwise LOCK is #UD
    kNo64 = 1 << 1,         ///< #UD in 64-bit mode
    kOnly64 = 1 << 2,       ///< #UD outside it
    kDef64 = 1 << 3,        ///< operand size defaults to 8 in 64-bit mode (66 gives 2)
    kForce64 = 1 << 4,      ///< operand size is 8 in 64-bit mode whatever the prefixes (near branches)
    kCpl0 = 1 << 5,         ///< #GP(0) unless CPL 0
    kEndsBlock = 1 << 6,    ///< control transfer, or changes a mode: the block ends after it
    kOpcodeReg = 1 << 7,    ///< register in the opcode's low three bits
    kW0 = 1 << 8,           ///< VEX.W / REX.W must be 0 (in 64-bit mode)
    kW1 = 1 << 9,           ///< must be 1
    kL0 = 1 << 10,          ///< VEX.L must be 0
    kL1 = 1 << 11,          ///< must be 1
    kVvvvUnused = 1 << 12,  ///< VEX.vvvv must be 1111b
    kAligned = 1 << 13,     ///< legacy SSE memory operand of 16 bytes must be aligned (#GP), VEX not
    kAlignedVex = 1 << 14,  ///< aligned (16/32) under VEX too: VMOVAPS, VMOVDQA, VMOVNTxx
    kFpu = 1 << 15,         ///< x87: #NM with CR0.EM or TS, pending #MF checked
    kMmx = 1 << 16,         ///< MMX: #UD with EM, #NM with TS, pending #MF checked
    kSse = 1 << 17,         ///< SSE: #UD with EM or without CR4.OSFXSR, #NM with TS
    kAvx = 1 << 18,         ///< AVX: #UD without CR4.OSXSAVE and XCR0[2:1], #NM with TS
    kFpExcept = 1 << 19,    ///< can raise SIMD floating-point exceptions (#XM)
    kString = 1 << 20,      ///< string instruction: REP allowed
    kNoMf = 1 << 21,        ///< x87 control that does not check pending #MF (FNINIT, FNSTCW...)
    kNoReal = 1 << 22,      ///< #UD in real and virtual-8086 mode
    kReadOnlyDst = 1 << 23, ///< first operand is only read (CMP, TEST, BT, PUSH, ...)
    kWriteOnlyDst = 1 << 24,///< first operand is only written (MOV, SETcc, POP, ...)
    kNative = 1 << 25,      ///< user-mode form that can run on the host as is: the native oracle tests it
    kNoRep = 1 << 26,       ///< F2 and F3 are #UD though 66 keeps its meaning (NFx in the manuals)
};
// clang-format on

struct OpExt {
    enum Kind : u8 { kNone, kAny, kMem, kReg, kGroup, kGroupMem, kGroupReg, kFull } kind;
    u8 value;
};

struct OpInfo {
    std::string_view id;  ///< "ADD_Eb_Gb"
    std::string_view mnemonic;
    Map map;
    u8 opcode;
    Mandatory prefix;
    OpExt ext;
    Operand operands[4];
    u8 flags_read;
    u8 flags_written;
    Feature feature;
    u32 attrs;
};

enum class Op : u16 {
#define PV_OP(id, ...) id,
// clang-format off: the same order everywhere
#include "soft/optab_int.inc"
#include "soft/optab_x87.inc"
#include "soft/optab_simd.inc"
// clang-format on
#undef PV_OP
    kCount
};

inline constexpr unsigned kOpCount = static_cast<unsigned>(Op::kCount);

/// The row of an instruction.
const OpInfo& op_info(Op op);

/// Status flags that this very instruction reads (or may leave as they were) and writes: as in its
/// row, but exact where the row must allow for a count of zero that an immediate or a missing REP
/// prefix rules out. A flag that is written and not read is dead before the instruction.
u8 flags_read(const Insn& insn);
u8 flags_written(const Insn& insn);

/// Whether this operand code is, or may be, the memory operand given by ModRM or moffs.
bool is_memory_operand(Operand operand);

/// Bytes of a memory operand of this code; 0 when it depends on nothing but the instruction itself.
unsigned operand_size(Operand operand, const Insn& insn);

/// The memory access of the instruction's ModRM operand in bytes (0: none or none of its own).
unsigned memory_size(const Insn& insn);

}  // namespace polyvisor::soft
