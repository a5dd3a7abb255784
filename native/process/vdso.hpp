// The shared object that every program finds mapped, and asks for the time: native/process/vdso.
#pragma once

#include <span>

#include "process/address_space.hpp"

namespace polyvisor::process {

/// The ELF file, which is also what lies in memory.
std::span<const u8> vdso_image();
/// Maps it for a program: AT_SYSINFO_EHDR, or -errno.
s64 map_vdso(AddressSpace& space);

}  // namespace polyvisor::process
