// A decoded instruction, as the interpreter, the JIT and the tests see it.
#pragma once

#include <span>

#include "base/types.hpp"
#include "cpu/features.hpp"

namespace polyvisor::soft {

/// Index of a row of the instruction table (soft/optab.hpp): one enumerator per row, named by it.
enum class Op : u16;

enum class CodeSize : u8 { k16, k32, k64 };  ///< CS.L, CS.D: 64-bit mode, or default size

inline constexpr u8 kNoReg = 16;   ///< no base or index register
inline constexpr u8 kRipReg = 17;  ///< base: RIP of the next instruction

enum Prefix : u8 {
    kPrefixLock = 1,
    kPrefixRepne = 2,   ///< F2, whether or not it is mandatory for the row
    kPrefixRep = 4,     ///< F3
    kPrefixOpsize = 8,  ///< 66
    kPrefixAddrsize = 16,
    kPrefixSegment = 32,
    kPrefixRex = 64,
    kPrefixVex = 128,
};

// clang-format off
struct Insn {
    Op op{};
    u8 length = 0;      ///< bytes, 1..15
    u8 prefixes = 0;    ///< Prefix bits
    u8 opcode = 0;      ///< last opcode byte
    u8 opsize = 4;      ///< effective operand size in bytes: 2, 4 or 8 (byte forms say so by operand code)
    u8 addrsize = 8;    ///< effective address size in bytes: 2, 4 or 8
    u8 modrm = 0;
    u8 mod = 3;         ///< 3 when there is no ModRM
    u8 reg = 0;         ///< ModRM.reg with REX.R / VEX.R
    u8 rm = 0;          ///< ModRM.rm (or opcode low bits) with REX.B
    bool has_modrm = false;
    bool has_mem = false;  ///< a memory operand given by ModRM, or moffs
    u8 base = kNoReg;   ///< of the memory operand
    u8 index = kNoReg;
    u8 scale = 0;       ///< shift: 0..3
    u8 segment = 3;     ///< effective SegmentIndex of the memory operand (default applied)
    u8 vvvv = 0;        ///< VEX.vvvv, not inverted
    u8 vex_l = 0;
    bool rex_w = false; ///< REX.W or VEX.W
    s64 disp = 0;       ///< displacement, sign extended; moffs address
    u64 imm = 0;        ///< first immediate, sign extended where the operand code says so;
                        ///< relative branches: the displacement; far pointers: the offset
    u64 imm2 = 0;       ///< ENTER's level, far pointer's selector, EXTRQ/INSERTQ second; else 0

    bool operator==(const Insn&) const = default;
};
// clang-format on

enum class DecodeStatus : u8 {
    kOk,
    kTruncated,  ///< more bytes are needed than were given
    kUndefined,  ///< #UD
    kTooLong,    ///< more than 15 bytes: #GP(0)
};

/// Decodes one instruction. Rows whose feature is absent do not exist (an older row may then match,
/// as on real CPUs: LZCNT becomes BSR). Does not depend on CPL or control registers. On any status
/// but kOk, insn.length is the number of bytes looked at. Never reads beyond `bytes`.
DecodeStatus decode(std::span<const u8> bytes, CodeSize size, const FeatureSet& features,
                    Insn& insn);

}  // namespace polyvisor::soft
