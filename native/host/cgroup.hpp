// A cgroup of ours: one directory of the same name in each hierarchy that it needs, below
// CgroupTree's. What stands there outlives this process; open() finds it again.
//
// How a process gets in matters. To write somebody's process id, or "0" to cgroup.procs, makes the
// kernel wait for an RCU grace period (cgroup_threadgroup_rwsem), several milliseconds. Two ways do
// not: clone3(CLONE_INTO_CGROUP) for v2, and for v1 a single-threaded process that writes "0" to
// `tasks` itself. The launcher and its init do that.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "host/cgroup_limits.hpp"
#include "host/cgroup_tree.hpp"

namespace polyvisor::host {

/// Counted since the cgroup was made, except what is in use now. None: no controller that counts
/// it.
struct CgroupStats {
    std::optional<u64> memory;        // bytes in use, page cache too
    std::optional<u64> memory_peak;   // bytes
    std::optional<u64> memory_cache;  // bytes of `memory` that are page cache
    std::optional<u64> oom_kills;     // processes killed for want of memory
    std::optional<u64> cpu_us;        // microseconds of CPU time
    std::optional<u64> throttled_us;  // microseconds that it waited for its quota
    std::optional<u64> pids;          // processes and threads
    std::optional<u64> io_read;       // bytes from block devices
    std::optional<u64> io_written;    // bytes to block devices
};

class Cgroup {
  public:
    using Duration = std::chrono::nanoseconds;

    /// Makes it, with its limits. `complete`: in every hierarchy, so that any limit may be set
    /// later and everything is counted; otherwise only where `limits` need it, and in v2. Throws
    /// LimitUnavailable, ConfigError, and HostError (EEXIST: the name is taken).
    static Cgroup create(std::shared_ptr<CgroupTree> tree, const std::string& name,
                         const CgroupLimits& limits, bool complete);

    /// The one that stands there. Throws HostError (ENOENT).
    static Cgroup open(std::shared_ptr<CgroupTree> tree, const std::string& name);

    /// The names of all that stand there.
    static std::vector<std::string> names(CgroupTree& tree);

    Cgroup(Cgroup&&) = default;
    Cgroup& operator=(Cgroup&&) = default;

    const std::string& name() const { return name_; }

    /// O_PATH directories, v2 (if any) first; they stay this object's.
    std::vector<int> fds() const;

    /// The path in the v2 tree; "" if there is none.
    std::string unified() const;

    /// Sets all limits to `limits` while it runs. Throws as create() does.
    void change(const CgroupLimits& limits);

    CgroupStats stats() const;

    /// Every process in it and in cgroups below it, as ids of our own PID namespace.
    std::vector<pid_t> processes() const;

    /// Moves a running process, with its threads, into it: slow, see above.
    void attach(pid_t pid) const;

    /// Stops or continues everything in it; returns when it stands still or false when time is
    /// over.
    bool freeze(bool frozen, Duration timeout) const;

    /// Kills everything in it, frozen or not, however fast it forks. True when it is empty.
    bool kill(Duration timeout) const;

    /// Gives v2's and systemd's directory to a user, for a service manager in a container.
    void delegate(uid_t uid, gid_t gid) const;

    /// Removes it and what was made below it. Nothing happens if it is gone. Throws HostError
    /// (EBUSY) while there are processes.
    void remove();

  private:
    struct Part {
        Hierarchy* hierarchy;
        OwnedFd directory;
    };

    Cgroup(std::shared_ptr<CgroupTree> tree, std::string name)
        : tree_(std::move(tree)), name_(std::move(name)) {}
    const Part& add(Hierarchy& hierarchy);
    void apply(const CgroupLimits& limits, std::string_view controller, bool change);
    void write(const Part& part, const CgroupSetting& setting, std::string_view controller) const;
    const Part* with(std::string_view controller) const;
    const Part* counted_by() const;
    std::string path(const Part& part) const { return part.hierarchy->parent + "/" + name_; }

    std::shared_ptr<CgroupTree> tree_;
    std::string name_;
    std::vector<Part> parts_;  // v2 first
};

}  // namespace polyvisor::host
