// /proc, the few files of /sys that programs read, and the links of /dev, as one process sees them.
// Everything is about the process VM: nothing here is read from the host's.
#pragma once

#include "process/made_files.hpp"

namespace polyvisor::process {

class Kernel;
class Process;
class Thread;

class Procfs : public MadeFiles {
  public:
    /// As this thread sees it; with the lock, as long as that is held.
    explicit Procfs(Thread& thread) : thread_(thread) {}

    std::shared_ptr<const MadeFile> find(const std::string& path) const override;
    bool covers(const std::string& path) const override;

  private:
    std::shared_ptr<const MadeFile> find_in_process(const std::string& pid,
                                                    const std::string& rest) const;

    Thread& thread_;
};

/// What a link below /proc/self/fd says.
std::string describe(const OpenFile& file);

}  // namespace polyvisor::process
