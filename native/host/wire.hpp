// What the launcher tells the init program (native/host/init) and what that answers, over a socket
// pair. Both are built together, so that there are no versions.
//
// A message to init is a Wire and what its offsets point at, all relative to its beginning; file
// descriptors come with its first bytes (SCM_RIGHTS), in the order of Wire::fds.
#pragma once

#include "base/types.hpp"

namespace polyvisor::host {

/// Offset of a string that ends with a zero byte; 0 for none.
using WireText = u64;

/// `count` entries at `offset`.
struct WireList {
    u64 offset;
    u64 count;
};

enum class MountKind : u32 { kFileSystem, kBind, kDev };

struct WireMount {
    MountKind kind;
    u32 attributes;  // MOUNT_ATTR_
    WireText type;   // of a file system
    WireText source;
    WireText target;
    WireText options;
};

struct WireRlimit {
    u64 resource;
    u64 soft;
    u64 hard;
};

enum class Filter : u32 { kNone, kDefault, kSystem };

enum WireFlags : u32 {
    kAttach = 1 << 0,         // into the namespaces of the process whose pidfd is Fds::target
    kInit = 1 << 1,           // stay as PID 1
    kDetached = 1 << 2,       // outlive the launcher
    kTerminal = 1 << 3,       // stdio is a terminal of the new /dev/pts
    kNoNewPrivs = 1 << 4,     //
    kReadOnlyRoot = 1 << 5,   //
    kSetGroups = 1 << 6,      // the groups may be set
    kHasRootMount = 1 << 7,   // the root is a mount that the launcher has made
    kUserNamespace = 1 << 8,  // all capabilities are those of a new user namespace
    kRaiseLoopback = 1 << 9,  // there is a new network namespace
};

struct Wire {
    u64 size;   // of the whole message
    u32 flags;  // WireFlags
    Filter filter;
    u64 namespaces;  // attach: to join; else: to make only now (cgroup)
    WireList argv;   // WireText, and one 0 more
    WireList env;    // the same
    WireList mounts;
    WireList masked;     // WireText
    WireList read_only;  // WireText
    WireList lower;      // WireText
    WireList rlimits;    // WireRlimit
    WireList groups;     // u32
    WireText root, upper, work, cwd, hostname;
    u32 uid, gid;
    u32 setup_uid, setup_gid;  // who does the set-up, in the user namespace
    u64 capabilities;
    u32 cgroups;  // the first so many descriptors after the root's or target's: their directories
    u32 reserved;
};

enum class ReportKind : u32 { kStarted, kFailed, kEnded, kTerminal };

/// What init sends. The receiver must not believe it: what runs in the namespaces may have sent it.
struct WireReport {
    ReportKind kind;
    s32 code;  // errno, or a wait status
    char what[64];
    char path[256];
};

/// Where init finds its end of the socket pair.
constexpr int kControlFd = 3;

}  // namespace polyvisor::host
