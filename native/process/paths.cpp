#include "process/paths.hpp"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>

#include "process/procfs.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

int load_path(Thread& thread, u64 address, std::string& path) {
    auto text = thread.string(address, PATH_MAX);
    if (text) {
        path = std::move(*text);
        return 0;
    }
    std::vector<u8> bytes(PATH_MAX);
    return thread.space().copy_in(address, bytes) ? ENAMETOOLONG : EFAULT;
}

int locate(Thread& thread, s32 folder, const std::string& path, Tree::Follow follow,
           Tree::Place& place) {
    const Procfs made(thread);
    const Tree& tree = thread.kernel().tree();
    if (path.empty()) return ENOENT;
    if (path.front() == '/') return tree.walk("/", path, follow, place, &made);
    if (folder == AT_FDCWD) {
        return tree.walk(thread.process().directory, path, follow, place, &made);
    }
    const auto file = file_of(thread, static_cast<u32>(folder));
    struct stat about{};
    if (!file) return EBADF;
    if (file->path.empty() || file->path.front() != '/') return ENOTDIR;
    if (s64 error = stat_file(*file, about); error != 0) return static_cast<int>(-error);
    if (!S_ISDIR(about.st_mode)) return ENOTDIR;
    return tree.walk(file->path, path, follow, place, &made);
}

int locate(Thread& thread, u64 folder, u64 address, Tree::Follow follow, Tree::Place& place) {
    std::string path;
    if (int error = load_path(thread, address, path)) return error;
    return locate(thread, static_cast<s32>(folder), path, follow, place);
}

int locate_or_open(Thread& thread, u64 folder, u64 address, u64 flags, Tree::Place& place) {
    std::string path;
    if (int error = load_path(thread, address, path)) return error;
    const auto follow = flags & AT_SYMLINK_NOFOLLOW ? Tree::kStay : Tree::kFollow;
    if (!path.empty() || !(flags & AT_EMPTY_PATH)) {
        if (int error = locate(thread, static_cast<s32>(folder), path, follow, place)) return error;
        return place.exists() ? 0 : ENOENT;
    }
    if (static_cast<s32>(folder) == AT_FDCWD) {
        return locate(thread, AT_FDCWD, ".", follow, place);
    }
    const auto file = file_of(thread, static_cast<u32>(folder));
    if (!file) return EBADF;
    return lead_to(file, place);
}

// Without what would make a file of the host run as its owner.
s64 change_mode(int fd, mode_t mode) {
    const std::string again = "/proc/self/fd/" + std::to_string(fd);
    return result(::fchmodat(AT_FDCWD, again.c_str(), mode & 01777, 0));
}

}  // namespace polyvisor::process
