// Virtual time, and timers on it.
//
// Clock::now() is nanoseconds since the machine was created. Free-running: the host's monotonic
// clock, less the time the machine was paused. Deterministic: a vCPU moves it with advance_to() as
// it executes; nothing else does, so two runs see the same times.
//
// Timers fire in the thread that calls run_expired(): the machine's event-loop thread when
// free-running, the (single) vCPU's thread between blocks when deterministic. A callback runs
// without the clock's mutex held and may arm timers, raise interrupts and take device locks.
// Callbacks run one at a time and must not throw; run_expired() called from inside one does
// nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/types.hpp"

namespace polyvisor {

using Nanoseconds = u64;
inline constexpr Nanoseconds kNever = std::numeric_limits<u64>::max();

class Clock {
  public:
    enum class Mode { kFreeRunning, kDeterministic };
    explicit Clock(Mode mode = Mode::kFreeRunning);
    ~Clock();

    Mode mode() const { return mode_; }
    /// The guest's time-stamp counter is a function of virtual time: now() * tsc_khz() / 10^6.
    u64 tsc_khz() const { return tsc_khz_; }
    void set_tsc_khz(u64 khz) { tsc_khz_ = khz; }
    u64 tsc() const { return tsc_at(now()); }
    u64 tsc_at(Nanoseconds time) const {
        if (PV_LIKELY(tsc_khz_ == 1'000'000)) return time;
        return time / 1'000'000 * tsc_khz_ + time % 1'000'000 * tsc_khz_ / 1'000'000;
    }
    /// The first time at which tsc_at() is >= tsc (kNever when that is beyond 2^63 ns).
    Nanoseconds time_of_tsc(u64 tsc) const;
    Nanoseconds now() const;
    /// Deterministic only: virtual time has reached `time`. Going back is ignored.
    void advance_to(Nanoseconds time);
    /// Free-running only: stop and continue virtual time (machine paused).
    void pause();
    void resume();
    /// Sets virtual time (restore of a snapshot). The machine must not be running.
    void set(Nanoseconds time);

    bool paused() const;
    /// Free-running: host monotonic time minus virtual time, as of now or of the last pause().
    /// Changes exactly when resume() or set() move it, so an engine whose guest reads the
    /// hardware's clock knows by comparing.
    u64 host_offset() const { return host_offset_.load(std::memory_order_acquire); }

    /// Runs the callbacks of all timers with deadline <= now(), in deadline order (ties: arming
    /// order); a timer armed by one of these callbacks waits for the next call. Returns the next
    /// deadline or kNever.
    Nanoseconds run_expired();
    Nanoseconds next_deadline() const;
    /// Called (from any thread, no lock held) when the earliest deadline became earlier: the event
    /// loop re-arms its wait, the deterministic run loop shortens its budget. Also after resume()
    /// and set(). Set it before any timer is armed from another thread.
    void set_rearm(std::function<void()> callback) { rearm_ = std::move(callback); }

  private:
    friend class Timer;
    static u64 host_now();
    void shift(u64 offset, bool paused, Nanoseconds at);

    Mode mode_;
    u64 tsc_khz_ = 1'000'000;   // 1 GHz: a tick is a nanosecond
    mutable std::mutex mutex_;  // a leaf
    std::condition_variable fired_;
    // now() takes no lock: it reads these under a sequence count that is odd while they change.
    std::atomic<u64> version_{0};
    std::atomic<u64> virtual_now_{0};  // deterministic, or while paused
    std::atomic<u64> host_offset_{0};  // virtual = host - offset
    std::atomic<bool> paused_{false};
    u64 next_sequence_ = 0;
    std::map<std::pair<Nanoseconds, u64>, class Timer*> queue_;
    class Timer* firing_ = nullptr;  // whose callback runs now, in firing_thread_
    std::thread::id firing_thread_;
    bool running_ = false;  // a thread is inside run_expired()
    std::function<void()> rearm_;
};

/// One timer; destroying it disarms it (and waits for a callback in progress on another thread:
/// hold no lock that the callback takes). disarm() does not wait. A Timer does not outlive its
/// Clock.
class Timer {
  public:
    Timer(Clock& clock, std::function<void()> callback);
    ~Timer();
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

    /// (Re)arms for the virtual time `deadline`; kNever disarms.
    void arm(Nanoseconds deadline);
    void disarm() { arm(kNever); }
    Nanoseconds deadline() const;

  private:
    friend class Clock;
    Clock& clock_;
    std::shared_ptr<const std::function<void()>> callback_;
    Nanoseconds deadline_ = kNever;
    u64 sequence_ = 0;
};

}  // namespace polyvisor
