// What a guest does wrong is worth a line, not a flood: log_limited() prints the first few of a
// kind and counts the rest. There is no global switch; a machine owns its Log.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/types.hpp"

namespace polyvisor {

class Log {
  public:
    using Sink = std::function<void(std::string_view line)>;

    /// `sink` gets each line (may be empty: lines are kept but not printed). At most `limit` lines
    /// of one topic are passed on.
    explicit Log(Sink sink = {}, u32 limit = 10) : sink_(std::move(sink)), limit_(limit) {}

    /// Notes one event of `topic` ("pci", "lapic", ...). Safe from any thread.
    void note(std::string_view topic, const std::string& line);

    struct Count {
        std::string topic;
        u64 count;
    };
    /// How often each topic was noted.
    std::vector<Count> counts() const;

  private:
    mutable std::mutex mutex_;  // a leaf: nothing else is locked under it
    Sink sink_;
    u32 limit_;
    std::vector<Count> counts_;
};

}  // namespace polyvisor
