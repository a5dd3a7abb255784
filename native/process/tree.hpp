// The files that a program can name: folders of the host at places of a tree, each read-only or
// not. A path is walked here, component by component, by descriptors: "..", symbolic links and
// mount points mean what they mean in the program's tree, and no name is ever resolved by the host
// across more than one component, so nothing that changes meanwhile leads out.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/types.hpp"
#include "process/made_files.hpp"

namespace polyvisor::process {

class Tree {
  public:
    struct Mount {
        std::string at;    ///< "/", "/usr": absolute, without "." and ".."
        std::string host;  ///< a folder or file of the host
        bool writable = false;
    };
    /// One of them is at "/". Throws HostError when a folder cannot be opened, ConfigError.
    explicit Tree(const std::vector<Mount>& mounts);
    /// The same as another, with these in the place of those that it has there.
    Tree(const Tree& other, const std::vector<Mount>& mounts);

    /// Where a path leads.
    struct Place {
        std::shared_ptr<OwnedFd> parent;       ///< O_PATH: the folder it is in
        std::string name;                      ///< its name there; empty for a mount's root
        std::shared_ptr<OwnedFd> file;         ///< O_PATH: itself; null when it is not the host's
        std::shared_ptr<const MadeFile> made;  ///< itself, when it is not the host's
        std::shared_ptr<OpenFile> open;        ///< itself, when a link of /proc led there
        std::string path;                      ///< in the program's tree
        bool writable = false;                 ///< its mount is
        mode_t mode = 0;                       ///< of the file
        bool folder_wanted = false;            ///< the path ended in a slash
        /// What the path ended in: only kName can be made, taken away or renamed.
        enum class Last : u8 { kName, kDot, kDotDot, kRoot } last = Last::kRoot;

        bool exists() const { return file || made; }
    };
    /// A link that a path ends in is followed, or only before a slash at the end, or never: then
    /// the slash is the caller's to judge, too.
    enum Follow : u8 { kStay, kFollow, kEntry };
    /// `from`: the folder that a relative path starts at, as a path of the tree. `made`: who has
    /// the files that are not the host's. 0 or an errno: a path whose last component is not there
    /// is no error.
    int walk(const std::string& from, const std::string& path, Follow follow, Place& place,
             const MadeFiles* made = nullptr) const;

    /// Opens what a place leads to, or makes it (O_CREAT): the descriptor or -errno. Devices and
    /// sockets of the host are not opened, nor FIFOs where the program may not write: -EACCES; the
    /// devices in its own /dev are.
    int open(const Place& place, int flags, mode_t mode) const;

    struct Root {
        std::string at;
        std::shared_ptr<OwnedFd> fd;
        bool writable;
    };
    const std::vector<Root>& roots() const { return roots_; }
    /// Something is mounted below this path.
    bool holds_mount(const std::string& path) const;

  private:
    static Root open_root(const Mount& mount);
    const Root* mount(const std::string& at) const;

    std::vector<Root> roots_;
};

/// The place of an open file, whatever its name is now: an errno.
int lead_to(const std::shared_ptr<OpenFile>& open, Tree::Place& place);

}  // namespace polyvisor::process
