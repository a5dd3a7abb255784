#include "machine/vcpu_thread.hpp"

#include <pthread.h>
#include <signal.h>

#include <system_error>

#include "base/error.hpp"

namespace polyvisor {

void VcpuThread::start(const Hooks& hooks) {
    control_.thread_started();
    try {
        thread_ = std::thread([this, hooks] {
            ::pthread_setname_np(::pthread_self(), ("vcpu" + std::to_string(vcpu_.id())).c_str());
            clockid_t clock = kNoClock;
            if (::pthread_getcpuclockid(::pthread_self(), &clock) == 0) cpu_clock_ = clock;
            if (hooks.started) hooks.started();
            run_loop(vcpu_, control_, breakpoints_, counters_, log_);
            if (hooks.finished) hooks.finished();
            cpu_clock_ = kNoClock;
            control_.leave();
        });
    } catch (const std::system_error& error) {
        control_.leave();
        throw HostError(error.code().value(), "",
                        "cannot start the thread of CPU " + std::to_string(vcpu_.id()));
    }
}

u64 VcpuThread::cpu_time() const {
    timespec time{};
    clockid_t clock = cpu_clock_;
    if (clock == kNoClock || ::clock_gettime(clock, &time) != 0) return 0;
    return static_cast<u64>(time.tv_sec) * 1'000'000'000 + static_cast<u64>(time.tv_nsec);
}

void VcpuThread::join() {
    if (thread_.joinable()) thread_.join();
}

struct BlockedSignals::Mask {
    sigset_t set;
};

BlockedSignals::BlockedSignals() : before_(std::make_unique<Mask>()) {
    sigset_t all;
    ::sigfillset(&all);
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGPROF}) {
        ::sigdelset(&all, signal);
    }
    ::pthread_sigmask(SIG_BLOCK, &all, &before_->set);
}

BlockedSignals::~BlockedSignals() {
    ::pthread_sigmask(SIG_SETMASK, &before_->set, nullptr);
}

}  // namespace polyvisor
