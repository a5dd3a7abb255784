#include "host/cgroup.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <set>

#include "base/error.hpp"
#include "host/cgroup_devices.hpp"

namespace polyvisor::host {

namespace {

OwnedFd open_below(int directory, const char* name) {
    return OwnedFd(::openat(directory, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
}

void check_name(const std::string& name) {
    auto fits = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '-' || c == '_';
    };
    if (name.empty() || name.size() > 64 || !std::ranges::all_of(name, fits)) {
        throw ConfigError("name", "A cgroup's name is of 1 to 64 letters, digits, - and _; \"" +
                                      name + "\" is not.");
    }
}

}  // namespace

const Cgroup::Part& Cgroup::add(Hierarchy& hierarchy) {
    for (const Part& part : parts_) {
        if (part.hierarchy == &hierarchy) return part;
    }
    int parent = hierarchy.directory.get();
    if (::mkdirat(parent, name_.c_str(), 0755) < 0) {
        throw_errno("The cgroup \"" + name_ + "\" cannot be made", hierarchy.parent + "/" + name_);
    }
    auto place = hierarchy.v2 ? parts_.begin() : parts_.end();
    OwnedFd fd = open_below(parent, name_.c_str());
    return *parts_.insert(place, {&hierarchy, std::move(fd)});
}

void Cgroup::write(const Part& part, const CgroupSetting& setting,
                   std::string_view controller) const {
    if (write_at(part.directory.get(), setting.file, setting.value)) return;
    int code = errno;
    std::string where = path(part) + "/" + setting.file;
    if (code == ENOENT) {
        if (!setting.needed) return;
        throw LimitUnavailable(std::string(controller),
                               "This host's kernel cannot limit \"" + std::string(setting.field) +
                                   "\": the controller \"" + std::string(controller) +
                                   "\" has no " + setting.file + ".");
    }
    if (code == EINVAL || code == ERANGE || code == ENODEV) {
        throw ConfigError(setting.field, "\"" + setting.value + "\" is no value of " + where +
                                             " on this host; give another limit for \"" +
                                             setting.field + "\".");
    }
    errno = code;
    throw_errno("\"" + setting.value + "\" cannot be written to " + where +
                    (code == EBUSY ? " while more than that is in use" : ""),
                where);
}

void Cgroup::apply(const CgroupLimits& limits, std::string_view controller, bool change) {
    const Part* part = with(controller);
    if (!part) {
        if (!limits_need(limits, controller)) return;
        throw LimitUnavailable(std::string(controller),
                               "The cgroup \"" + name_ + "\" was made without the controller \"" +
                                   std::string(controller) + "\"; make it complete.");
    }
    for (const CgroupSetting& setting :
         cgroup_settings(limits, controller, part->hierarchy->v2, change)) {
        write(*part, setting, controller);
    }
    if (controller == "devices" && part->hierarchy->v2 && (limits.devices || change)) {
        int code = attach_devices(part->directory.get(), limits.devices);
        if (code == 0) return;
        throw LimitUnavailable("devices",
                               "The kernel refuses the BPF program that would limit the "
                               "devices of the cgroup \"" +
                                   name_ + "\" (" + std::generic_category().message(code) +
                                   "); it takes CAP_BPF and CAP_NET_ADMIN, or root.");
    }
}

Cgroup Cgroup::create(std::shared_ptr<CgroupTree> tree, const std::string& name,
                      const CgroupLimits& limits, bool complete) {
    check_name(name);
    Cgroup result(tree, name);
    auto make = [&] {
        if (Hierarchy* unified = tree->unified()) result.add(*unified);
        for (const char* controller : kControllers) {
            if (limits_need(limits, controller)) result.add(tree->with(controller));
        }
        if (complete) {
            for (Hierarchy* hierarchy : tree->all()) result.add(*hierarchy);
        }
        if (result.parts_.empty()) {
            throw LimitUnavailable("cgroup",
                                   "There is no hierarchy of cgroups here that this user "
                                   "may write to.");
        }
    };
    try {
        try {
            make();
        } catch (const HostError& error) {
            if (error.code != ENOENT || !result.parts_.empty()) throw;
            tree->forget();  // somebody has removed our directory
            make();
        }
        for (const char* controller : kControllers) {
            if (limits_need(limits, controller)) result.apply(limits, controller, false);
        }
    } catch (...) {
        result.remove();
        throw;
    }
    return result;
}

Cgroup Cgroup::open(std::shared_ptr<CgroupTree> tree, const std::string& name) {
    check_name(name);
    Cgroup result(tree, name);
    for (Hierarchy* hierarchy : tree->present()) {
        OwnedFd fd = open_below(hierarchy->directory.get(), name.c_str());
        if (fd) result.parts_.push_back({hierarchy, std::move(fd)});
    }
    if (result.parts_.empty()) {
        throw HostError(ENOENT, name, "There is no cgroup \"" + name + "\"");
    }
    return result;
}

namespace {

std::vector<std::string> directories(int directory) {
    std::vector<std::string> result;
    OwnedFd fd(::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    DIR* listing = fd ? ::fdopendir(fd.get()) : nullptr;
    if (!listing) return result;
    fd.release();
    while (const dirent* entry = ::readdir(listing)) {
        if (entry->d_type == DT_DIR && entry->d_name[0] != '.') result.emplace_back(entry->d_name);
    }
    ::closedir(listing);
    return result;
}

// Numbers of a file of process ids, of this cgroup and all below it.
void collect(int directory, std::set<pid_t>& into) {
    std::string text;
    if (read_at(directory, "cgroup.procs", text)) {
        const char* at = text.c_str();
        while (*at) {
            char* end;
            long pid = std::strtol(at, &end, 10);
            if (pid > 0) into.insert(static_cast<pid_t>(pid));  // 0: not in our PID namespace
            at = *end ? end + 1 : end;
        }
    }
    for (const std::string& name : directories(directory)) {
        OwnedFd below = open_below(directory, name.c_str());
        if (below) collect(below.get(), into);
    }
}

// rmdir() of it and all below. A process that has just ended may still count for a moment; one that
// is still there is somebody's who has not killed it.
bool remove_tree(int parent, const char* name) {
    using Clock = std::chrono::steady_clock;
    auto start = Clock::now();
    for (useconds_t pause = 50;; pause = std::min<useconds_t>(pause * 2, 10'000)) {
        if (::unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT) return true;
        if (errno != EBUSY && errno != ENOTEMPTY) return false;
        std::set<pid_t> inside;
        if (OwnedFd directory = open_below(parent, name)) {
            for (const std::string& below : directories(directory.get())) {
                remove_tree(directory.get(), below.c_str());
            }
            collect(directory.get(), inside);
        }
        auto patience = std::chrono::milliseconds(inside.empty() ? 2000 : 100);
        if (Clock::now() - start >= patience) {
            errno = EBUSY;
            return false;
        }
        ::usleep(pause);
    }
}

}  // namespace

std::vector<std::string> Cgroup::names(CgroupTree& tree) {
    std::set<std::string> result;
    for (Hierarchy* hierarchy : tree.present()) {
        for (std::string& name : directories(hierarchy->directory.get())) result.insert(name);
    }
    return {result.begin(), result.end()};
}

std::vector<int> Cgroup::fds() const {
    std::vector<int> result;
    for (const Part& part : parts_) result.push_back(part.directory.get());
    return result;
}

std::string Cgroup::unified() const {
    return !parts_.empty() && parts_[0].hierarchy->v2 ? path(parts_[0]) : "";
}

const Cgroup::Part* Cgroup::with(std::string_view controller) const {
    for (const Part& part : parts_) {
        if (part.hierarchy->has(controller)) return &part;
    }
    if (controller == "devices" && !parts_.empty() && parts_[0].hierarchy->v2) return &parts_[0];
    return nullptr;
}

const Cgroup::Part* Cgroup::counted_by() const {
    for (const Part& part : parts_) {
        if (part.hierarchy->v2 || part.hierarchy->has("freezer")) return &part;
    }
    return parts_.empty() ? nullptr : &parts_[0];
}

void Cgroup::change(const CgroupLimits& limits) {
    for (const char* controller : kControllers) {  // before anything is changed
        if (limits_need(limits, controller) && !with(controller)) apply(limits, controller, true);
    }
    for (const char* controller : kControllers) apply(limits, controller, true);
}

std::vector<pid_t> Cgroup::processes() const {
    std::set<pid_t> result;
    if (const Part* part = counted_by()) collect(part->directory.get(), result);
    return {result.begin(), result.end()};
}

void Cgroup::attach(pid_t pid) const {
    for (const Part& part : parts_) {
        if (!write_at(part.directory.get(), "cgroup.procs", std::to_string(pid))) {
            throw_errno(
                "Process " + std::to_string(pid) + " cannot be moved to the cgroup " + path(part),
                path(part));
        }
    }
}

void Cgroup::delegate(uid_t uid, gid_t gid) const {
    for (const Part& part : parts_) {
        const auto& controllers = part.hierarchy->controllers;
        bool systemd = std::ranges::find(controllers, "name=systemd") != controllers.end();
        if (!part.hierarchy->v2 && !systemd) continue;
        // The limits themselves stay root's. cgroup-v2.rst, "Model of Delegation"
        for (const char* file :
             {"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks"}) {
            int done = ::fchownat(part.directory.get(), file, uid, gid, AT_EMPTY_PATH);
            if (done < 0 && errno != ENOENT) {
                throw_errno(
                    "The cgroup " + path(part) + " cannot be given to user " + std::to_string(uid),
                    path(part) + "/" + file);
            }
        }
    }
}

void Cgroup::remove() {
    for (Part& part : parts_) {
        if (!remove_tree(part.hierarchy->directory.get(), name_.c_str())) {
            throw_errno("The cgroup cannot be removed; kill what is in it first", path(part));
        }
    }
    parts_.clear();
}

}  // namespace polyvisor::host
