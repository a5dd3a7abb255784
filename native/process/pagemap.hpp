// Which pages of a private mapping are this process's own copies: what was written to since it was
// mapped, as the kernel knows it (Linux: admin-guide/mm/pagemap).
#pragma once

#include <vector>

#include "memory/guest_memory.hpp"

namespace polyvisor::process {

/// The request of ioctl() that asks (PAGEMAP_SCAN).
inline constexpr u32 kPagemapScan = 0xc060'6610;

/// Opens what private_pages() reads; later it is not tried again. Before a filter is put around
/// the thread.
void open_pagemap();

/// Appends the runs of such pages in base + [start, end), with offsets from `base`. The kernel may
/// refuse to say: then all of it is one.
void private_pages(const u8* base, u64 start, u64 end, std::vector<GuestMemory::Extent>& into);

}  // namespace polyvisor::process
