// A program into an address space, as execve() does it: its segments, its interpreter's, and the
// stack that both find their arguments on (System V ABI for AMD64, 3.4.1).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "process/address_space.hpp"
#include "process/tree.hpp"

namespace polyvisor::process {

struct Start {
    u64 rip = 0, rsp = 0;
    std::string path;  ///< of the ELF file
    u64 base = 0;      ///< what its addresses are to be added to
};

struct LoadRequest {
    std::string program;    ///< a path of the tree
    std::string directory;  ///< where a relative one starts
    std::vector<std::string> arguments, environment;
    u64 hardware = 0;  ///< AT_HWCAP: CPUID leaf 1, EDX
    bool vdso = true;  ///< the time is no system call
    /// Of the addresses, and AT_RANDOM; nothing: the addresses are those of every program.
    std::optional<u64> seed{};
};

/// Whether load_program() would find a program there that it can load: 0, or an errno.
int check_program(const Tree& tree, const LoadRequest& request);
/// Fills an empty address space: 0, or an errno.
int load_program(const Tree& tree, AddressSpace& space, const LoadRequest& request, Start& start);

}  // namespace polyvisor::process
