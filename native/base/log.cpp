#include "base/log.hpp"

#include <algorithm>

namespace polyvisor {

void Log::note(std::string_view topic, const std::string& line) {
    std::lock_guard lock(mutex_);
    auto at = std::find_if(counts_.begin(), counts_.end(),
                           [&](const Count& count) { return count.topic == topic; });
    if (at == counts_.end()) at = counts_.insert(at, Count{std::string(topic), 0});
    if (++at->count > limit_ || !sink_) return;
    sink_(std::string(topic) + ": " + line);
    if (at->count == limit_) sink_(std::string(topic) + ": more of these are only counted");
}

std::vector<Log::Count> Log::counts() const {
    std::lock_guard lock(mutex_);
    return counts_;
}

}  // namespace polyvisor
