// Waiting for several files at a time, and files that only tell of events.
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "process/transfer.hpp"

namespace polyvisor::process {

namespace {

constexpr s64 kSecond = 1'000'000'000;

s64 now() {
    timespec time{};
    ::clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
}

s64 milliseconds(u64 argument) {
    const s32 wanted = static_cast<s32>(argument);
    return wanted < 0 ? Thread::kForever : wanted * s64{1'000'000};
}

// A struct timespec at `address`, or none: nanoseconds in `time`; 0 or -errno.
s64 load_timeout(Thread& thread, u64 address, s64& time) {
    timespec given;
    time = Thread::kForever;
    if (address == 0) return 0;
    if (!thread.space().load(address, given)) return -EFAULT;
    if (given.tv_sec < 0 || given.tv_nsec < 0 || given.tv_nsec >= kSecond) return -EINVAL;
    if (given.tv_sec < kSecond) time = given.tv_sec * kSecond + given.tv_nsec;
    return 0;
}

// Linux gives back what is left of it.
void store_left(Thread& thread, u64 address, s64 timeout, s64 started) {
    if (address == 0 || timeout < 0) return;
    const s64 left = std::max<s64>(0, timeout - (now() - started));
    thread.space().store(address, timespec{left / kSecond, left % kSecond});
}

// The mask of signals that ppoll() and its likes have for as long as they wait: 0 or -errno.
s64 load_mask(Thread& thread, u64 address, u64 size) {
    u64 mask = 0;
    if (address == 0) return 0;
    if (size != sizeof mask) return -EINVAL;
    if (!thread.space().load(address, mask)) return -EFAULT;
    use_mask(thread, mask);
    return 0;
}

// --- poll() --------------------------------------------------------------------------------------

s64 poll_files(Thread& thread, u64 address, u64 count, s64 timeout) {
    if (count > thread.descriptors().most) return -EINVAL;
    std::vector<pollfd> wanted(count);
    std::span<u8> bytes(reinterpret_cast<u8*>(wanted.data()), count * sizeof(pollfd));
    if (!thread.space().copy_in(address, bytes)) return -EFAULT;
    const s64 ready = thread.poll(wanted, timeout);
    if (ready < 0) return ready;
    return thread.space().copy_out(address, bytes) ? ready : -EFAULT;
}

s64 sys_poll(Thread& thread, const Arguments& a) {
    return poll_files(thread, a[0], a[1], milliseconds(a[2]));
}

s64 sys_ppoll(Thread& thread, const Arguments& a) {
    s64 timeout;
    const s64 started = now();
    if (s64 error = load_timeout(thread, a[2], timeout); error != 0) return error;
    if (s64 error = load_mask(thread, a[3], a[4]); error != 0) return error;
    const s64 ready = poll_files(thread, a[0], a[1], timeout);
    store_left(thread, a[2], timeout, started);
    return ready;
}

// --- select(), in terms of poll() ----------------------------------------------------------------

// The sets of one call: bit n of each is descriptor n.
class Sets {
  public:
    static constexpr short kEvents[] = {POLLIN, POLLOUT, POLLPRI};
    // What counts as ready for each (fs/select.c).
    static constexpr short kReady[] = {POLLIN | POLLHUP | POLLERR, POLLOUT | POLLERR, POLLPRI};

    Sets(Thread& thread, const u64* addresses, u64 count)
        : thread_(thread), addresses_(addresses), words_((count + 63) / 64), count_(count) {}

    bool load() {
        for (int n = 0; n < 3; ++n) {
            sets_[n].resize(words_);
            if (addresses_[n] != 0 && !thread_.space().copy_in(addresses_[n], bytes(n)))
                return false;
        }
        return true;
    }
    std::vector<pollfd> wanted() const {
        std::vector<pollfd> wanted;
        for (u64 fd = 0; fd < count_; ++fd) {
            short events = 0;
            for (int n = 0; n < 3; ++n) {
                if (sets_[n][fd / 64] & bit(fd % 64)) {
                    events = static_cast<short>(events | kEvents[n]);
                }
            }
            if (events != 0) wanted.push_back({static_cast<int>(fd), events, 0});
        }
        return wanted;
    }
    /// How many bits are set, or -errno.
    s64 store(const std::vector<pollfd>& polled) {
        s64 ready = 0;
        std::vector<u64> results[3];
        for (auto& set : results) set.resize(words_);
        for (const pollfd& one : polled) {
            if (one.revents & POLLNVAL) return -EBADF;
            const auto fd = static_cast<u64>(one.fd);
            for (int n = 0; n < 3; ++n) {
                if ((sets_[n][fd / 64] & bit(fd % 64)) && (one.revents & kReady[n])) {
                    results[n][fd / 64] |= bit(fd % 64);
                    ++ready;
                }
            }
        }
        for (int n = 0; n < 3; ++n) {
            sets_[n] = results[n];
            if (addresses_[n] != 0 && !thread_.space().copy_out(addresses_[n], bytes(n))) {
                return -EFAULT;
            }
        }
        return ready;
    }

  private:
    std::span<u8> bytes(int n) { return {reinterpret_cast<u8*>(sets_[n].data()), words_ * 8}; }

    Thread& thread_;
    const u64* addresses_;
    u64 words_, count_;
    std::vector<u64> sets_[3];
};

s64 select_files(Thread& thread, const Arguments& a, s64 timeout) {
    if (static_cast<s32>(a[0]) < 0) return -EINVAL;
    Sets sets(thread, &a[1], std::min<u64>(a[0], thread.descriptors().most));
    if (!sets.load()) return -EFAULT;
    auto wanted = sets.wanted();
    const s64 ready = thread.poll(wanted, timeout);
    return ready < 0 ? ready : sets.store(wanted);
}

s64 sys_select(Thread& thread, const Arguments& a) {
    timeval limit{};
    s64 timeout = Thread::kForever;
    const s64 started = now();
    if (a[4] != 0) {
        if (!thread.space().load(a[4], limit)) return -EFAULT;
        if (limit.tv_sec < 0 || limit.tv_usec < 0) return -EINVAL;
        if (limit.tv_sec < kSecond && limit.tv_usec < kSecond) {
            timeout = limit.tv_sec * kSecond + limit.tv_usec * 1000;
        }
    }
    const s64 ready = select_files(thread, a, timeout);
    if (a[4] != 0 && timeout >= 0) {
        const s64 left = std::max<s64>(0, timeout - (now() - started));
        thread.space().store(a[4], timeval{left / kSecond, left % kSecond / 1000});
    }
    return ready;
}

s64 sys_pselect6(Thread& thread, const Arguments& a) {
    s64 timeout;
    u64 mask[2]{};
    const s64 started = now();
    if (s64 error = load_timeout(thread, a[4], timeout); error != 0) return error;
    if (a[5] != 0 && !thread.space().load(a[5], mask)) return -EFAULT;
    if (s64 error = load_mask(thread, mask[0], mask[1]); error != 0) return error;
    const s64 ready = select_files(thread, a, timeout);
    store_left(thread, a[4], timeout, started);
    return ready;
}

// --- epoll ---------------------------------------------------------------------------------------

// The host's epoll, on the host's files; what the program wants to be told with each is its own.
s64 make_epoll(Thread& thread, u64 flags) {
    if (flags & ~u64{EPOLL_CLOEXEC}) return -EINVAL;
    OwnedFd fd(::epoll_create1(EPOLL_CLOEXEC));
    if (!fd) return -errno;
    auto file = std::make_shared<OpenFile>();
    file->fd = std::move(fd);
    file->path = "anon_inode:[eventpoll]";
    file->is_epoll = true;
    return thread.descriptors().add(std::move(file), flags & EPOLL_CLOEXEC);
}

s64 sys_epoll_create(Thread& thread, const Arguments& a) {
    return static_cast<s32>(a[0]) <= 0 ? -EINVAL : make_epoll(thread, 0);
}

s64 sys_epoll_create1(Thread& thread, const Arguments& a) {
    return make_epoll(thread, a[0]);
}

s64 sys_epoll_ctl(Thread& thread, const Arguments& a) {
    const auto epoll = file_of(thread, a[0]), file = file_of(thread, a[2]);
    epoll_event event{};
    if (a[1] != EPOLL_CTL_DEL && !thread.space().load(a[3], event)) return -EFAULT;
    if (!epoll || !file) return -EBADF;
    if (!epoll->is_epoll || epoll == file) return -EINVAL;
    event.events &= ~u32{EPOLLWAKEUP};
    return result(::epoll_ctl(epoll->fd.get(), static_cast<int>(a[1]), file->fd.get(), &event));
}

s64 wait_for_events(Thread& thread, const Arguments& a, s64 timeout) {
    constexpr u64 kMost = 1024;
    const auto epoll = file_of(thread, a[0]);
    if (!epoll) return -EBADF;
    if (!epoll->is_epoll || static_cast<s32>(a[2]) <= 0) return -EINVAL;
    std::vector<epoll_event> events(std::min<u64>(static_cast<u32>(a[2]), kMost));
    const s64 started = now();
    while (true) {
        const int ready =
            ::epoll_wait(epoll->fd.get(), events.data(), static_cast<int>(events.size()), 0);
        if (ready < 0) return -errno;
        const s64 left = timeout < 0 ? timeout : std::max<s64>(0, timeout - (now() - started));
        if (ready > 0 || left == 0) {
            std::span<const u8> bytes(reinterpret_cast<const u8*>(events.data()),
                                      static_cast<std::size_t>(ready) * sizeof(epoll_event));
            return thread.space().copy_out(a[1], bytes) ? ready : -EFAULT;
        }
        if (!thread.wait(epoll->fd.get(), POLLIN, left)) return -EINTR;
    }
}

s64 sys_epoll_wait(Thread& thread, const Arguments& a) {
    return wait_for_events(thread, a, milliseconds(a[3]));
}

s64 sys_epoll_pwait(Thread& thread, const Arguments& a) {
    if (s64 error = load_mask(thread, a[4], a[5]); error != 0) return error;
    return wait_for_events(thread, a, milliseconds(a[3]));
}

s64 sys_epoll_pwait2(Thread& thread, const Arguments& a) {
    s64 timeout;
    if (s64 error = load_timeout(thread, a[3], timeout); error != 0) return error;
    if (s64 error = load_mask(thread, a[4], a[5]); error != 0) return error;
    return wait_for_events(thread, a, timeout);
}

// --- Counters and clocks -------------------------------------------------------------------------

s64 make_event(Thread& thread, u64 count, u64 flags) {
    if (flags & ~u64{EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE}) return -EINVAL;
    OwnedFd fd(::eventfd(static_cast<unsigned>(count),
                         static_cast<int>(flags) | EFD_CLOEXEC | EFD_NONBLOCK));
    if (!fd) return -errno;
    return thread.descriptors().add(
        make_stream(std::move(fd), "anon_inode:[eventfd]", flags & EFD_NONBLOCK),
        flags & EFD_CLOEXEC);
}

s64 sys_eventfd(Thread& thread, const Arguments& a) {
    return make_event(thread, a[0], 0);
}

s64 sys_eventfd2(Thread& thread, const Arguments& a) {
    return make_event(thread, a[0], a[1]);
}

s64 sys_timerfd_create(Thread& thread, const Arguments& a) {
    if (a[1] & ~u64{TFD_CLOEXEC | TFD_NONBLOCK}) return -EINVAL;
    if (a[0] != CLOCK_MONOTONIC && a[0] != CLOCK_REALTIME && a[0] != CLOCK_BOOTTIME) return -EINVAL;
    OwnedFd fd(::timerfd_create(static_cast<clockid_t>(a[0]), TFD_CLOEXEC | TFD_NONBLOCK));
    if (!fd) return -errno;
    auto file = make_stream(std::move(fd), "anon_inode:[timerfd]", a[1] & TFD_NONBLOCK);
    file->is_timer = true;
    return thread.descriptors().add(std::move(file), a[1] & TFD_CLOEXEC);
}

s64 sys_timerfd_settime(Thread& thread, const Arguments& a) {
    const auto file = file_of(thread, a[0]);
    itimerspec wanted, before{};
    if (!thread.space().load(a[2], wanted)) return -EFAULT;
    if (!file) return -EBADF;
    if (!file->is_timer) return -EINVAL;
    if (::timerfd_settime(file->fd.get(), static_cast<int>(a[1]), &wanted, &before) != 0) {
        return -errno;
    }
    return a[3] == 0 || thread.space().store(a[3], before) ? 0 : -EFAULT;
}

s64 sys_timerfd_gettime(Thread& thread, const Arguments& a) {
    const auto file = file_of(thread, a[0]);
    itimerspec left{};
    if (!file) return -EBADF;
    if (!file->is_timer) return -EINVAL;
    if (::timerfd_gettime(file->fd.get(), &left) != 0) return -errno;
    return thread.space().store(a[1], left) ? 0 : -EFAULT;
}

constexpr Call kCalls[] = {
    {SYS_poll, sys_poll},
    {SYS_ppoll, sys_ppoll},
    {SYS_select, sys_select},
    {SYS_pselect6, sys_pselect6},
    {SYS_epoll_create, sys_epoll_create},
    {SYS_epoll_create1, sys_epoll_create1},
    {SYS_epoll_ctl, sys_epoll_ctl},
    {SYS_epoll_wait, sys_epoll_wait},
    {SYS_epoll_pwait, sys_epoll_pwait},
    {SYS_epoll_pwait2, sys_epoll_pwait2},
    {SYS_eventfd, sys_eventfd},
    {SYS_eventfd2, sys_eventfd2},
    {SYS_timerfd_create, sys_timerfd_create},
    {SYS_timerfd_settime, sys_timerfd_settime},
    {SYS_timerfd_gettime, sys_timerfd_gettime},
};

}  // namespace

std::span<const Call> event_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
