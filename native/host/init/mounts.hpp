// The kernel's mount API of 5.2 and later: mounts are made detached and put where a descriptor
// says, so that no path is resolved twice.
#pragma once

#include "base/types.hpp"

namespace polyvisor::host::init {

/// A detached mount of a new file system. `options` are separated by commas, as mount(8) takes
/// them. fail() with `target` if the kernel refuses.
int new_file_system(const char* type, const char* source, const char* options, u32 attributes,
                    const char* target);

/// A detached copy of what is mounted at `path` from `directory`, with the mounts below it if
/// `recursive`; a negative errno.
long copy_mount(int directory, const char* path, bool recursive);

/// Adds MOUNT_ATTR_ bits to a mount, and to those below it if `recursive`; a negative errno.
long add_attributes(int mount, u32 attributes, bool recursive);

/// Puts a detached mount on what `place` (O_PATH) is; a negative errno.
long attach_mount(int mount, int place);

}  // namespace polyvisor::host::init
