#include "process/workers.hpp"

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/error.hpp"

namespace polyvisor::process {

namespace {

constexpr std::size_t kMostIdle = 8;
constexpr std::chrono::seconds kPatience{1};

// ns; 0: the clock's thread is gone.
u64 read(clockid_t clock) {
    constexpr u64 kSecond = 1'000'000'000;
    timespec used{};
    if (::clock_gettime(clock, &used) != 0) return 0;
    return static_cast<u64>(used.tv_sec) * kSecond + static_cast<u64>(used.tv_nsec);
}

}  // namespace

struct Worker::State {
    Work work;
    mutable std::mutex mutex{};
    mutable std::condition_variable changed{};
    bool over = false;
    clockid_t clock = 0;
    u64 before = 0;            // of the clock, when it began
    u64 used = 0;              // when it is over
    bool clock_known = false;  // it has begun
};

namespace {

// One thread of the host.
struct Host {
    explicit Host(const std::optional<Confinement>& confinement) : confinement(confinement) {}
    const std::optional<Confinement> confinement;
    std::condition_variable wake{};
    std::shared_ptr<Worker::State> next{};  // what it is to do
};

// All that wait for work. Never destroyed: they may wait until the host's process ends.
struct Idle {
    std::mutex mutex{};
    std::list<Host*> hosts{};
    ::pid_t pid = ::getpid();

    static Idle& get() {
        static Idle* const idle = new Idle;
        return *idle;
    }
};

void perform(Worker::State& state, const std::string& failure) {
    {
        std::lock_guard lock(state.mutex);
        ::pthread_getcpuclockid(::pthread_self(), &state.clock);
        state.before = read(state.clock);
        state.clock_known = true;
    }
    // (What it leaves is destroyed after the state says that it is over.)
    Worker::Rest rest = state.work(failure);
    Worker::Work done;
    {
        std::lock_guard lock(state.mutex);
        done.swap(state.work);
        state.used = read(state.clock) - state.before;
        state.over = true;
        state.changed.notify_all();
    }
}

void main(std::unique_ptr<Host> host) {
    std::string failure;
    try {
        if (host->confinement) confine_this_thread(*host->confinement);
    } catch (const Error& error) {
        failure = error.what();
    }
    Idle& idle = Idle::get();
    while (true) {
        perform(*host->next, failure);
        std::unique_lock lock(idle.mutex);
        host->next.reset();
        if (idle.hosts.size() == kMostIdle || !failure.empty()) return;
        const auto here = idle.hosts.insert(idle.hosts.end(), host.get());
        if (!host->wake.wait_for(lock, kPatience, [&] { return host->next != nullptr; })) {
            idle.hosts.erase(here);
            return;
        }
    }
}

// The latest that became idle: what it needs is still in the host's caches.
bool give(const std::optional<Confinement>& confinement,
          const std::shared_ptr<Worker::State>& state) {
    Idle& idle = Idle::get();
    std::lock_guard lock(idle.mutex);
    if (idle.pid != ::getpid()) {  // they are threads of the process that this one is a copy of
        idle.hosts.clear();
        idle.pid = ::getpid();
    }
    for (auto host = idle.hosts.rbegin(); host != idle.hosts.rend(); ++host) {
        if ((*host)->confinement != confinement) continue;
        (*host)->next = state;
        (*host)->wake.notify_one();
        idle.hosts.erase(std::next(host).base());
        return true;
    }
    return false;
}

}  // namespace

Worker::Worker(const std::optional<Confinement>& confinement, Work work)
    : state_(std::make_shared<State>(std::move(work))) {
    if (give(confinement, state_)) return;
    auto host = std::make_unique<Host>(confinement);
    host->next = state_;
    // A program's threads have no business with the signals of the monitor's process.
    sigset_t all, before;
    ::sigfillset(&all);
    ::sigdelset(&all, SIGBUS);  // what it does itself (lost_pages.hpp)
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread(main, std::move(host)).detach();
    } catch (const std::system_error& error) {
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw HostError(error.code().value(), "", "cannot start a thread of a process VM");
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Worker& Worker::operator=(Worker&& other) noexcept {
    wait();
    state_ = std::move(other.state_);
    return *this;
}

bool Worker::over() const {
    if (!begun()) return true;
    std::lock_guard lock(state_->mutex);
    return state_->over;
}

void Worker::wait() const {
    if (!begun()) return;
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] { return state_->over; });
}

u64 Worker::cpu_time() const {
    if (!begun()) return 0;
    std::lock_guard lock(state_->mutex);
    if (state_->over) return state_->used;
    return state_->clock_known ? read(state_->clock) - state_->before : 0;
}

}  // namespace polyvisor::process
