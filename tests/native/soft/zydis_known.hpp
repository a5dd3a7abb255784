// Where soft::decode() and Zydis are meant to differ.
#pragma once

#include <Zydis/Zydis.h>

#include <string_view>

#include "soft/optab.hpp"

namespace pvtest {

struct Disagreement {
    polyvisor::soft::DecodeStatus status;  ///< ours
    const polyvisor::soft::Insn& insn;     ///< when status is kOk
    const ZydisDecodedInstruction* zydis;  ///< nullptr: Zydis rejects the bytes
    polyvisor::soft::CodeSize size;
    std::string_view what;  ///< "validity", "mnemonic", "register size of operand 2", ...
};

/// The reason why this difference is right; nullptr when there is none.
const char* known_difference(const Disagreement& d);

}  // namespace pvtest
