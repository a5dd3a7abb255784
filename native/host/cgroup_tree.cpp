#include "host/cgroup_tree.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <sstream>

#include "base/error.hpp"
#include "host/cgroup_limits.hpp"

namespace polyvisor::host {

namespace {

std::vector<std::string> split(const std::string& text, char by) {
    std::vector<std::string> result;
    std::istringstream stream(text);
    for (std::string word; std::getline(stream, word, by);) {
        if (!word.empty()) result.push_back(word);
    }
    return result;
}

// mountinfo writes blanks of paths as octal escapes. proc(5)
std::string unescape(const std::string& text) {
    std::string result;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '\\' && i + 3 < text.size()) {
            result += static_cast<char>(std::stoi(text.substr(i + 1, 3), nullptr, 8));
            i += 3;
        } else {
            result += text[i];
        }
    }
    return result;
}

// A v1 hierarchy is known by its first controller, or by "name=systemd".
using Options = std::vector<std::string>;

std::map<std::string, std::string> own_cgroups(const std::string& text) {
    std::map<std::string, std::string> result;
    for (const std::string& line : split(text, '\n')) {  // 4:cpu,cpuacct:/user.slice
        auto first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string path = line.substr(second + 1);
        std::string names = line.substr(first + 1, second - first - 1);
        if (names.empty()) result[""] = path;
        for (const std::string& name : split(names, ',')) result[name] = path;
    }
    return result;
}

OwnedFd open_directory(const std::string& path) {
    return OwnedFd(::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
}

bool writable(const std::string& path) {
    return ::faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) == 0;
}

bool has_word(const std::string& text, std::string_view word) {
    auto words = split(text, ' ');
    return std::ranges::find(words, word) != words.end();
}

std::string trimmed(std::string text) {
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
}

// A v1 cpuset without CPUs and memory nodes takes no process; new ones are to begin with ours.
void fill_cpuset(int parent, int directory) {
    for (const char* file : {"cpuset.cpus", "cpuset.mems"}) {
        std::string value;
        if (read_at(directory, file, value) && trimmed(value).empty() &&
            read_at(parent, file, value)) {
            write_at(directory, file, trimmed(value));
        }
    }
    write_at(directory, "cgroup.clone_children", "1");
}

}  // namespace

bool read_at(int directory, const char* file, std::string& contents) {
    OwnedFd fd(::openat(directory, file, O_RDONLY | O_CLOEXEC));
    if (!fd) return false;
    contents.clear();
    char buffer[4096];
    for (;;) {
        ssize_t got = ::read(fd.get(), buffer, sizeof buffer);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got == 0;
        contents.append(buffer, static_cast<std::size_t>(got));
    }
}

bool write_at(int directory, const char* file, std::string_view value) {
    OwnedFd fd(::openat(directory, file, O_WRONLY | O_CLOEXEC));
    if (!fd) return false;
    ssize_t done;
    do {
        done = ::write(fd.get(), value.data(), value.size());
    } while (done < 0 && errno == EINTR);
    return done >= 0;
}

bool Hierarchy::has(std::string_view controller) const {
    std::string_view name = v2 ? controller : v1_name(controller);
    return std::ranges::find(controllers, name) != controllers.end();
}

std::deque<Hierarchy> find_hierarchies(const std::string& mountinfo, const std::string& own) {
    auto cgroups = own_cgroups(own);
    std::deque<Hierarchy> result;
    for (const std::string& line : split(mountinfo, '\n')) {
        // 31 23 0:26 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu,cpuacct
        auto dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        auto before = split(line.substr(0, dash), ' '), after = split(line.substr(dash + 3), ' ');
        if (before.size() < 5 || after.size() < 3) continue;
        Hierarchy found;
        found.v2 = after[0] == "cgroup2";
        if (!found.v2 && after[0] != "cgroup") continue;
        found.mount = unescape(before[4]);
        std::string key;
        if (!found.v2) {
            for (const std::string& option : split(after[2], ',')) {
                if (cgroups.contains(option)) found.controllers.push_back(option);
            }
            if (found.controllers.empty()) continue;
            key = found.controllers.front();
        }
        found.own = cgroups[key];
        // The mount shows the tree from some cgroup on; ours is told from the root.
        std::string root = unescape(before[3]);
        if (root != "/" && found.own.starts_with(root)) found.own.erase(0, root.size());
        bool twice = std::ranges::any_of(result, [&](const Hierarchy& other) {
            return other.v2 == found.v2 && other.controllers == found.controllers;
        });
        if (twice) continue;
        if (found.v2) {
            result.push_front(std::move(found));
        } else {
            result.push_back(std::move(found));
        }
    }
    return result;
}

CgroupTree::CgroupTree(std::string name) : name_(std::move(name)) {
    std::string mountinfo, own;
    for (auto [file, text] : {std::pair{"mountinfo", &mountinfo}, {"cgroup", &own}}) {
        OwnedFd self = open_directory("/proc/self");
        if (!self || !read_at(self.get(), file, *text)) {
            throw_errno(std::string("/proc/self/") + file + " tells where cgroups are",
                        std::string("/proc/self/") + file);
        }
    }
    hierarchies_ = find_hierarchies(mountinfo, own);
}

CgroupTree::CgroupTree(std::string name, std::deque<Hierarchy> hierarchies)
    : name_(std::move(name)), hierarchies_(std::move(hierarchies)) {}

std::string CgroupTree::top(const Hierarchy& hierarchy) const {
    std::string path = hierarchy.mount;
    if (writable(path)) return path;
    for (const std::string& part : split(hierarchy.own, '/')) {
        path += "/" + part;
        if (writable(path) && writable(path + "/cgroup.procs")) return path;
    }
    return {};
}

bool CgroupTree::prepare(Hierarchy& hierarchy) {
    if (hierarchy.directory) return true;
    if (!hierarchy.refused.empty()) return false;
    std::string path = top(hierarchy);
    if (path.empty()) {
        hierarchy.refused = "this user may not make cgroups below " + hierarchy.mount +
                            "; run as root, or in a cgroup of your own (systemd-run --user --scope "
                            "-p Delegate=yes)";
        return false;
    }
    hierarchy.parent = path + "/" + name_;
    OwnedFd above = open_directory(path);
    if (::mkdirat(above.get(), name_.c_str(), 0755) < 0 && errno != EEXIST) {
        hierarchy.refused = hierarchy.parent + " cannot be made: " + std::strerror(errno);
        return false;
    }
    hierarchy.directory = open_directory(hierarchy.parent);
    if (hierarchy.v2) {
        std::string text;
        if (read_at(above.get(), "cgroup.controllers", text)) {
            hierarchy.controllers = split(trimmed(text), ' ');
        }
    } else if (hierarchy.has("cpuset")) {
        fill_cpuset(above.get(), hierarchy.directory.get());
    }
    return static_cast<bool>(hierarchy.directory);
}

// v2 has a controller only where each directory above passes it on. A cgroup that does so may hold
// no processes of its own, the root excepted. cgroup-v2.rst, "No Internal Process Constraint"
bool CgroupTree::enable(Hierarchy& hierarchy, std::string_view controller, std::string& why) {
    if (!hierarchy.v2 || has_word(hierarchy.enabled, controller)) return true;
    std::string word = "+" + std::string(controller);
    std::string above = hierarchy.parent.substr(0, hierarchy.parent.rfind('/'));
    for (const std::string& path : {above, hierarchy.parent}) {
        OwnedFd directory = open_directory(path);
        std::string text;
        if (read_at(directory.get(), "cgroup.subtree_control", text) &&
            has_word(trimmed(text), controller)) {
            continue;
        }
        if (!write_at(directory.get(), "cgroup.subtree_control", word)) {
            why = path + " does not pass it on to cgroups below (" + std::strerror(errno) + ")";
            if (errno == EBUSY) why += ", because processes are in it: move them to one below";
            return false;
        }
    }
    hierarchy.enabled += " " + std::string(controller);
    return true;
}

Hierarchy& CgroupTree::with(std::string_view controller) {
    std::scoped_lock hold(lock_);
    std::string name(controller);
    std::string why =
        "no hierarchy of cgroups on this host has it; mount one, or start the kernel "
        "with it enabled";
    for (Hierarchy& hierarchy : hierarchies_) {
        // What v2 has is known when it was prepared; its BPF programs are at every cgroup.
        if (!hierarchy.v2 && !hierarchy.has(controller)) continue;
        if (!prepare(hierarchy)) {
            why = hierarchy.refused;
        } else if (hierarchy.has(controller) && enable(hierarchy, controller, why)) {
            return hierarchy;
        }
    }
    if (controller == "devices") {
        if (Hierarchy* tree = unified(); tree && tree->v2) return *tree;
    }
    throw LimitUnavailable(name, "The cgroup controller \"" + name + "\" cannot be had: " + why);
}

Hierarchy* CgroupTree::unified() {
    std::scoped_lock hold(lock_);
    for (Hierarchy& hierarchy : hierarchies_) {
        if ((hierarchy.v2 || hierarchy.has("freezer")) && prepare(hierarchy)) return &hierarchy;
    }
    return nullptr;
}

std::vector<Hierarchy*> CgroupTree::all() {
    std::scoped_lock hold(lock_);
    std::vector<Hierarchy*> result;
    std::string why;
    for (Hierarchy& hierarchy : hierarchies_) {
        if (!prepare(hierarchy)) continue;
        for (const char* controller : kControllers) {
            if (hierarchy.v2 && hierarchy.has(controller)) enable(hierarchy, controller, why);
        }
        result.push_back(&hierarchy);
    }
    return result;
}

std::vector<Hierarchy*> CgroupTree::present() {
    std::scoped_lock hold(lock_);
    std::vector<Hierarchy*> result;
    for (Hierarchy& hierarchy : hierarchies_) {
        if (!hierarchy.directory) {
            std::string path = top(hierarchy);
            if (path.empty() || ::access((path + "/" + name_).c_str(), F_OK) < 0) continue;
            if (!prepare(hierarchy)) continue;
        }
        result.push_back(&hierarchy);
    }
    return result;
}

void CgroupTree::forget() {
    std::scoped_lock hold(lock_);
    for (Hierarchy& hierarchy : hierarchies_) {
        hierarchy.directory.reset();
        hierarchy.enabled.clear();
    }
}

}  // namespace polyvisor::host
