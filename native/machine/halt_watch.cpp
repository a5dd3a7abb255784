#include "machine/halt_watch.hpp"

#include <algorithm>

namespace polyvisor {

HaltWatch::HaltWatch(Clock& clock, RunControl& control,
                     const std::vector<std::unique_ptr<VcpuThread>>& threads)
    : clock_(clock), control_(control), threads_(threads), timer_(clock, [this] { look(); }) {}

void HaltWatch::start() {
    timer_.arm(clock_.now() + kFirst);
}

void HaltWatch::look() {
    u64 now = 0;
    for (const auto& thread : threads_) now += thread->cpu_time();
    bool moved = now != last_;
    last_ = now;
    if (asked_) {
        // What was used since is the answer to the question.
        asked_ = false;
    } else if (!moved) {
        asked_ = true;
        control_.ask_dormant();
    }
    period_ = std::min(period_ * 2, kLongest);
    timer_.arm(clock_.now() + period_);
}

}  // namespace polyvisor
