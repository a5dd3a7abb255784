#include "host/init/root.hpp"

#include <linux/mount.h>
#include <linux/stat.h>

#include <initializer_list>

#include "host/init/mounts.hpp"
#include "host/init/paths.hpp"
#include "host/init/report.hpp"
#include "host/init/sys.hpp"

namespace polyvisor::host::init {

namespace {

constexpr u32 kMsRec = 0x4000, kMsPrivate = 1 << 18;
constexpr u16 kTypeMask = 0170000, kFolder = 0040000;  // S_IFMT, S_IFDIR
constexpr int kMntDetach = 2, kAtEmptyPath = 0x1000;

/// Whether it is a folder; fail() if it cannot be told.
bool is_folder(int fd, const char* path) {
    struct statx found;
    check(sys(__NR_statx, fd, "", kAtEmptyPath, STATX_TYPE, &found), "look at", path);
    return (found.stx_mode & kTypeMask) == kFolder;
}

/// A place for a mount beneath the root.
int place_for(int root, const char* target, bool folder) {
    return static_cast<int>(
        check(make_in_root(root, target, folder), "make the place of the mount", target));
}

void attach(int root, int mount, const char* target, bool folder) {
    const Fd place(place_for(root, target, folder));
    check(attach_mount(mount, place.get()), "mount", target);
    close_fd(mount);
}

int open_overlay(const Message& message) {
    const Wire& wire = message.wire();
    const Fd context(
        check(sys(kSysFsopen, "overlay", FSOPEN_CLOEXEC), "use the file system", "overlay"));
    const auto set = [&](const char* key, const char* value) {
        check(sys(kSysFsconfig, context.get(), FSCONFIG_SET_STRING, key, value, 0),
              "use as a layer of the root", value);
    };
    const auto* lower = message.list<WireText>(wire.lower);
    for (u64 i = 0; i < wire.lower.count; ++i) set("lowerdir+", message.text(lower[i]));
    set("upperdir", message.text(wire.upper));
    set("workdir", message.text(wire.work));
    if (wire.flags & kUserNamespace) {
        // trusted.* is the initial user namespace's.
        check(sys(kSysFsconfig, context.get(), FSCONFIG_SET_FLAG, "userxattr", nullptr, 0),
              "mount the overlay", "/");
    }
    check(sys(kSysFsconfig, context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0),
          "mount the overlay with", message.text(wire.upper));
    return static_cast<int>(
        check(sys(kSysFsmount, context.get(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NODEV),
              "mount the overlay", "/"));
}

int open_root(const Message& message) {
    const Wire& wire = message.wire();
    if (wire.lower.count > 0) return open_overlay(message);
    const char* path = message.text(wire.root);
    const bool of_host = path == nullptr;
    const int mount = static_cast<int>(
        check(copy_mount(kCwd, of_host ? "/" : path, true), "use as the root", path));
    if (of_host && (wire.flags & kReadOnlyRoot)) {
        // First of all: what is made for a mount must not be made on the host.
        check(add_attributes(mount, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, true),
              "make the root read-only", nullptr);
    }
    return mount;
}

void bind_device(int root, const char* name) {
    char host[32] = "/dev/";
    std::size_t length = 5;
    for (const char* at = name; *at != '\0'; ++at) host[length++] = *at;
    host[length] = '\0';
    attach(root, static_cast<int>(check(copy_mount(kCwd, host, false), "use the device", host)),
           host, false);
}

/// /dev as programs expect it, and nothing else: no disks, no memory, no other terminals.
void mount_dev(int root, const char* target) {
    const int dev =
        new_file_system("tmpfs", "dev", "mode=755,size=64k,nr_inodes=64",
                        MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOATIME, target);
    const Fd place(place_for(root, target, true));
    check(attach_mount(dev, place.get()), "mount", target);
    for (const char* name : {"null", "zero", "full", "random", "urandom", "tty"}) {
        bind_device(root, name);
    }
    struct Link {
        const char* content;
        const char* name;
    };
    for (auto [content, name] : {Link{"/proc/self/fd", "fd"}, Link{"/proc/self/fd/0", "stdin"},
                                 Link{"/proc/self/fd/1", "stdout"},
                                 Link{"/proc/self/fd/2", "stderr"}, Link{"pts/ptmx", "ptmx"}}) {
        check(sys(__NR_symlinkat, content, dev, name), "make a link in", target);
    }
    close_fd(dev);
    attach(root,
           new_file_system("devpts", "devpts", "newinstance,ptmxmode=0666,mode=620",
                           MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, "/dev/pts"),
           "/dev/pts", true);
    attach(root,
           new_file_system("tmpfs", "shm", "mode=1777",
                           MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC, "/dev/shm"),
           "/dev/shm", true);
}

void mount_one(const Message& message, const WireMount& wanted, int root) {
    const char* target = message.text(wanted.target);
    const char* source = message.text(wanted.source);
    switch (wanted.kind) {
        case MountKind::kDev:
            mount_dev(root, target);
            return;
        case MountKind::kFileSystem: {
            const char* type = message.text(wanted.type);
            attach(root,
                   new_file_system(type, source != nullptr ? source : type,
                                   message.text(wanted.options), wanted.attributes, target),
                   target, true);
            return;
        }
        case MountKind::kBind: {
            const int mount =
                static_cast<int>(check(copy_mount(kCwd, source, true), "bind", source));
            check(add_attributes(mount, wanted.attributes, true), "protect the mount on", target);
            attach(root, mount, target, is_folder(mount, source));
            return;
        }
    }
}

/// Hides a file behind /dev/null and a folder behind an empty one, `empty`, which is made when it
/// is first needed: -1 before. What is not there is left so.
void mask(int root, const char* path, int& empty) {
    const long found = open_in_root(root, path, O_PATH);
    if (found == -kEnoent || found == -kEnotdir) return;
    const Fd place(check(found, "mask", path));
    const bool folder = is_folder(place.get(), path);
    if (folder && empty < 0) {
        empty = new_file_system("tmpfs", "masked", "mode=555,size=4k,nr_inodes=2",
                                MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, path);
        check(attach_mount(empty, place.get()), "mask", path);
        return;
    }
    const Fd cover(
        check(folder ? copy_mount(empty, "", false) : copy_mount(kCwd, "/dev/null", false), "mask",
              path));
    check(attach_mount(cover.get(), place.get()), "mask", path);
}

void make_read_only(int root, const char* path) {
    const long found = open_in_root(root, path, O_PATH);
    if (found == -kEnoent || found == -kEnotdir) return;
    const Fd place(check(found, "make read-only", path));
    const int copy =
        static_cast<int>(check(copy_mount(place.get(), "", true), "make read-only", path));
    check(add_attributes(copy, MOUNT_ATTR_RDONLY, true), "make read-only", path);
    check(attach_mount(copy, place.get()), "make read-only", path);
    close_fd(copy);
}

}  // namespace

void enter_root(const Message& message, int root_mount) {
    const Wire& wire = message.wire();
    check(sys(__NR_mount, nullptr, "/", nullptr, kMsRec | kMsPrivate, nullptr),
          "separate the mounts from the host's", nullptr);
    const int root = root_mount >= 0 ? root_mount : open_root(message);
    // On top of the host's root, which is below it until pivot_root() turns the two around.
    check(sys(kSysMoveMount, root, "", kCwd, "/", MOVE_MOUNT_F_EMPTY_PATH), "mount the root at",
          "/");
    const auto* mounts = message.list<WireMount>(wire.mounts);
    for (u64 i = 0; i < wire.mounts.count; ++i) mount_one(message, mounts[i], root);
    const auto* read_only = message.list<WireText>(wire.read_only);
    for (u64 i = 0; i < wire.read_only.count; ++i) {
        make_read_only(root, message.text(read_only[i]));
    }
    const auto* masked = message.list<WireText>(wire.masked);
    int empty = -1;
    for (u64 i = 0; i < wire.masked.count; ++i) mask(root, message.text(masked[i]), empty);
    close_fd(empty);
    if (wire.flags & kReadOnlyRoot) {
        check(add_attributes(root, MOUNT_ATTR_RDONLY, false), "make the root read-only", nullptr);
    }
    check(sys(__NR_fchdir, root), "enter the root", nullptr);
    check(sys(__NR_pivot_root, ".", "."), "enter the root", nullptr);
    check(sys(__NR_umount2, ".", kMntDetach), "let go of the host's root", nullptr);
    check(sys(__NR_chdir, "/"), "enter the root", nullptr);
    close_fd(root);
}

}  // namespace polyvisor::host::init
