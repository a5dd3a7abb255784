#include "process/timers.hpp"

#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>

#include "process/thread.hpp"

namespace polyvisor::process {

s64 now(clockid_t clock) {
    timespec time{};
    ::clock_gettime(clock, &time);
    return time.tv_sec * s64{1'000'000'000} + time.tv_nsec;
}

bool to_nanoseconds(const timespec& time, s64& result) {
    constexpr s64 kSecond = 1'000'000'000;
    if (time.tv_sec < 0 || time.tv_nsec < 0 || time.tv_nsec >= kSecond) return false;
    result = time.tv_sec >= kLongest / kSecond ? kLongest : time.tv_sec * kSecond + time.tv_nsec;
    return true;
}

void Alarms::stop() {
    {
        std::lock_guard lock(mutex_);
        ending_ = true;
        alarms_.clear();
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
}

u64 Alarms::set(s64 moment, std::function<void()> ring) {
    const u64 name = next_name_++;
    if (ending_) return name;
    if (!thread_.joinable()) {
        // The signals of the host's process are for its own threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        thread_ = std::thread([this] { run(); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    const auto place = alarms_.emplace(moment, Alarm{name, std::move(ring)});
    if (place == alarms_.begin()) changed_.notify_all();
    return name;
}

void Alarms::cancel(u64 name) {
    std::erase_if(alarms_, [name](const auto& entry) { return entry.second.name == name; });
}

void Alarms::run() {
    std::unique_lock lock(mutex_);
    while (!ending_) {
        if (alarms_.empty()) {
            changed_.wait(lock);
            continue;
        }
        const s64 moment = alarms_.begin()->first;
        if (moment > now(CLOCK_MONOTONIC)) {
            using namespace std::chrono;
            changed_.wait_until(lock, steady_clock::time_point(nanoseconds(moment)));
            continue;
        }
        const auto ring = std::move(alarms_.begin()->second.ring);
        alarms_.erase(alarms_.begin());
        ring();
    }
}

// --- A process' timers ---------------------------------------------------------------------------

Timers::Timers(Process& process, Alarms& alarms) : process_(process), alarms_(alarms) {
    constexpr clockid_t kClocks[] = {CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID,
                                     CLOCK_PROCESS_CPUTIME_ID};
    constexpr int kNumbers[] = {SIGALRM, SIGVTALRM, SIGPROF};
    for (std::size_t n = 0; n < interval_timers_.size(); ++n) {
        interval_timers_[n].clock = kClocks[n];
        interval_timers_[n].info = signal_info(kNumbers[n], SI_KERNEL);
    }
}

void Timers::stop() {
    remove_made();
    for (Timer& timer : interval_timers_) start(timer, 0, 0);
}

Timers::Setting Timers::interval_timer(int which) {
    return left(interval_timers_[static_cast<std::size_t>(which)]);
}

void Timers::set_interval_timer(int which, Setting setting) {
    Timer& timer = interval_timers_[static_cast<std::size_t>(which)];
    start(timer, setting.left == 0 ? 0 : time(timer) + setting.left, setting.interval);
}

s64 Timers::create(clockid_t clock, const siginfo_t& info, s32 thread, s32 self) {
    if (made_.size() >= kMost) return -EAGAIN;
    Timer& timer = made_[next_];
    timer.clock = clock;
    timer.info = info;
    timer.info.si_timerid = static_cast<int>(next_);
    timer.thread = thread;
    timer.measured = self;
    return next_++;
}

Timers::Setting Timers::get(s64 number) {
    return left(made_.at(number));
}

void Timers::set(s64 number, Setting setting, bool absolute) {
    Timer& timer = made_.at(number);
    const s64 from = absolute ? 0 : time(timer);
    start(timer, setting.left == 0 ? 0 : from + setting.left, setting.interval);
}

void Timers::remove(s64 number) {
    alarms_.cancel(made_.at(number).alarm);
    made_.erase(number);
}

void Timers::remove_made() {
    for (auto& [number, timer] : made_) alarms_.cancel(timer.alarm);
    made_.clear();
}

Timers::Saved Timers::save() const {
    Saved saved;
    auto keep = [this](Timer timer) {
        // (One whose signal has not been taken goes on from where it was.)
        if (timer.moment != 0) timer.moment = std::max<s64>(1, timer.moment - time(timer));
        timer.alarm = 0;
        return timer;
    };
    for (std::size_t n = 0; n < interval_timers_.size(); ++n) {
        saved.interval_timers[n] = keep(interval_timers_[n]);
    }
    for (auto& [number, timer] : made_) saved.made[number] = keep(timer);
    saved.next = next_;
    return saved;
}

void Timers::restore(const Saved& saved) {
    stop();
    interval_timers_ = saved.interval_timers;
    made_ = saved.made;
    next_ = saved.next;
    auto begin = [this](Timer& timer) {
        if (timer.moment == 0) return;
        timer.moment += time(timer);
        if (timer.info.si_signo != 0 && !timer.waiting) arm(timer);
    };
    for (Timer& timer : interval_timers_) begin(timer);
    for (auto& [number, timer] : made_) begin(timer);
}

void Timers::taken(siginfo_t& info) {
    auto take = [this](Timer& timer) {
        if (!timer.waiting) return;
        timer.waiting = false;
        go_on(timer);
    };
    if (info.si_code == SI_TIMER) {
        const auto timer = made_.find(info.si_timerid);
        if (timer == made_.end()) return;
        take(timer->second);
        info.si_overrun = timer->second.overrun;
        return;
    }
    for (Timer& timer : interval_timers_) {
        if (timer.info.si_signo == info.si_signo) take(timer);
    }
}

s64 Timers::time(const Timer& timer) const {
    if (timer.clock == CLOCK_PROCESS_CPUTIME_ID) {
        u64 time = process_.cpu_time;
        for (const Thread* thread : process_.threads) time += thread->cpu_time();
        return static_cast<s64>(time);
    }
    if (timer.clock == CLOCK_THREAD_CPUTIME_ID) {
        const Thread* thread = process_.kernel().find_thread(timer.measured);
        return thread == nullptr ? 0 : static_cast<s64>(thread->cpu_time());
    }
    return now(timer.clock);
}

Timers::Setting Timers::left(const Timer& timer) const {
    if (timer.moment == 0) return {};
    s64 ahead = timer.moment - time(timer);
    if (ahead > 0) return {ahead, timer.interval};
    if (timer.interval != 0) return {timer.interval - -ahead % timer.interval, timer.interval};
    return {timer.info.si_signo == 0 || timer.waiting ? 0 : 1, 0};
}

void Timers::start(Timer& timer, s64 moment, s64 interval) {
    alarms_.cancel(timer.alarm);
    timer.alarm = 0;
    timer.moment = moment;
    timer.interval = moment == 0 ? 0 : interval;
    timer.waiting = false;
    timer.overrun = 0;
    if (moment != 0 && timer.info.si_signo != 0) arm(timer);
}

void Timers::arm(Timer& timer, s64 least) {
    s64 ahead = std::max(least, timer.moment - time(timer));
    if (timer.clock == CLOCK_PROCESS_CPUTIME_ID || timer.clock == CLOCK_THREAD_CPUTIME_ID) {
        // It may pass as fast as there are threads, or not at all. All of them together are not
        // looked at more often than every millisecond.
        const s64 step = 1'000'000 * static_cast<s64>(1 + made_.size());
        ahead = std::max<s64>(step, ahead / static_cast<s64>(process_.threads.size()));
    }
    timer.alarm = alarms_.set(now(CLOCK_MONOTONIC) + ahead, [this, &timer] { ring(timer); });
}

void Timers::ring(Timer& timer) {
    timer.alarm = 0;
    if (process_.ended()) return;
    if (time(timer) < timer.moment) return arm(timer);
    timer.waiting = true;
    s64 result = -EAGAIN;
    if (timer.thread == 0) {
        result = raise(process_, timer.info);
    } else if (Thread* thread = process_.kernel().find_thread(timer.thread)) {
        result = raise(*thread, timer.info);
    }
    if (result == 0 && !process_.signals.ignores(timer.info.si_signo)) return;
    // Nobody will take it, nor be slowed down by it.
    constexpr s64 kLeast = 10'000'000;
    timer.waiting = false;
    go_on(timer, kLeast);
}

// From one moment to the next that is ahead.
void Timers::go_on(Timer& timer, s64 least) {
    if (timer.interval == 0) {
        timer.moment = 0;
        return;
    }
    const s64 missed = std::max<s64>(0, time(timer) - timer.moment) / timer.interval;
    timer.overrun = static_cast<int>(std::min<s64>(missed, INT_MAX));
    timer.moment += (missed + 1) * timer.interval;
    arm(timer, least);
}

}  // namespace polyvisor::process
