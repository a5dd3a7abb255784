// Pages of files that a program has mapped to write to, and that are no more because the file was
// shortened meanwhile.
//
// Who touches one gets a SIGBUS. That is the program's, unless it is the monitor that does it: an
// engine that touches the guest's memory itself would end the host's process. So there is a handler
// for that signal, for as long as the process lives: within ranges that are watched the rest of the
// mapping becomes zeroes, and the one who watches is told; for all others it is as if there were no
// handler of ours. Somebody else's that comes later takes its place until the next range is
// watched.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::process {

/// The ranges of one arena, which stand still or are added to by one thread at a time.
class LostPages {
  public:
    using Range = std::pair<u8*, u8*>;  ///< whole pages: where it begins and ends

    LostPages() = default;
    ~LostPages() { (void)watch({}); }
    LostPages(const LostPages&) = delete;

    /// These from now on, and none that were watched before but them. False: there is no room for
    /// so many, and all is as it was.
    bool watch(std::span<const Range> ranges);
    /// Whether pages were lost since this was asked last.
    bool take();

  private:
    std::vector<std::size_t> slots_;
};

}  // namespace polyvisor::process
