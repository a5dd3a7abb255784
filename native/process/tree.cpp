#include "process/tree.hpp"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>

#include "base/error.hpp"
#include "process/descriptors.hpp"

namespace polyvisor::process {

namespace {

constexpr int kMostLinks = 40;

// Devices that are the same for everybody: memory's (1), of these numbers, by these names.
bool common_device(const std::string& path, int fd) {
    constexpr std::pair<const char*, unsigned> kDevices[] = {{"/dev/null", 3},
                                                             {"/dev/zero", 5},
                                                             {"/dev/full", 7},
                                                             {"/dev/random", 8},
                                                             {"/dev/urandom", 9}};
    struct stat about{};
    if (::fstat(fd, &about) != 0) return false;
    return std::any_of(std::begin(kDevices), std::end(kDevices), [&](const auto& device) {
        return path == device.first && about.st_rdev == makedev(1, device.second);
    });
}

void prepend(std::deque<std::string>& left, const std::string& path) {
    std::size_t end = path.size();
    while (end > 0) {
        const std::size_t slash = path.rfind('/', end - 1);
        const std::size_t start = slash == std::string::npos ? 0 : slash + 1;
        if (start < end) left.push_front(path.substr(start, end - start));
        if (slash == std::string::npos) break;
        end = slash;
    }
}

}  // namespace

Tree::Tree(const std::vector<Mount>& mounts) {
    for (const Mount& mount : mounts) roots_.push_back(open_root(mount));
    if (this->mount("/") == nullptr) {
        throw ConfigError("mounts", "a process needs a folder at /");
    }
}

Tree::Tree(const Tree& other, const std::vector<Mount>& mounts) : roots_(other.roots_) {
    for (const Mount& mount : mounts) {
        for (Root& root : roots_) {
            if (root.at == mount.at) root = open_root(mount);
        }
    }
}

Tree::Root Tree::open_root(const Mount& mount) {
    OwnedFd fd(::open(mount.host.c_str(), O_PATH | O_CLOEXEC));
    if (!fd) throw_errno("cannot give a process the files of " + mount.host, mount.host);
    return {mount.at, std::make_shared<OwnedFd>(std::move(fd)), mount.writable};
}

const Tree::Root* Tree::mount(const std::string& at) const {
    for (auto root = roots_.rbegin(); root != roots_.rend(); ++root) {
        if (root->at == at) return &*root;
    }
    return nullptr;
}

bool Tree::holds_mount(const std::string& path) const {
    return std::any_of(roots_.begin(), roots_.end(),
                       [&](const Root& root) { return root.at.starts_with(path + "/"); });
}

namespace {

struct Node {
    std::string path;
    std::shared_ptr<OwnedFd> fd;
    std::shared_ptr<const MadeFile> made;
    bool writable = false;
    std::string name;
    mode_t mode = S_IFDIR;
};

}  // namespace

int lead_to(const std::shared_ptr<OpenFile>& open, Tree::Place& place) {
    struct stat about{};
    if (s64 error = stat_file(*open, about); error != 0) return static_cast<int>(-error);
    place.file = std::shared_ptr<OwnedFd>(open, &open->fd);
    place.made = open->made;
    place.open = open;
    place.path = open->path;
    place.writable = open->writable;
    place.mode = about.st_mode;
    return 0;
}

namespace {

// Where a link leads: an errno.
int read_link(const Node& node, std::string& target) {
    char text[PATH_MAX];
    if (node.made) {
        target = node.made->open ? node.made->open->path : node.made->target;
    } else {
        const ssize_t size = ::readlinkat(node.fd->get(), "", text, sizeof text);
        if (size < 0) return errno;
        target.assign(text, static_cast<std::size_t>(size));
    }
    return target.empty() ? ENOENT : 0;
}

}  // namespace

int Tree::walk(const std::string& from, const std::string& path, Follow follow, Place& place,
               const MadeFiles* made) const {
    place = {};
    if (path.empty()) return ENOENT;
    if (path.size() >= PATH_MAX) return ENAMETOOLONG;
    const Root* top = mount("/");
    std::vector<Node> nodes{{"/", top->fd, nullptr, top->writable, "", S_IFDIR}};
    std::deque<std::string> left;
    prepend(left, path);
    if (path.front() != '/') prepend(left, from);
    place.folder_wanted = path.back() == '/';
    int links = 0;
    while (!left.empty()) {
        const std::string name = std::move(left.front());
        left.pop_front();
        if (!S_ISDIR(nodes.back().mode)) return ENOTDIR;
        place.last = name == "."    ? Place::Last::kDot
                     : name == ".." ? Place::Last::kDotDot
                                    : Place::Last::kName;
        if (name == ".") continue;
        if (name == "..") {
            if (nodes.size() > 1) nodes.pop_back();
            continue;
        }
        if (name.size() > NAME_MAX) return ENAMETOOLONG;
        const Node& parent = nodes.back();
        const bool last = left.empty();
        Node node;
        node.path = (parent.path == "/" ? "" : parent.path) + "/" + name;
        node.writable = parent.writable;
        node.name = name;
        if (made != nullptr) node.made = made->find(node.path);
        if (node.made) {
            node.mode = node.made->mode;
            node.writable = false;
        } else if (parent.made || (made != nullptr && made->covers(node.path))) {
            return ENOENT;
        } else if (const Root* here = mount(node.path)) {
            node.fd = here->fd;
            node.writable = here->writable;
            node.name.clear();
        } else {
            OwnedFd fd(::openat(parent.fd->get(), name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
            if (!fd) {
                if (errno != ENOENT || !last) return errno;
                place.parent = parent.fd;
                place.name = name;
                place.path = node.path;
                place.writable = node.writable;
                return 0;
            }
            node.fd = std::make_shared<OwnedFd>(std::move(fd));
        }
        if (node.fd) {
            struct stat about{};
            if (::fstat(node.fd->get(), &about) != 0) return errno;
            node.mode = about.st_mode;
        }
        if (S_ISLNK(node.mode) &&
            (!last || follow == kFollow || (place.folder_wanted && follow == kStay))) {
            if (++links > kMostLinks) return ELOOP;
            std::string target;
            if (node.made && node.made->open && last) {
                if (int error = lead_to(node.made->open, place)) return error;
                return place.folder_wanted && !S_ISDIR(place.mode) ? ENOTDIR : 0;
            }
            if (int error = read_link(node, target)) return error;
            if (target.front() == '/') nodes.resize(1);
            if (last && target.back() == '/') place.folder_wanted = true;
            prepend(left, target);
            continue;
        }
        nodes.push_back(std::move(node));
    }
    const Node& end = nodes.back();
    if (place.folder_wanted && !S_ISDIR(end.mode) && follow != kEntry) return ENOTDIR;
    place.parent = nodes.size() > 1 ? nodes[nodes.size() - 2].fd : nullptr;
    place.name = end.name;
    place.file = end.fd;
    place.made = end.made;
    place.path = end.path;
    place.writable = end.writable;
    place.mode = end.mode;
    return 0;
}

int Tree::open(const Place& place, int flags, mode_t mode) const {
    constexpr int kKept = O_ACCMODE | O_APPEND | O_TRUNC | O_DIRECTORY | O_NONBLOCK | O_SYNC |
                          O_DSYNC | O_PATH | O_NOATIME;
    const bool writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);
    if (!place.exists()) {
        if (!(flags & O_CREAT)) return -ENOENT;
        if (!place.writable) return -EROFS;
        if (place.folder_wanted) return -EISDIR;
        const int fd =
            ::openat(place.parent->get(), place.name.c_str(),
                     (flags & kKept & ~O_DIRECTORY) | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                     mode & 0777);
        if (fd < 0) return -errno;
        ::fchmod(fd, mode & 0777);  // the monitor has an umask of its own
        return fd;
    }
    if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL)) return -EEXIST;
    if (S_ISLNK(place.mode) && !(flags & O_PATH)) return -ELOOP;
    if (!place.file) return -EACCES;
    if (flags & O_PATH) {
        // It is what a name leads to, and nothing is done with it.
    } else if (S_ISDIR(place.mode)) {
        if (writes || (flags & O_CREAT)) return -EISDIR;
    } else if (S_ISCHR(place.mode) && common_device(place.path, place.file->get())) {
        // Anybody may write to these.
    } else if (S_ISFIFO(place.mode) && place.open) {
        flags |= O_NONBLOCK;  // a pipe of its own
    } else if (S_ISFIFO(place.mode) && place.writable) {
        flags |= O_NONBLOCK;
    } else if (!S_ISREG(place.mode)) {
        return S_ISSOCK(place.mode) ? -ENXIO : -EACCES;
    } else if (writes && !place.writable) {
        return -EROFS;
    }
    if ((flags & O_PATH) && place.file) {
        const int fd = ::fcntl(place.file->get(), F_DUPFD_CLOEXEC, 0);
        return fd < 0 ? -errno : fd;
    }
    const std::string again = "/proc/self/fd/" + std::to_string(place.file->get());
    const int fd = ::open(again.c_str(), (flags & kKept) | O_CLOEXEC | O_NOCTTY);
    return fd < 0 ? -errno : fd;
}

}  // namespace polyvisor::process
