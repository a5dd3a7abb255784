// What a cgroup has used, as v1 and v2 write it.
#include <charconv>

#include "host/cgroup.hpp"

namespace polyvisor::host {

namespace {

std::optional<u64> number(std::string_view text) {
    u64 value;
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc()) return std::nullopt;
    return value;
}

// The number in a file that holds nothing else.
std::optional<u64> single(int directory, const char* file) {
    std::string text;
    return read_at(directory, file, text) ? number(text) : std::nullopt;
}

// The number after `key` and `separator` in a file of such lines.
std::optional<u64> keyed(int directory, const char* file, const std::string& key) {
    std::string text;
    if (!read_at(directory, file, text)) return std::nullopt;
    text.insert(text.begin(), '\n');
    auto at = text.find("\n" + key + " ");
    if (at == std::string::npos) return std::nullopt;
    return number(std::string_view(text).substr(at + key.size() + 2));
}

// The sum over all devices of what follows `key`: v2 "8:0 rbytes=1 wbytes=2", v1 "8:0 Read 1".
std::optional<u64> summed(int directory, const char* file, const std::string& key) {
    std::string text;
    if (!read_at(directory, file, text)) return std::nullopt;
    u64 sum = 0;
    for (auto at = text.find(key); at != std::string::npos; at = text.find(key, at + 1)) {
        sum += number(std::string_view(text).substr(at + key.size())).value_or(0);
    }
    return sum;
}

}  // namespace

CgroupStats Cgroup::stats() const {
    CgroupStats result;
    auto at = [](const Part* part) { return part->directory.get(); };
    if (const Part* part = with("memory")) {
        bool v2 = part->hierarchy->v2;
        result.memory = single(at(part), v2 ? "memory.current" : "memory.usage_in_bytes");
        result.memory_peak = single(at(part), v2 ? "memory.peak" : "memory.max_usage_in_bytes");
        result.memory_cache = keyed(at(part), "memory.stat", v2 ? "file" : "total_cache");
        result.oom_kills = keyed(at(part), v2 ? "memory.events" : "memory.oom_control", "oom_kill");
    }
    if (const Part* part = with("pids")) result.pids = single(at(part), "pids.current");
    if (const Part* part = with("cpu")) {
        result.throttled_us = keyed(at(part), "cpu.stat", "throttled_usec");
        if (auto nanoseconds = keyed(at(part), "cpu.stat", "throttled_time")) {
            result.throttled_us = *nanoseconds / 1000;
        }
    }
    if (const Part* part = with("io")) {
        if (part->hierarchy->v2) {
            result.io_read = summed(at(part), "io.stat", " rbytes=");
            result.io_written = summed(at(part), "io.stat", " wbytes=");
        } else {
            const char* file = "blkio.throttle.io_service_bytes_recursive";
            result.io_read = summed(at(part), file, " Read ");
            result.io_written = summed(at(part), file, " Write ");
        }
    }
    // v2 counts CPU time in every cgroup, also in a hybrid host's tree without controllers.
    if (const Part* part = counted_by(); part && part->hierarchy->v2) {
        result.cpu_us = keyed(at(part), "cpu.stat", "usage_usec");
    } else if (const Part* account = with("cpuacct")) {
        if (auto nanoseconds = single(at(account), "cpuacct.usage")) {
            result.cpu_us = *nanoseconds / 1000;
        }
    }
    return result;
}

}  // namespace polyvisor::host
