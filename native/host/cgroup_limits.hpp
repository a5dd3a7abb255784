// What a cgroup is held to, and which file of which controller says so: cgroup v1
// (Documentation/admin-guide/cgroup-v1) and v2 (Documentation/admin-guide/cgroup-v2.rst). Pure
// data, no system call.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::host {

/// Bytes a second that a block device may be read and written with; none: as many as it can.
struct IoRate {
    u32 major = 0;
    u32 minor = 0;
    std::optional<u64> read;
    std::optional<u64> write;
};

/// Devices that may be used. Numbers that are not given stand for any.
struct DeviceRule {
    char type = 'c';  // 'c' or 'b'
    std::optional<u32> major;
    std::optional<u32> minor;
    bool read = false;
    bool write = false;
    bool make = false;  // mknod()
};

/// What is not given is not limited. `field` of an error names one of these.
struct CgroupLimits {
    std::optional<u64> memory;      // bytes
    std::optional<u64> swap;        // bytes beside memory; with `memory` and without this: none
    std::optional<u64> cpu_quota;   // microseconds of CPU time that each period brings: the tokens
    u64 cpu_period = 100'000;       // microseconds
    u64 cpu_burst = 0;              // microseconds of unused quota that may be saved up: the bucket
    std::optional<u64> cpu_shares;  // 2 to 262144; 1024 is everybody's
    std::optional<u64> pids;        // processes and threads
    std::string cpuset;             // CPUs, as "0-1,3"
    std::vector<IoRate> io;
    std::optional<std::vector<DeviceRule>> devices;  // all others are refused
};

/// One value to be written.
struct CgroupSetting {
    const char* file;
    std::string value;
    const char* field;   // of CgroupLimits
    bool needed = true;  // false: a kernel without the file is just as well
};

/// Everything that can be limited here, by its name in cgroup v2; `devices` is none there (see
/// cgroup_devices.hpp), but all else is asked for alike.
inline constexpr const char* kControllers[] = {"memory", "cpu", "pids", "cpuset", "io", "devices"};

/// The controller's name in cgroup v1: "io" is "blkio" there.
std::string_view v1_name(std::string_view controller);

/// Whether `limits` ask for anything of `controller`.
bool limits_need(const CgroupLimits& limits, std::string_view controller);

/// What to write for `controller`, in that order. `change`: in a cgroup that may have limits
/// already, so that what is not limited has to be said as well.
std::vector<CgroupSetting> cgroup_settings(const CgroupLimits& limits, std::string_view controller,
                                           bool v2, bool change);

}  // namespace polyvisor::host
