// Virtual memory as bytes: searched, read and written across pages, whatever physical memory they
// are in. Rights are not asked for: this is the view of a debugger.
#pragma once

#include <span>

#include "mmu/ranges.hpp"

namespace polyvisor {

struct FindOptions {
    u64 start = 0, last = ~u64{0};  ///< a match lies wholly between them
    u64 limit = 1000;               ///< matches
    u64 bytes = ~u64{0};            ///< to look at
    u64 budget = u64{1} << 28;      ///< entries of tables
};

struct FindResult {
    std::vector<u64> matches;  ///< addresses, ascending; matches may overlap
    bool complete = true;      ///< false: a limit was met, and `next` says where to go on
    u64 next = 0;
    u64 looked = 0;  ///< bytes
};

/// Where `pattern` (not empty) is in mapped memory, also across pages. Pages that have no memory
/// behind them (devices, or beyond an image) match nothing.
FindResult find_bytes(const AddressSpace& space, std::span<const u8> pattern,
                      const FindOptions& options = {});

/// Why a virtual range could not be copied.
struct CopyFault {
    enum Reason : u8 {
        kNone,
        kNotMapped,  ///< what AddressSpace::walk() says of `gva`
        kNoMemory,   ///< mapped, to `physical`, where there is no memory
        kReadOnly,   ///< memory that the host may not write either
    };
    Reason reason = kNone;
    u64 gva = 0;
    u64 physical = 0;
};

/// Whether all of it can be read; nothing is allocated, whatever the size.
CopyFault check_virtual(const AddressSpace& space, u64 gva, u64 size, bool write);
/// Copies all of it, or says what is in the way; write_virtual() then has written nothing.
CopyFault read_virtual(const AddressSpace& space, u64 gva, std::span<u8> into);
CopyFault write_virtual(const AddressSpace& space, u64 gva, std::span<const u8> from);

}  // namespace polyvisor
