#include "host/root_mount.hpp"

#include <linux/capability.h>
#include <linux/mount.h>

#include <cerrno>

#include "base/error.hpp"
#include "host/init/sys.hpp"

namespace polyvisor::host {

namespace {

constexpr int kEmptyPath = 0x1000;

OwnedFd need(long result, const std::string& what, const std::string& path) {
    if (result < 0) {
        errno = static_cast<int>(-result);
        throw_errno("cannot " + what + " " + path, path);
    }
    return OwnedFd(static_cast<int>(result));
}

OwnedFd idmapped(const std::string& path, int user_namespace) {
    OwnedFd mount = need(
        init::sys(init::kSysOpenTree, AT_FDCWD, path.c_str(), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC),
        "use as a root file system", path);
    mount_attr wanted{};
    wanted.attr_set = MOUNT_ATTR_IDMAP;
    wanted.userns_fd = static_cast<u64>(user_namespace);
    need(init::sys(init::kSysMountSetattr, mount.get(), "", kEmptyPath, &wanted, sizeof wanted),
         "shift the owners (an idmapped mount) of", path)
        .release();
    return mount;
}

u32 outside_of_root(const IdMap& map) {
    for (const IdRange& range : map) {
        if (range.inside == 0 && range.count > 0) return range.outside;
    }
    throw ConfigError("uid_map", "an idmapped overlay needs a map with user and group 0 in it");
}

/// This thread makes files as the namespace's root, with all of its capabilities. The overlay keeps
/// the credentials that it is mounted with; the host's root has no id on an idmapped mount.
class AsMappedRoot {
  public:
    explicit AsMappedRoot(const LaunchSpec& spec) {
        const u32 user = outside_of_root(spec.uid_map), group = outside_of_root(spec.gid_map);
        init::sys(__NR_capget, &header_, before_);
        group_ = init::sys(__NR_setfsgid, group);
        user_ = init::sys(__NR_setfsuid, user);
        // (Another user's files are made with fewer.)
        init::sys(__NR_capset, &header_, before_);
    }
    ~AsMappedRoot() {
        init::sys(__NR_setfsuid, user_);
        init::sys(__NR_setfsgid, group_);
        init::sys(__NR_capset, &header_, before_);
    }
    AsMappedRoot(const AsMappedRoot&) = delete;
    AsMappedRoot& operator=(const AsMappedRoot&) = delete;

  private:
    __user_cap_header_struct header_{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct before_[2] = {};
    long user_, group_;
};

std::pair<std::string, std::string> split(const std::string& path) {
    const std::size_t slash = path.find_last_of('/');
    return {path.substr(0, slash == 0 ? 1 : slash), path.substr(slash + 1)};
}

}  // namespace

OwnedFd make_idmapped_root(const LaunchSpec& spec, int user_namespace) {
    if (spec.lower.empty()) {
        return idmapped(spec.root, user_namespace);
    }
    const auto [folder, upper] = split(spec.upper);
    const auto [work_folder, work] = split(spec.work);
    if (folder != work_folder) {
        throw ConfigError("work",
                          "upper and work must be in the same folder, as overlayfs wants "
                          "them on one mount");
    }
    const OwnedFd writable = idmapped(folder, user_namespace);
    const OwnedFd context = need(init::sys(init::kSysFsopen, "overlay", FSOPEN_CLOEXEC),
                                 "use the file system", "overlay");
    const auto set = [&](const char* key, const OwnedFd& layer, const std::string& path) {
        need(init::sys(init::kSysFsconfig, context.get(), FSCONFIG_SET_FD, key, nullptr,
                       layer.get()),
             "use as a layer", path)
            .release();
    };
    // A detached mount is gone with its last descriptor.
    std::vector<OwnedFd> lower;
    for (const std::string& path : spec.lower) {
        lower.push_back(idmapped(path, user_namespace));
        set("lowerdir+", lower.back(), path);
    }
    const auto inside = [&](const std::string& name) {
        return need(init::sys(__NR_openat, writable.get(), name.c_str(),
                              O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC),
                    "open", folder + "/" + name);
    };
    set("upperdir", inside(upper), spec.upper);
    set("workdir", inside(work), spec.work);
    {
        const AsMappedRoot mapped(spec);
        need(init::sys(init::kSysFsconfig, context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0),
             "mount the overlay of", spec.upper)
            .release();
    }
    return need(init::sys(init::kSysFsmount, context.get(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NODEV),
                "mount the overlay of", spec.upper);
}

}  // namespace polyvisor::host
