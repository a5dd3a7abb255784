// The names of a program's functions and variables (System V gABI, chapter 4, "Symbol Table").
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::process {

class Symbols {
  public:
    /// Those of the ELF file `fd`: .symtab, or .dynsym where the file was stripped. None when it is
    /// not one that can be read.
    explicit Symbols(int fd);
    Symbols(Symbols&&) = default;  // (no copies: the keys lie in names_)

    /// As the file has it, to which its place in memory is to be added; of several, a global one.
    std::optional<u64> find(const std::string& name) const;

  private:
    struct Value {
        u64 address;
        bool local;
    };
    std::vector<char> names_;
    std::unordered_map<std::string_view, Value> values_;
};

}  // namespace polyvisor::process
