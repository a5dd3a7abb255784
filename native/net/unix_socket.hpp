// Unix sockets by their path.
#pragma once

#include <string>

#include "base/fd.hpp"

namespace polyvisor::net {

/// Bound to `path`; not blocking. A socket that nobody listens on any more is replaced. Throws
/// HostError (EADDRINUSE: somebody does), ConfigError (field "socket") for a path that is too long.
OwnedFd bind_unix(const std::string& path, int type);
/// Connected to `path`; not blocking. Throws as bind_unix().
OwnedFd connect_unix(const std::string& path, int type);

}  // namespace polyvisor::net
