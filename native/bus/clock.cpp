#include "bus/clock.hpp"

#include <time.h>

#include <cassert>

namespace polyvisor {

Clock::Clock(Mode mode) : mode_(mode) {
    if (mode == Mode::kFreeRunning) host_offset_ = host_now();
}

Clock::~Clock() {
    assert(queue_.empty() && "a Timer outlived its Clock");
}

u64 Clock::host_now() {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<u64>(now.tv_sec) * 1'000'000'000 + static_cast<u64>(now.tv_nsec);
}

Nanoseconds Clock::now() const {
    constexpr auto acquire = std::memory_order_acquire;
    if (mode_ == Mode::kDeterministic) return virtual_now_.load(acquire);
    for (;;) {
        u64 version = version_.load(acquire);
        Nanoseconds now = paused_.load(acquire) ? virtual_now_.load(acquire)
                                                : host_now() - host_offset_.load(acquire);
        if (PV_LIKELY((version & 1) == 0 && version_.load(std::memory_order_relaxed) == version)) {
            return now;
        }
    }
}

Nanoseconds Clock::time_of_tsc(u64 tsc) const {
    u128 time = (static_cast<u128>(tsc) * 1'000'000 + tsc_khz_ - 1) / tsc_khz_;
    return time >= bit(63) ? kNever : static_cast<u64>(time);
}

// The writer's half of now()'s sequence lock; mutex_ is held.
void Clock::shift(u64 offset, bool paused, Nanoseconds at) {
    u64 version = version_.load(std::memory_order_relaxed);
    version_.store(version + 1, std::memory_order_relaxed);
    host_offset_.store(offset, std::memory_order_release);
    virtual_now_.store(at, std::memory_order_release);
    paused_.store(paused, std::memory_order_release);
    version_.store(version + 2, std::memory_order_release);
}

void Clock::advance_to(Nanoseconds time) {
    if (mode_ != Mode::kDeterministic) return;
    std::lock_guard lock(mutex_);
    if (time > virtual_now_.load(std::memory_order_relaxed)) {
        virtual_now_.store(time, std::memory_order_release);
    }
}

void Clock::pause() {
    if (mode_ != Mode::kFreeRunning) return;
    std::lock_guard lock(mutex_);
    if (paused_) return;
    u64 offset = host_offset_;
    // Readers are held off before the time is read, so that none has seen a later one.
    version_.fetch_add(1, std::memory_order_seq_cst);
    u64 held = host_now() - offset;
    virtual_now_.store(held, std::memory_order_release);
    paused_.store(true, std::memory_order_release);
    version_.fetch_add(1, std::memory_order_release);
}

void Clock::resume() {
    if (mode_ != Mode::kFreeRunning) return;
    {
        std::lock_guard lock(mutex_);
        if (!paused_) return;
        u64 now = virtual_now_;
        shift(host_now() - now, false, now);
    }
    if (rearm_) rearm_();
}

bool Clock::paused() const {
    return paused_.load(std::memory_order_acquire);
}

void Clock::set(Nanoseconds time) {
    {
        std::lock_guard lock(mutex_);
        shift(mode_ == Mode::kFreeRunning ? host_now() - time : 0, paused_, time);
    }
    if (rearm_) rearm_();
}

Nanoseconds Clock::next_deadline() const {
    std::lock_guard lock(mutex_);
    return queue_.empty() ? kNever : queue_.begin()->first.first;
}

Nanoseconds Clock::run_expired() {
    Nanoseconds until = now();
    std::unique_lock lock(mutex_);
    if (running_) {
        // From inside a callback: the outer call goes on. From another thread: take turns.
        if (firing_thread_ == std::this_thread::get_id()) {
            return queue_.empty() ? kNever : queue_.begin()->first.first;
        }
        fired_.wait(lock, [&] { return !running_; });
    }
    running_ = true;
    firing_thread_ = std::this_thread::get_id();
    u64 end = next_sequence_;
    for (;;) {
        // What a callback armed meanwhile waits, so that one which always arms "now" cannot hold
        // us.
        auto next = queue_.begin();
        while (next != queue_.end() && next->first.first <= until && next->first.second >= end) {
            ++next;
        }
        if (next == queue_.end() || next->first.first > until) break;
        Timer* timer = next->second;
        queue_.erase(next);
        timer->deadline_ = kNever;
        firing_ = timer;
        auto callback = timer->callback_;  // shared, for a callback may destroy its own timer
        lock.unlock();
        (*callback)();
        lock.lock();
        firing_ = nullptr;
        fired_.notify_all();
    }
    running_ = false;
    firing_thread_ = {};
    fired_.notify_all();
    return queue_.empty() ? kNever : queue_.begin()->first.first;
}

Timer::Timer(Clock& clock, std::function<void()> callback)
    : clock_(clock),
      callback_(std::make_shared<const std::function<void()>>(std::move(callback))) {}

Timer::~Timer() {
    std::unique_lock lock(clock_.mutex_);
    if (deadline_ != kNever) clock_.queue_.erase({deadline_, sequence_});
    if (clock_.firing_ != this || clock_.firing_thread_ == std::this_thread::get_id()) return;
    clock_.fired_.wait(lock, [&] { return clock_.firing_ != this; });
}

void Timer::arm(Nanoseconds deadline) {
    bool earlier = false;
    {
        std::lock_guard lock(clock_.mutex_);
        if (deadline_ == deadline && deadline == kNever) return;
        if (deadline_ != kNever) clock_.queue_.erase({deadline_, sequence_});
        deadline_ = deadline;
        if (deadline == kNever) return;
        sequence_ = clock_.next_sequence_++;
        auto at = clock_.queue_.emplace(std::pair{deadline, sequence_}, this).first;
        earlier = at == clock_.queue_.begin();
    }
    if (earlier && clock_.rearm_) clock_.rearm_();
}

Nanoseconds Timer::deadline() const {
    std::lock_guard lock(clock_.mutex_);
    return deadline_;
}

}  // namespace polyvisor
