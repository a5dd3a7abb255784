#pragma once

#include "base/types.hpp"

namespace polyvisor::host {

struct Born {
    int pid;
    int pidfd;
};

/// A child in new namespaces (CLONE_NEW* of `namespaces`) and, if `cgroup` is not negative, in that
/// cgroup of version 2. It executes the init program with `standard` as descriptors 0 to 2,
/// `control` as 3 and no others, all signals blocked, and all capabilities of a new user namespace.
///
/// None of this process's memory is copied (CLONE_VM | CLONE_VFORK), however large it is. It throws
/// HostError.
Born clone_init(u64 namespaces, int cgroup, const int (&standard)[3], int control);

}  // namespace polyvisor::host
