// What the system calls that take names of files have in common.
#pragma once

#include "process/thread.hpp"

namespace polyvisor::process {

/// A path at an address of the program's: 0 or an errno.
int load_path(Thread& thread, u64 address, std::string& path);
/// Where (dirfd, path) of a program leads: 0 or an errno.
int locate(Thread& thread, s32 folder, const std::string& path, Tree::Follow follow,
           Tree::Place& place);
/// The same, for a path at an address of the program's.
int locate(Thread& thread, u64 folder, u64 address, Tree::Follow follow, Tree::Place& place);
/// What is there, for calls that take AT_EMPTY_PATH (the open file itself) and AT_SYMLINK_NOFOLLOW:
/// 0 or an errno.
int locate_or_open(Thread& thread, u64 folder, u64 address, u64 flags, Tree::Place& place);

/// As fchmod(), also for O_PATH: 0 or -errno.
s64 change_mode(int fd, mode_t mode);

}  // namespace polyvisor::process
