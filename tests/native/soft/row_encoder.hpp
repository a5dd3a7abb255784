// From a row of the instruction table back to bytes: the inverse of the decoder, for tests.
#pragma once

#include "random.hpp"
#include "soft/optab.hpp"

namespace pvtest {

/// The choices that a row leaves open.
struct Form {
    polyvisor::soft::CodeSize size = polyvisor::soft::CodeSize::k64;
    bool memory = false;
    polyvisor::u8 reg =
        0;  ///< ModRM.reg with its extension; of group rows only the extension counts
    polyvisor::u8 rm = 0;    ///< register operand in ModRM.rm or the opcode
    polyvisor::u8 vvvv = 0;  ///< VEX
    bool w = false;
    bool l = false;
    bool opsize = false;  ///< a 66 prefix that is not mandatory
    bool addrsize = false;
    bool lock = false;
    polyvisor::u8 repeat = 0;   ///< 0, F2 or F3, not mandatory
    polyvisor::u8 segment = 0;  ///< 0 or the prefix byte
    bool spare_rex = false;     ///< a REX prefix (or the long VEX form) though nothing needs it

    // Memory operand. With base and index kNoReg an absolute disp32. kRipReg as in Insn.
    polyvisor::u8 base = polyvisor::soft::kNoReg;
    polyvisor::u8 index = polyvisor::soft::kNoReg;
    polyvisor::u8 scale = 0;
    polyvisor::u8 disp_size = 0;  ///< 0, 1 or 4; made larger where the encoding needs it
    polyvisor::s64 disp = 0;      ///< also the moffs address
};

struct Encoded {
    polyvisor::u8 bytes[40];
    unsigned opcode_end = 0;  ///< where immediates begin: the rest is random
    unsigned disp_at = 0;     ///< of a 4-byte displacement, or 0
    unsigned disp16_at = 0;   ///< of an absolute 16-bit address, or 0
};

/// Whether the row has a ModRM operand that can be memory, or a register.
bool can_be_memory(const polyvisor::soft::OpInfo& row);
bool can_be_register(const polyvisor::soft::OpInfo& row);

/// Fields of `form` that the row prescribes (W, L, vvvv unused) win over the form. In 16-bit code,
/// or with 16-bit addresses, the memory operand's registers are those of ModRM `rm`.
Encoded encode(const polyvisor::soft::OpInfo& row, const Form& form, Random& random);

/// Random choices, with registers 0..7 outside 64-bit mode.
Form random_form(const polyvisor::soft::OpInfo& row, polyvisor::soft::CodeSize size,
                 Random& random);

}  // namespace pvtest
