#include "host/cgroup_limits.hpp"

#include <algorithm>

namespace polyvisor::host {

namespace {

using Settings = std::vector<CgroupSetting>;

std::string number_or(const std::optional<u64>& value, const char* unlimited) {
    return value ? std::to_string(*value) : unlimited;
}

// memory.memsw.* counts memory and swap together and may never be below memory.limit_in_bytes: so
// that it is opened wide before a change. A kernel that does not account swap has no such file.
Settings memory_v1(const CgroupLimits& limits, bool change) {
    Settings result;
    bool swap_needed = limits.swap.has_value();
    if (change) {
        result.push_back({"memory.memsw.limit_in_bytes", "-1", "swap", swap_needed});
    }
    if (limits.memory || change) {
        result.push_back({"memory.limit_in_bytes", number_or(limits.memory, "-1"), "memory"});
    }
    if (limits.memory) {
        std::string both = std::to_string(*limits.memory + limits.swap.value_or(0));
        result.push_back({"memory.memsw.limit_in_bytes", both, "swap", swap_needed});
    }
    return result;
}

Settings memory_v2(const CgroupLimits& limits, bool change) {
    Settings result;
    auto swap = limits.swap;
    if (limits.memory && !swap) swap = 0;
    if (swap || change) {
        result.push_back(
            {"memory.swap.max", number_or(swap, "max"), "swap", limits.swap.has_value()});
    }
    if (limits.memory || change) {
        result.push_back({"memory.max", number_or(limits.memory, "max"), "memory"});
    }
    return result;
}

// A burst may not exceed the quota, so that it goes first and comes last.
Settings cpu_v1(const CgroupLimits& limits, bool change) {
    Settings result;
    constexpr u64 kDefaultPeriod = 100'000;
    if (change) {
        result.push_back({"cpu.cfs_burst_us", "0", "cpu_burst", false});
        result.push_back({"cpu.cfs_quota_us", "-1", "cpus"});
    }
    if (limits.cpu_quota && (change || limits.cpu_period != kDefaultPeriod)) {
        result.push_back({"cpu.cfs_period_us", std::to_string(limits.cpu_period), "cpus"});
    }
    if (limits.cpu_quota) {
        result.push_back({"cpu.cfs_quota_us", std::to_string(*limits.cpu_quota), "cpus"});
    }
    if (limits.cpu_burst) {
        result.push_back({"cpu.cfs_burst_us", std::to_string(limits.cpu_burst), "cpu_burst"});
    }
    if (limits.cpu_shares || change) {
        result.push_back({"cpu.shares", number_or(limits.cpu_shares, "1024"), "cpu_shares"});
    }
    return result;
}

// Shares of 2 to 262144 are weights of 1 to 10000, as in the OCI runtime specification's
// conversion.
std::string weight(u64 shares) {
    return std::to_string(1 + (std::clamp<u64>(shares, 2, 262'144) - 2) * 9'999 / 262'142);
}

Settings cpu_v2(const CgroupLimits& limits, bool change) {
    Settings result;
    if (change) result.push_back({"cpu.max.burst", "0", "cpu_burst", false});
    if (limits.cpu_quota || change) {
        result.push_back(
            {"cpu.max",
             number_or(limits.cpu_quota, "max") + " " + std::to_string(limits.cpu_period), "cpus"});
    }
    if (limits.cpu_burst) {
        result.push_back({"cpu.max.burst", std::to_string(limits.cpu_burst), "cpu_burst"});
    }
    if (limits.cpu_shares || change) {
        std::string value = limits.cpu_shares ? weight(*limits.cpu_shares) : "100";
        result.push_back({"cpu.weight", value, "cpu_shares"});
    }
    return result;
}

Settings io(const CgroupLimits& limits, bool v2, bool change) {
    Settings result;
    for (const IoRate& rate : limits.io) {
        std::string device = std::to_string(rate.major) + ":" + std::to_string(rate.minor) + " ";
        if (v2) {
            std::string value = device + "rbps=" + number_or(rate.read, "max") +
                                " wbps=" + number_or(rate.write, "max");
            result.push_back({"io.max", value, rate.read ? "io_read" : "io_write"});
            continue;
        }
        if (rate.read || change) {  // 0 is no limit
            result.push_back(
                {"blkio.throttle.read_bps_device", device + number_or(rate.read, "0"), "io_read"});
        }
        if (rate.write || change) {
            result.push_back({"blkio.throttle.write_bps_device",
                              device + number_or(rate.write, "0"), "io_write"});
        }
    }
    return result;
}

std::string rule_text(const DeviceRule& rule) {
    std::string text(1, rule.type);
    text += " " + (rule.major ? std::to_string(*rule.major) : "*");
    text += ":" + (rule.minor ? std::to_string(*rule.minor) : "*") + " ";
    if (rule.read) text += 'r';
    if (rule.write) text += 'w';
    if (rule.make) text += 'm';
    return text;
}

Settings devices_v1(const CgroupLimits& limits, bool change) {
    if (!limits.devices) {
        if (change) return {{"devices.allow", "a", "devices"}};
        return {};
    }
    Settings result{{"devices.deny", "a", "devices"}};
    for (const DeviceRule& rule : *limits.devices) {
        result.push_back({"devices.allow", rule_text(rule), "devices"});
    }
    return result;
}

}  // namespace

std::string_view v1_name(std::string_view controller) {
    return controller == "io" ? "blkio" : controller;
}

bool limits_need(const CgroupLimits& limits, std::string_view controller) {
    if (controller == "memory") return limits.memory || limits.swap;
    if (controller == "cpu") return limits.cpu_quota || limits.cpu_burst || limits.cpu_shares;
    if (controller == "pids") return limits.pids.has_value();
    if (controller == "cpuset") return !limits.cpuset.empty();
    if (controller == "io") {
        return std::ranges::any_of(limits.io,
                                   [](const IoRate& rate) { return rate.read || rate.write; });
    }
    return controller == "devices" && limits.devices;
}

std::vector<CgroupSetting> cgroup_settings(const CgroupLimits& limits, std::string_view controller,
                                           bool v2, bool change) {
    if (controller == "memory") {
        return v2 ? memory_v2(limits, change) : memory_v1(limits, change);
    }
    if (controller == "cpu") return v2 ? cpu_v2(limits, change) : cpu_v1(limits, change);
    if (controller == "io") return io(limits, v2, change);
    if (controller == "pids" && (limits.pids || change)) {
        return {{"pids.max", number_or(limits.pids, "max"), "pids"}};
    }
    // In v1 an empty set is refused; CgroupTree lets a new cgroup begin with its parent's.
    if (controller == "cpuset" && (!limits.cpuset.empty() || (change && v2))) {
        return {{"cpuset.cpus", limits.cpuset, "cpuset"}};
    }
    if (controller == "devices" && !v2) return devices_v1(limits, change);
    return {};
}

}  // namespace polyvisor::host
