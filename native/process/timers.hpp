// Timers of processes, that is what raises signals by itself, and the one thread that serves all
// those of a process VM, which starts with the first of them.
#pragma once

#include <sys/time.h>

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "process/signals.hpp"

namespace polyvisor::process {

/// Nanoseconds of a clock of the host.
s64 now(clockid_t clock);
/// The longest time that is told from forever: a century.
inline constexpr s64 kLongest = 3'500'000'000'000'000'000;
/// Nanoseconds, at most kLongest; false: it is no time.
bool to_nanoseconds(const timespec& time, s64& result);

/// All calls, and what they call, hold the mutex.
class Alarms {
  public:
    explicit Alarms(std::mutex& mutex) : mutex_(mutex) {}
    /// Nothing rings after it. Without the mutex.
    ~Alarms() { stop(); }
    void stop();

    /// Calls `ring` at `moment`, in ns of CLOCK_MONOTONIC: never before, and on a thread of its
    /// own. A name for cancel().
    u64 set(s64 moment, std::function<void()> ring);
    void cancel(u64 name);

  private:
    struct Alarm {
        u64 name;
        std::function<void()> ring;
    };
    void run();

    std::mutex& mutex_;
    std::condition_variable changed_;
    std::multimap<s64, Alarm> alarms_;  // by their moments
    u64 next_name_ = 1;
    bool ending_ = false;
    std::thread thread_;
};

/// The timers of one process: setitimer()'s three, and those that timer_create() made. They go with
/// it. All calls hold the lock of the kernel.
class Timers {
  public:
    static constexpr int kMost = 256;  ///< of timer_create()'s

    Timers(Process& process, Alarms& alarms);
    ~Timers() { stop(); }

    struct Setting {
        s64 left = 0;  ///< ns; 0: it is not set
        s64 interval = 0;
    };
    /// `which`: ITIMER_*.
    Setting interval_timer(int which);
    void set_interval_timer(int which, Setting setting);

    /// `info`: the signal that it raises (number 0: none) at a thread, or (0) at the process.
    /// `self` is whose CPU time a thread's is. Its number, or -errno.
    s64 create(clockid_t clock, const siginfo_t& info, s32 thread, s32 self);
    /// The number that the next one has.
    s64 next() const { return next_; }
    bool exists(s64 number) const { return made_.contains(number); }
    Setting get(s64 number);
    /// `absolute`: `setting.left` is a moment of its clock.
    void set(s64 number, Setting setting, bool absolute);
    int overrun(s64 number) { return made_.at(number).overrun; }
    void remove(s64 number);
    /// As execve() does.
    void remove_made();
    /// As at the end of the process.
    void stop();

    /// What they are set to, with the time that is left then: for a copy of the process, or for
    /// this one later.
    class Saved;
    Saved save() const;
    void restore(const Saved& saved);

    /// A signal is being taken, of which more may be due: says in it how often it was missed.
    void taken(siginfo_t& info);

  private:
    struct Timer {
        clockid_t clock = CLOCK_MONOTONIC;
        siginfo_t info{};
        s32 thread = 0, measured = 0;
        s64 moment = 0, interval = 0;  // of its clock; no moment: it is not set
        bool waiting = false;          // its signal has been raised, and not taken
        int overrun = 0;
        u64 alarm = 0;
    };
    s64 time(const Timer& timer) const;
    Setting left(const Timer& timer) const;
    void start(Timer& timer, s64 moment, s64 interval);
    void arm(Timer& timer, s64 least = 0);
    void ring(Timer& timer);
    void go_on(Timer& timer, s64 least = 0);

    Process& process_;
    Alarms& alarms_;
    std::array<Timer, 3> interval_timers_{};  // by ITIMER_*
    std::map<s64, Timer> made_;
    s64 next_ = 0;
};

class Timers::Saved {
    friend class Timers;
    std::array<Timer, 3> interval_timers;
    std::map<s64, Timer> made;  // moments of both: what is left
    s64 next = 0;
};

}  // namespace polyvisor::process
