// The hierarchies of cgroups that the host has mounted (v2, v1, or both: "hybrid"), and the
// directory in each below which polyvisor's cgroups are made.
//
// Which directory: `<top>/polyvisor`, where <top> is the highest cgroup on the way from the mount's
// root down to the one we are in that this user may write to. That is the root for root, and what
// systemd has delegated to them (user@UID.service) for others. It is made when it is first needed,
// and stays.
#pragma once

#include <deque>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/fd.hpp"

namespace polyvisor::host {

/// One mounted hierarchy.
struct Hierarchy {
    bool v2 = false;
    std::string mount;                     // where it is mounted
    std::string own;                       // the cgroup in it that we are in, "/a/b"
    std::vector<std::string> controllers;  // of v1: its mount options; of v2: found by prepare()
    bool has(std::string_view controller) const;

    std::string parent;   // the directory of ours, once it was prepared
    OwnedFd directory;    // the same, O_PATH
    std::string enabled;  // v2: controllers that were passed on to the children, " memory cpu"
    std::string refused;  // why it cannot be used; "" if it can
};

/// Reads the texts of /proc/self/mountinfo and /proc/self/cgroup; v2 comes first. proc(5),
/// cgroups(7)
std::deque<Hierarchy> find_hierarchies(const std::string& mountinfo, const std::string& own);

class CgroupTree {
  public:
    /// `name` is that of our directory. Throws HostError if /proc cannot be read.
    explicit CgroupTree(std::string name = "polyvisor");
    CgroupTree(std::string name, std::deque<Hierarchy> hierarchies);

    /// The hierarchy that has `controller` (v2's name), ready for cgroups to be made in it with
    /// that controller. Throws LimitUnavailable.
    Hierarchy& with(std::string_view controller);

    /// The v2 tree if there is one that this user may write to, else the v1 freezer, else none:
    /// what all processes are found and killed by.
    Hierarchy* unified();

    /// Every hierarchy that can be used, ready; v2 with every controller that it can pass on. Those
    /// that cannot be are left out.
    std::vector<Hierarchy*> all();

    /// Those that have our directory already; nothing is made.
    std::vector<Hierarchy*> present();

    /// Forgets the directories, for when somebody else has removed them.
    void forget();

  private:
    bool prepare(Hierarchy& hierarchy);
    bool enable(Hierarchy& hierarchy, std::string_view controller, std::string& why);
    std::string top(const Hierarchy& hierarchy) const;

    std::string name_;
    std::deque<Hierarchy> hierarchies_;
    std::recursive_mutex lock_;
};

/// The contents of a file below an open directory; false if it cannot be read.
bool read_at(int directory, const char* file, std::string& contents);

/// Writes a value in one write(), as cgroup files want it; false with errno set.
bool write_at(int directory, const char* file, std::string_view value);

}  // namespace polyvisor::host
