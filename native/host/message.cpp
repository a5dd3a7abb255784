#include "host/message.hpp"

#include <linux/mount.h>
#include <sched.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::host {

namespace {

class Encoder {
  public:
    Encoder() : bytes_(sizeof(Wire)) {}

    WireText text(const std::string& text) {
        if (text.empty()) return 0;
        const u64 offset = bytes_.size();
        bytes_.insert(bytes_.end(), text.begin(), text.end());
        bytes_.push_back(0);
        return offset;
    }
    template <class T>
    WireList list(const std::vector<T>& entries) {
        bytes_.resize(align_up(bytes_.size(), alignof(u64)));
        const WireList result{bytes_.size(), entries.size()};
        const auto* begin = reinterpret_cast<const u8*>(entries.data());
        bytes_.insert(bytes_.end(), begin, begin + entries.size() * sizeof(T));
        return result;
    }
    /// With the zero that ends argv and envp; an empty one of them is there, too.
    WireList texts(const std::vector<std::string>& texts) {
        std::vector<WireText> entries;
        for (const std::string& one : texts) {
            entries.push_back(bytes_.size());
            bytes_.insert(bytes_.end(), one.begin(), one.end());
            bytes_.push_back(0);
        }
        entries.push_back(0);
        WireList result = list(entries);
        result.count--;
        return result;
    }
    std::vector<u8> finish(Wire wire) {
        wire.size = bytes_.size();
        std::memcpy(bytes_.data(), &wire, sizeof wire);
        return std::move(bytes_);
    }

  private:
    std::vector<u8> bytes_;
};

u32 attributes(const Mount& mount) {
    u32 bits = 0;
    if (mount.read_only) bits |= MOUNT_ATTR_RDONLY;
    if (mount.nosuid) bits |= MOUNT_ATTR_NOSUID;
    if (mount.nodev) bits |= MOUNT_ATTR_NODEV;
    if (mount.noexec) bits |= MOUNT_ATTR_NOEXEC;
    return bits;
}

bool maps(const IdMap& map, u32 id) {
    return std::any_of(map.begin(), map.end(), [&](const IdRange& range) {
        return id >= range.inside && id - range.inside < range.count;
    });
}

[[noreturn]] void refuse(const char* field, const std::string& sentence) {
    throw ConfigError(field, sentence);
}

void no_zeros(const char* field, const std::vector<std::string>& texts) {
    for (const std::string& text : texts) {
        if (text.find('\0') != std::string::npos) {
            refuse(field, std::string(field) +
                              " has a string with a zero byte in it, which no "
                              "program can be given");
        }
    }
}

void absolute(const char* field, const std::string& path) {
    if (path.empty() || path[0] != '/' || path.find('\0') != std::string::npos) {
        refuse(field, "'" + path + "' in " + field + " must be an absolute path");
    }
}

void validate_root(const LaunchSpec& spec) {
    if (!spec.lower.empty() && (spec.upper.empty() || spec.work.empty())) {
        refuse("upper", "an overlay needs upper and work beside lower");
    }
    if (spec.lower.empty() && !spec.upper.empty())
        refuse("lower", "an overlay needs a lower folder");
    if (!spec.lower.empty() && !spec.root.empty()) {
        refuse("root", "root and lower exclude each other: one folder, or an overlay");
    }
    for (const std::string& path : spec.lower) absolute("lower", path);
    for (const std::string* path : {&spec.root, &spec.upper, &spec.work}) {
        if (!path->empty()) absolute("root", *path);
    }
    if (spec.root.empty() && spec.lower.empty() && !spec.read_only_root) {
        refuse("read_only_root", "the host's own root can only be given read-only");
    }
    for (const Mount& mount : spec.mounts) {
        absolute("mounts", mount.target);
        if (mount.type.empty()) refuse("mounts", "the mount on " + mount.target + " needs a type");
        if (mount.type == "bind") absolute("mounts", mount.source);
        if (mount.type == "dev" && mount.target != "/dev") {
            refuse("mounts", "a mount of type dev belongs on /dev, not on " + mount.target);
        }
    }
    for (const std::string& path : spec.masked) absolute("masked", path);
    for (const std::string& path : spec.read_only_paths) absolute("read_only_paths", path);
}

}  // namespace

void validate(const LaunchSpec& spec, bool attached) {
    no_zeros("argv", spec.argv);
    no_zeros("env", spec.env);
    absolute("cwd", spec.cwd);
    if (spec.argv.empty() && (attached || !spec.init)) refuse("argv", "argv names no program");
    if (!spec.argv.empty() && spec.argv[0].empty()) refuse("argv", "argv names no program");
    if (spec.capabilities >> 63 != 0) refuse("capabilities", "capabilities has an unknown bit");
    if (attached) return;
    validate_root(spec);
    if ((spec.namespaces & ~kAllNamespaces) != 0) {
        refuse("namespaces", "namespaces has bits that are no CLONE_NEW flags");
    }
    if ((spec.namespaces & CLONE_NEWPID) == 0 || (spec.namespaces & CLONE_NEWNS) == 0) {
        refuse("namespaces",
               "CLONE_NEWPID and CLONE_NEWNS are always needed: without them not all "
               "processes could be ended, nor a root be built");
    }
    if ((spec.namespaces & CLONE_NEWUSER) != 0) {
        if (!maps(spec.uid_map, spec.uid)) {
            refuse("uid_map", "user " + std::to_string(spec.uid) + " is in no range of uid_map");
        }
        if (!maps(spec.gid_map, spec.gid)) {
            refuse("gid_map", "group " + std::to_string(spec.gid) + " is in no range of gid_map");
        }
    } else if (!spec.uid_map.empty() || !spec.gid_map.empty() || spec.idmapped) {
        refuse("uid_map", "maps of ids need a user namespace (CLONE_NEWUSER)");
    }
}

std::vector<u8> encode(const LaunchSpec& spec, u32 flags, u64 namespaces, u32 cgroups) {
    Encoder encoder;
    Wire wire{};
    wire.flags = flags;
    const auto set = [&](bool wanted, WireFlags flag) { wire.flags |= wanted ? flag : 0u; };
    set(spec.init, kInit);
    set(spec.detached, kDetached);
    set(spec.terminal, kTerminal);
    set(spec.no_new_privs, kNoNewPrivs);
    set(spec.read_only_root, kReadOnlyRoot);
    wire.filter = spec.seccomp;
    wire.namespaces = namespaces;
    wire.argv = encoder.texts(spec.argv);
    wire.env = encoder.texts(spec.env);
    std::vector<WireMount> mounts;
    for (const Mount& mount : spec.mounts) {
        const MountKind kind = mount.type == "bind"  ? MountKind::kBind
                               : mount.type == "dev" ? MountKind::kDev
                                                     : MountKind::kFileSystem;
        mounts.push_back({kind, attributes(mount), encoder.text(mount.type),
                          encoder.text(mount.source), encoder.text(mount.target),
                          encoder.text(mount.options)});
    }
    wire.mounts = encoder.list(mounts);
    wire.masked = encoder.texts(spec.masked);
    wire.read_only = encoder.texts(spec.read_only_paths);
    wire.lower = encoder.texts(spec.lower);
    wire.rlimits = encoder.list(spec.rlimits);
    wire.groups = encoder.list(spec.groups);
    wire.root = encoder.text(spec.root);
    wire.upper = encoder.text(spec.upper);
    wire.work = encoder.text(spec.work);
    wire.cwd = encoder.text(spec.cwd);
    wire.hostname = encoder.text(spec.hostname);
    wire.uid = spec.uid;
    wire.gid = spec.gid;
    const bool user_namespace = (flags & kUserNamespace) != 0;
    wire.setup_uid = !user_namespace || maps(spec.uid_map, 0) ? 0 : spec.uid;
    wire.setup_gid = !user_namespace || maps(spec.gid_map, 0) ? 0 : spec.gid;
    wire.capabilities = spec.capabilities;
    wire.cgroups = cgroups;
    return encoder.finish(wire);
}

}  // namespace polyvisor::host
