// Making, moving and removing names of files.
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <set>

#include "process/paths.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

using Last = Tree::Place::Last;

// A name that is to be made in a folder that may be written to. What is no folder has no slash.
int locate_new(Thread& thread, u64 folder, u64 address, bool slash, Tree::Place& place) {
    if (int error = locate(thread, folder, address, Tree::kEntry, place)) return error;
    if (place.exists() || place.last != Last::kName) return EEXIST;
    if (place.folder_wanted && !slash) return ENOENT;
    if (!place.writable) return EROFS;
    return thread.kernel().take_writes(kNameBytes) ? 0 : EDQUOT;
}

// One that is there, and is to be taken away.
int check_entry(const Tree::Place& place) {
    if (!place.exists()) return ENOENT;
    if (place.folder_wanted && !S_ISDIR(place.mode)) return ENOTDIR;
    if (!place.writable) return EROFS;
    return !place.parent || place.name.empty() ? EBUSY : 0;  // a mount
}

// A folder has another path now (`to`), or (empty) none: those who are in it, or have it open, go
// with it, as they would if they knew it by more than its path.
void moved(Thread& thread, const std::string& from, const std::string& to, bool exchanged) {
    const auto follow = [&](std::string& path) {
        const auto lies_in = [&](const std::string& folder) {
            return path == folder || path.starts_with(folder + "/");
        };
        if (lies_in(from)) {
            path.replace(0, from.size(), to.empty() ? from + " (deleted)" : to);
        } else if (exchanged && lies_in(to)) {
            path.replace(0, to.size(), from);
        }
    };
    std::set<OpenFile*> files;  // each once, however many descriptors it has
    for (auto& [pid, process] : thread.kernel().processes()) {
        follow(process->directory);
        for (u64 number = 0; number < process->descriptors.size(); ++number) {
            auto* entry = process->descriptors.find(number);
            if (entry != nullptr) files.insert(entry->file.get());
        }
    }
    for (OpenFile* file : files) follow(file->path);
}

s64 make_folder(Thread& thread, u64 folder, u64 address, u64 mode) {
    Tree::Place place;
    if (int error = locate_new(thread, folder, address, true, place)) return -error;
    const mode_t wanted = static_cast<mode_t>(mode) & 01777 & ~thread.process().umask;
    if (::mkdirat(place.parent->get(), place.name.c_str(), wanted) != 0) return -errno;
    // The monitor has an umask of its own, which is not the program's.
    OwnedFd made(::openat(place.parent->get(), place.name.c_str(),
                          O_PATH | O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC));
    if (made) change_mode(made.get(), wanted);
    return 0;
}

s64 sys_mkdir(Thread& thread, const Arguments& a) {
    return make_folder(thread, static_cast<u64>(AT_FDCWD), a[0], a[1]);
}

s64 sys_mkdirat(Thread& thread, const Arguments& a) {
    return make_folder(thread, a[0], a[1], a[2]);
}

s64 remove_entry(Thread& thread, u64 folder, u64 address, u64 flags) {
    if (flags & ~u64{AT_REMOVEDIR}) return -EINVAL;
    const bool folders = flags & AT_REMOVEDIR;
    Tree::Place place;
    if (int error = locate(thread, folder, address, Tree::kEntry, place)) return -error;
    if (place.last != Last::kName) {
        return !folders                      ? -EISDIR
               : place.last == Last::kDot    ? -EINVAL
               : place.last == Last::kDotDot ? -ENOTEMPTY
                                             : -EBUSY;
    }
    if (!folders && S_ISDIR(place.mode) && place.exists()) return -EISDIR;
    if (int error = check_entry(place)) return -error;
    const s64 removed =
        result(::unlinkat(place.parent->get(), place.name.c_str(), static_cast<int>(flags)));
    if (folders && removed == 0) moved(thread, place.path, "", false);
    return removed;
}

s64 sys_unlink(Thread& thread, const Arguments& a) {
    return remove_entry(thread, static_cast<u64>(AT_FDCWD), a[0], 0);
}

s64 sys_rmdir(Thread& thread, const Arguments& a) {
    return remove_entry(thread, static_cast<u64>(AT_FDCWD), a[0], AT_REMOVEDIR);
}

s64 sys_unlinkat(Thread& thread, const Arguments& a) {
    return remove_entry(thread, a[0], a[1], a[2]);
}

s64 rename_entry(Thread& thread, u64 from_folder, u64 from, u64 to_folder, u64 to, u64 flags) {
    if (flags & ~u64{RENAME_NOREPLACE | RENAME_EXCHANGE}) return -EINVAL;
    if (flags == (RENAME_NOREPLACE | RENAME_EXCHANGE)) return -EINVAL;
    const bool exchange = flags & RENAME_EXCHANGE;
    Tree::Place source, target;
    if (int error = locate(thread, from_folder, from, Tree::kEntry, source)) return -error;
    if (int error = locate(thread, to_folder, to, Tree::kEntry, target)) return -error;
    if (source.last != Last::kName) return -EBUSY;
    if (target.last != Last::kName) return flags & RENAME_NOREPLACE ? -EEXIST : -EBUSY;
    if (!source.exists()) return -ENOENT;
    if ((flags & RENAME_NOREPLACE) && target.exists()) return -EEXIST;
    if (exchange && !target.exists()) return -ENOENT;
    if (int error = check_entry(source)) return -error;
    const bool folder = S_ISDIR(exchange ? target.mode : source.mode);
    if (target.folder_wanted && !folder) return -ENOTDIR;
    if (!target.writable) return -EROFS;
    if (!target.parent || target.name.empty()) return -EBUSY;
    // What is mounted below would stay, and what it hides come out.
    const Tree& tree = thread.kernel().tree();
    if (tree.holds_mount(source.path) || tree.holds_mount(target.path)) return -EBUSY;
    const s64 renamed = result(static_cast<int>(
        ::syscall(SYS_renameat2, source.parent->get(), source.name.c_str(), target.parent->get(),
                  target.name.c_str(), static_cast<unsigned>(flags))));
    if (renamed != 0 || source.path == target.path) return renamed;
    if (!exchange && S_ISDIR(target.mode)) moved(thread, target.path, "", false);
    if (folder || S_ISDIR(source.mode)) moved(thread, source.path, target.path, exchange);
    return renamed;
}

s64 sys_rename(Thread& thread, const Arguments& a) {
    constexpr u64 kHere = static_cast<u64>(AT_FDCWD);
    return rename_entry(thread, kHere, a[0], kHere, a[1], 0);
}

s64 sys_renameat(Thread& thread, const Arguments& a) {
    return rename_entry(thread, a[0], a[1], a[2], a[3], 0);
}

s64 sys_renameat2(Thread& thread, const Arguments& a) {
    return rename_entry(thread, a[0], a[1], a[2], a[3], a[4]);
}

s64 sys_symlinkat(Thread& thread, const Arguments& a) {
    std::string target;
    Tree::Place place;
    if (int error = load_path(thread, a[0], target)) return -error;
    if (target.empty()) return -ENOENT;
    if (int error = locate_new(thread, a[1], a[2], false, place)) return -error;
    return result(::symlinkat(target.c_str(), place.parent->get(), place.name.c_str()));
}

s64 sys_symlink(Thread& thread, const Arguments& a) {
    return sys_symlinkat(thread, {a[0], static_cast<u64>(AT_FDCWD), a[1]});
}

// A file of a mount that cannot be written to must not get a name where it can be.
s64 sys_linkat(Thread& thread, const Arguments& a) {
    if (a[4] & ~u64{AT_SYMLINK_FOLLOW}) return -EINVAL;
    Tree::Place source, target;
    const auto follow = a[4] & AT_SYMLINK_FOLLOW ? Tree::kFollow : Tree::kStay;
    if (int error = locate(thread, a[0], a[1], follow, source)) return -error;
    if (!source.exists()) return -ENOENT;
    if (int error = locate_new(thread, a[2], a[3], false, target)) return -error;
    if (S_ISDIR(source.mode)) return -EPERM;
    if (!source.writable || !source.parent || source.name.empty()) return -EXDEV;
    return result(::linkat(source.parent->get(), source.name.c_str(), target.parent->get(),
                           target.name.c_str(), 0));
}

s64 sys_link(Thread& thread, const Arguments& a) {
    constexpr u64 kHere = static_cast<u64>(AT_FDCWD);
    return sys_linkat(thread, {kHere, a[0], kHere, a[1]});
}

// Devices are nobody's to make.
s64 make_node(Thread& thread, u64 folder, u64 address, u64 mode) {
    const mode_t type = static_cast<mode_t>(mode) & S_IFMT;
    if (type == S_IFDIR) return -EPERM;
    Tree::Place place;
    if (int error = locate_new(thread, folder, address, false, place)) return -error;
    if (type != S_IFIFO && type != S_IFREG && type != 0) return -EPERM;
    const mode_t rights = static_cast<mode_t>(mode) & 0777 & ~thread.process().umask;
    if (type == S_IFIFO) {
        return result(::mknodat(place.parent->get(), place.name.c_str(), S_IFIFO | rights, 0));
    }
    const OwnedFd made(thread.kernel().tree().open(place, O_CREAT | O_EXCL | O_WRONLY, rights));
    return made ? 0 : made.get();
}

s64 sys_mknod(Thread& thread, const Arguments& a) {
    return make_node(thread, static_cast<u64>(AT_FDCWD), a[0], a[1]);
}

s64 sys_mknodat(Thread& thread, const Arguments& a) {
    return make_node(thread, a[0], a[1], a[2]);
}

constexpr Call kCalls[] = {
    {SYS_mkdir, sys_mkdir},         {SYS_mkdirat, sys_mkdirat},     {SYS_unlink, sys_unlink},
    {SYS_rmdir, sys_rmdir},         {SYS_unlinkat, sys_unlinkat},   {SYS_rename, sys_rename},
    {SYS_renameat, sys_renameat},   {SYS_renameat2, sys_renameat2}, {SYS_symlink, sys_symlink},
    {SYS_symlinkat, sys_symlinkat}, {SYS_link, sys_link},           {SYS_linkat, sys_linkat},
    {SYS_mknod, sys_mknod},         {SYS_mknodat, sys_mknodat},
};

}  // namespace

std::span<const Call> name_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
