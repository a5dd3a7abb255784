// Paths of the new root, whose every folder and symbolic link somebody hostile may have made: no
// path is resolved but beneath the root's descriptor, and what was resolved is used as a
// descriptor.
#pragma once

#include "base/types.hpp"

namespace polyvisor::host::init {

/// Opens `path` with `flags` as if `root` were "/": absolute links and ".." end there, and magic
/// links of /proc are refused (openat2(2), RESOLVE_IN_ROOT). A descriptor, or a negative errno.
long open_in_root(int root, const char* path, u64 flags);

/// Opens `path` (O_PATH), making it and the folders above it if they are missing: a folder, or an
/// empty file. A symbolic link that leads nowhere is refused (-ELOOP). Nothing is made of what a
/// path of 4096 bytes or more names (-ENAMETOOLONG).
long make_in_root(int root, const char* path, bool folder);

}  // namespace polyvisor::host::init
