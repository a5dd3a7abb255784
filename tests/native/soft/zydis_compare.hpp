// Compares soft::decode() with Zydis on the same bytes.
#pragma once

#include <Zydis/Zydis.h>

#include <span>
#include <string>

#include "soft/optab.hpp"

namespace pvtest {

/// Every feature there is: a row must not hide behind a feature in decoder tests.
polyvisor::FeatureSet all_features();

class ZydisPeer {
  public:
    explicit ZydisPeer(polyvisor::soft::CodeSize size);

    /// Empty when both agree (or differ in a way that the table of known differences explains),
    /// else what differs: a short key that is the same for all instances of one disagreement.
    std::string compare(std::span<const polyvisor::u8> bytes);

    /// "48 01 d8: add rax, rbx", or the bytes alone when Zydis cannot decode them.
    std::string disassemble(std::span<const polyvisor::u8> bytes);

    unsigned long both_valid = 0, both_invalid = 0, excused = 0;

  private:
    polyvisor::soft::CodeSize size_;
    polyvisor::FeatureSet features_;
    ZydisDecoder decoder_;
    ZydisFormatter formatter_;
};

}  // namespace pvtest
