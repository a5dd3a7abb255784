// Devices of a cgroup in v2, which has no files for them: a BPF program decides about each open()
// and mknod(). cgroup-v2.rst, "Device controller"; bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE
#pragma once

#include <linux/bpf.h>

#include <optional>
#include <vector>

#include "host/cgroup_limits.hpp"

namespace polyvisor::host {

/// The program that lets pass what one of `rules` allows.
std::vector<bpf_insn> device_program(const std::vector<DeviceRule>& rules);

/// Puts the program for `rules` at the cgroup, then takes away those that were there; none: only
/// takes away. 0 or an errno.
int attach_devices(int cgroup, const std::optional<std::vector<DeviceRule>>& rules);

}  // namespace polyvisor::host
