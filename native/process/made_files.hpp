// Files of the program's tree that no folder of the host has: they are made when they are asked
// for, as those below /proc are.
#pragma once

#include <sys/stat.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::process {

struct OpenFile;

/// One of them, as it is now. `mode` says what it is:
struct MadeFile {
    mode_t mode = 0;
    std::function<std::string()> text{};  ///< S_IFREG: its content
    std::string target{};                 ///< S_IFLNK: where it leads
    std::shared_ptr<OpenFile> open{};     ///< S_IFLNK: it leads to this, whatever `target` says
    /// S_IFDIR: names, and what they are (DT_*).
    struct Entry {
        std::string name;
        u8 type;
    };
    std::function<std::vector<Entry>()> entries{};
};

class MadeFiles {
  public:
    virtual ~MadeFiles() = default;
    /// What is there at an absolute path without links and dots; nullptr: the host's counts.
    virtual std::shared_ptr<const MadeFile> find(const std::string& path) const = 0;
    /// Nothing of the host is below this path.
    virtual bool covers(const std::string& path) const = 0;
};

/// As stat() has it.
struct stat stat_made(const MadeFile& file, const std::string& path);
/// Of a path: the same whenever it is asked for.
u64 made_inode(const std::string& path);

}  // namespace polyvisor::process
