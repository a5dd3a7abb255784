// The headers of an ELF program or shared object for x86-64 (System V gABI, chapters 4 and 5), read
// and checked once.
#pragma once

#include <string>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::process {

struct Elf {
    struct Segment {
        u64 address = 0, memory = 0;  ///< of memory
        u64 offset = 0, file = 0;     ///< of the file
        u8 rights = 0;                ///< Right bits
    };
    u64 entry = 0;
    bool relocatable = false;  ///< ET_DYN: it may lie anywhere
    std::vector<Segment> segments;
    std::string interpreter;  ///< empty: none
    u64 headers = 0;          ///< address of the program headers; 0: not loaded
    u16 header_count = 0;
    bool executable_stack = false;

    u64 lowest() const { return segments.front().address & ~kPageMask; }
    u64 highest() const;
};

/// Reads the headers of `fd`: 0, or the errno that execve() has for such a file (ENOEXEC, EIO,
/// ...).
int read_elf(int fd, Elf& elf);

}  // namespace polyvisor::process
