#include "machine/run_control.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace polyvisor {

namespace {

struct Name {
    StopReason reason;
    const char* name;
};

constexpr Name kNames[] = {
    {StopReason::kPowerOff, "power_off"},
    {StopReason::kReset, "reset"},
    {StopReason::kTripleFault, "triple_fault"},
    {StopReason::kDebugExit, "debug_exit"},
    {StopReason::kHalted, "halted"},
    {StopReason::kStopped, "stopped"},
    {StopReason::kDeviceError, "device_error"},
    {StopReason::kEngineFailure, "engine_failure"},
};

}  // namespace

const char* to_string(StopReason reason) {
    for (const Name& name : kNames) {
        if (name.reason == reason) return name.name;
    }
    return "unknown";
}

StopReason stop_reason(const std::string& text) {
    std::string known;
    for (const Name& name : kNames) {
        if (text == name.name) return name.reason;
        known += (known.empty() ? "" : ", ") + std::string(name.name);
    }
    throw ConfigError("reason",
                      "a machine cannot end with reason '" + text + "'; use one of " + known);
}

template <class Predicate>
bool RunControl::wait(Duration timeout, Predicate predicate) const {
    std::unique_lock lock(mutex_);
    if (timeout == kForever) {
        changed_.wait(lock, predicate);
        return true;
    }
    return changed_.wait_for(lock, timeout, predicate);
}

RunControl::Phase RunControl::phase() const {
    std::lock_guard lock(mutex_);
    return phase_;
}

bool RunControl::move(Phase from, Phase to) {
    {
        std::lock_guard lock(mutex_);
        if (phase_ != from) return false;
        phase_ = to;
    }
    changed_.notify_all();
    return true;
}

bool RunControl::request_pause() {
    if (!move(Phase::kRunning, Phase::kPaused)) return false;
    kick_();
    return true;
}

bool RunControl::end(StopInfo info) {
    {
        std::lock_guard lock(mutex_);
        if (phase_ == Phase::kEnded) return false;
        phase_ = Phase::kEnded;
        stop_ = std::move(info);
    }
    changed_.notify_all();
    kick_();
    return true;
}

bool RunControl::wait_quiet(Duration timeout) const {
    return wait(timeout, [this] { return quiet_locked(); });
}

bool RunControl::wait_stopped(Duration timeout) const {
    return wait(timeout, [this] {
        return phase_ == Phase::kEnded ? alive_ == 0 : phase_ == Phase::kPaused && inside_ == 0;
    });
}

bool RunControl::wait_ended(Duration timeout) const {
    return wait(timeout, [this] { return phase_ == Phase::kEnded && alive_ == 0; });
}

bool RunControl::quiet() const {
    std::lock_guard lock(mutex_);
    return quiet_locked();
}

StopInfo RunControl::stop_info() const {
    std::lock_guard lock(mutex_);
    return stop_;
}

void RunControl::thread_started() {
    std::lock_guard lock(mutex_);
    ++alive_;
    ++inside_;
}

// One thread less in the guest. It counts as inside until settle_() is done, so that nobody takes
// the machine for quiet, nor resumes it, before.
void RunControl::leave_guest(std::unique_lock<std::mutex>& lock) {
    if (inside_ == 1) {
        lock.unlock();
        settle_();
        lock.lock();
    }
    --inside_;
}

bool RunControl::enter() {
    std::unique_lock lock(mutex_);
    if (phase_ == Phase::kPaused) {
        leave_guest(lock);
        changed_.notify_all();
        changed_.wait(lock, [this] { return phase_ != Phase::kPaused; });
        ++inside_;
    }
    return phase_ == Phase::kRunning;
}

void RunControl::halted(u32 cpu) {
    {
        std::lock_guard lock(mutex_);
        // An earlier report may be out of date: a CPU can have been woken since.
        dormant_.assign(threads_, false);
        checking_ = true;
    }
    report(cpu, true);
    if (wants_reports()) kick_();
}

void RunControl::ask_dormant() {
    {
        std::lock_guard lock(mutex_);
        if (phase_ != Phase::kRunning) return;
        dormant_.assign(threads_, false);
        checking_ = true;
    }
    kick_();
}

void RunControl::report(u32 cpu, bool dormant) {
    {
        std::lock_guard lock(mutex_);
        dormant_[cpu] = dormant;
        bool all = std::find(dormant_.begin(), dormant_.end(), false) == dormant_.end();
        if (!dormant || all) checking_ = false;
        if (!all) return;
    }
    end({StopReason::kHalted, 0, "every CPU is halted with interrupts off", cpu});
}

void RunControl::leave() {
    {
        std::unique_lock lock(mutex_);
        leave_guest(lock);
        --alive_;
    }
    changed_.notify_all();
}

}  // namespace polyvisor
