#pragma once

#include "base/fd.hpp"
#include "host/launch.hpp"

namespace polyvisor::host {

/// The root of `spec` as a detached mount on which the ids on disk are those inside the user
/// namespace `user_namespace` (mount_setattr(2), MOUNT_ATTR_IDMAP), so that any number of them with
/// different maps can share their files. For root only.
OwnedFd make_idmapped_root(const LaunchSpec& spec, int user_namespace);

}  // namespace polyvisor::host
