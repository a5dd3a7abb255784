// A LaunchSpec as init reads it.
#pragma once

#include <vector>

#include "host/launch.hpp"

namespace polyvisor::host {

/// Throws ConfigError for what cannot be launched.
void validate(const LaunchSpec& spec, bool attached);

/// The bytes of a Wire. `flags` are those that do not follow from `spec`; `namespaces` and
/// `cgroups` as Wire has them.
std::vector<u8> encode(const LaunchSpec& spec, u32 flags, u64 namespaces, u32 cgroups);

}  // namespace polyvisor::host
