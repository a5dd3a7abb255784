#include "bus/event_loop.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <array>
#include <cerrno>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "base/fd.hpp"

namespace polyvisor {

namespace {

// epoll tags of the two descriptors of our own; watches are numbered from kFirstWatch.
constexpr u64 kWakeTag = 0, kTimerTag = 1, kFirstWatch = 2;

}  // namespace

struct EventLoop::Impl {
    struct Watch {
        int fd;
        Callback callback;
    };

    explicit Impl(Clock& clock);
    void add(int fd, u32 events, u64 tag, int operation);
    void run();
    void dispatch(u64 tag, u32 events);
    void run_tasks();
    void arm_timer();
    void wake();
    bool in_thread() const { return owner.load() == std::this_thread::get_id(); }

    Clock& clock;
    OwnedFd epoll, wake_fd, timer_fd;
    std::thread thread;
    std::atomic<std::thread::id> owner;
    std::atomic<bool> stopping{false};

    std::mutex mutex;  // a leaf: callbacks and tasks run without it
    std::condition_variable idle;
    std::map<u64, std::shared_ptr<Watch>> watches;  // by tag, so that a stale event finds nothing
    std::map<int, u64> tags;                        // by descriptor
    u64 next_tag = kFirstWatch;
    u64 running = 0;  // tag of the watch whose callback runs
    std::vector<std::function<void()>> tasks;

    std::mutex timer_mutex;  // before the clock's: who asks for the deadline last also sets it last
    Nanoseconds armed = kNever;
};

EventLoop::Impl::Impl(Clock& clock) : clock(clock) {
    epoll = OwnedFd(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll) throw_errno("cannot create the event loop's epoll descriptor");
    wake_fd = OwnedFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!wake_fd) throw_errno("cannot create the event loop's eventfd");
    timer_fd = OwnedFd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
    if (!timer_fd) throw_errno("cannot create the event loop's timerfd");
    add(wake_fd.get(), EPOLLIN, kWakeTag, EPOLL_CTL_ADD);
    add(timer_fd.get(), EPOLLIN, kTimerTag, EPOLL_CTL_ADD);
}

void EventLoop::Impl::add(int fd, u32 events, u64 tag, int operation) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = tag;
    if (::epoll_ctl(epoll.get(), operation, fd, &event) != 0) {
        throw_errno("cannot watch file descriptor " + std::to_string(fd));
    }
}

void EventLoop::Impl::wake() {
    u64 one = 1;
    (void)!::write(wake_fd.get(), &one, sizeof one);  // full means it is awake anyway
}

void EventLoop::Impl::arm_timer() {
    if (clock.mode() != Clock::Mode::kFreeRunning) return;
    std::lock_guard lock(timer_mutex);
    Nanoseconds deadline = clock.paused() ? kNever : clock.next_deadline();
    if (deadline == armed) return;
    armed = deadline;
    itimerspec when{};
    if (deadline != kNever) {
        Nanoseconds now = clock.now();
        u64 delay = deadline > now ? deadline - now : 1;  // 0 would disarm
        when.it_value.tv_sec = static_cast<time_t>(delay / 1'000'000'000);
        when.it_value.tv_nsec = static_cast<long>(delay % 1'000'000'000);
    }
    ::timerfd_settime(timer_fd.get(), 0, &when, nullptr);
}

void EventLoop::Impl::run_tasks() {
    std::vector<std::function<void()>> batch;
    {
        std::lock_guard lock(mutex);
        batch.swap(tasks);
    }
    for (auto& task : batch) task();
}

void EventLoop::Impl::dispatch(u64 tag, u32 events) {
    std::shared_ptr<Watch> watch;
    {
        std::lock_guard lock(mutex);
        auto at = watches.find(tag);
        if (at == watches.end()) return;
        watch = at->second;
        running = tag;
    }
    watch->callback(events);
    {
        std::lock_guard lock(mutex);
        running = 0;
    }
    idle.notify_all();
}

void EventLoop::Impl::run() {
    owner = std::this_thread::get_id();
    ::pthread_setname_np(::pthread_self(), "pv-events");
    arm_timer();
    std::array<epoll_event, 32> events;
    u64 drained;
    while (!stopping.load()) {
        run_tasks();
        int count = ::epoll_wait(epoll.get(), events.data(), static_cast<int>(events.size()), -1);
        for (int i = 0; i < count && !stopping.load(); ++i) {
            u64 tag = events[i].data.u64;
            if (tag == kWakeTag) {
                (void)!::read(wake_fd.get(), &drained, sizeof drained);
            } else if (tag == kTimerTag) {
                (void)!::read(timer_fd.get(), &drained, sizeof drained);
                clock.run_expired();
                {
                    std::lock_guard lock(timer_mutex);
                    armed = ~kNever;  // it fired: whatever comes next must be set anew
                }
                arm_timer();
            } else {
                dispatch(tag, events[i].events);
            }
        }
    }
    owner = std::thread::id();
}

EventLoop::EventLoop(Clock& clock) : impl_(std::make_unique<Impl>(clock)) {
    if (clock.mode() == Clock::Mode::kFreeRunning) {
        clock.set_rearm([impl = impl_.get()] { impl->arm_timer(); });
    }
}

EventLoop::~EventLoop() {
    stop();
    if (impl_->clock.mode() == Clock::Mode::kFreeRunning) impl_->clock.set_rearm({});
}

void EventLoop::start() {
    if (impl_->thread.joinable()) return;
    impl_->stopping = false;
    // Signals are for the program's own threads; a closed pipe is an error code here, no SIGPIPE.
    sigset_t all, before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    try {
        impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
    } catch (const std::system_error& failure) {
        error = failure.code().value();
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error != 0) throw HostError(error, {}, "cannot start the event loop's thread");
}

void EventLoop::stop() {
    impl_->stopping = true;
    impl_->wake();
    if (impl_->in_thread() || !impl_->thread.joinable()) return;
    impl_->thread.join();
}

bool EventLoop::in_loop_thread() const {
    return impl_->in_thread();
}

void EventLoop::watch(int fd, u32 events, Callback callback) {
    std::lock_guard lock(impl_->mutex);
    if (impl_->tags.contains(fd)) {
        throw HostError(EEXIST, {},
                        "file descriptor " + std::to_string(fd) + " is watched already");
    }
    u64 tag = impl_->next_tag++;
    impl_->add(fd, events, tag, EPOLL_CTL_ADD);
    impl_->watches.emplace(tag,
                           std::make_shared<Impl::Watch>(Impl::Watch{fd, std::move(callback)}));
    impl_->tags.emplace(fd, tag);
}

void EventLoop::modify(int fd, u32 events) {
    std::lock_guard lock(impl_->mutex);
    auto at = impl_->tags.find(fd);
    if (at == impl_->tags.end()) {
        throw HostError(ENOENT, {}, "file descriptor " + std::to_string(fd) + " is not watched");
    }
    impl_->add(fd, events, at->second, EPOLL_CTL_MOD);
}

void EventLoop::unwatch(int fd) {
    std::shared_ptr<Impl::Watch> gone;  // destroyed last, without the mutex
    std::unique_lock lock(impl_->mutex);
    auto at = impl_->tags.find(fd);
    if (at == impl_->tags.end()) return;
    u64 tag = at->second;
    ::epoll_ctl(impl_->epoll.get(), EPOLL_CTL_DEL, fd, nullptr);
    impl_->tags.erase(at);
    auto watch = impl_->watches.find(tag);
    gone = watch->second;
    impl_->watches.erase(watch);
    if (!impl_->in_thread()) impl_->idle.wait(lock, [&] { return impl_->running != tag; });
    lock.unlock();
}

void EventLoop::post(std::function<void()> task) {
    {
        std::lock_guard lock(impl_->mutex);
        impl_->tasks.push_back(std::move(task));
    }
    impl_->wake();
}

}  // namespace polyvisor
