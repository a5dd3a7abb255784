// Users and groups of a new user namespace.
#pragma once

#include "host/launch.hpp"

namespace polyvisor::host {

/// Writes the maps of a process's user namespace: itself where this process may (as root, or its
/// own id alone), else with newuidmap and newgidmap, which know what /etc/subuid allows. Returns
/// whether groups can be set inside.
bool write_id_maps(int pid, const IdMap& uids, const IdMap& gids);

}  // namespace polyvisor::host
