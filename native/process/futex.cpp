#include "process/futex.hpp"

#include <cerrno>

#include "process/thread.hpp"

namespace polyvisor::process {

s64 Futexes::wait(Thread& thread, Key key, u32 bits,
                  std::optional<std::chrono::steady_clock::time_point> until) {
    Waiter waiter{&thread, key, bits};
    waiters_[key].push_back(&waiter);
    if (thread.block([&] { return waiter.woken; }, until)) return 0;
    auto queue = waiters_.find(waiter.key);  // which move() may have changed
    queue->second.remove(&waiter);
    if (queue->second.empty()) waiters_.erase(queue);
    return thread.interrupted() ? -EINTR : -ETIMEDOUT;
}

u32 Futexes::wake(Key key, u32 most, u32 bits) {
    auto queue = waiters_.find(key);
    if (queue == waiters_.end()) return 0;
    u32 count = 0;
    auto& waiting = queue->second;
    for (auto it = waiting.begin(); it != waiting.end() && count < most;) {
        Waiter& waiter = **it;
        if (!(waiter.bits & bits)) {
            ++it;
            continue;
        }
        it = waiting.erase(it);
        waiter.woken = true;
        waiter.thread->notify();
        ++count;
    }
    if (waiting.empty()) waiters_.erase(queue);
    return count;
}

u32 Futexes::move(Key from, Key to, u32 most) {
    auto queue = waiters_.find(from);
    if (queue == waiters_.end() || from == to) return 0;
    u32 count = 0;
    auto& target = waiters_[to];
    auto& waiting = queue->second;
    while (!waiting.empty() && count < most) {
        waiting.front()->key = to;
        target.push_back(waiting.front());
        waiting.pop_front();
        ++count;
    }
    if (waiting.empty()) waiters_.erase(from);
    if (target.empty()) waiters_.erase(to);
    return count;
}

}  // namespace polyvisor::process
