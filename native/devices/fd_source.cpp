#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"
#include "devices/char_backends.hpp"

namespace polyvisor::devices {

namespace {

constexpr std::size_t kChunk = 256;

}  // namespace

struct FdSource::Impl : std::enable_shared_from_this<FdSource::Impl> {
    explicit Impl(EventLoop& loop) : loop(loop) {}
    void pump();
    bool deliver_rest();
    void watch();
    void unwatch();
    void end(int error);

    EventLoop& loop;
    OwnedFd fd;
    bool waits = true;     // epoll knows it; a regular file is always readable instead
    bool watched = false;  // from here on: the loop's thread only, or under mutex at the end
    bool ended = false;
    std::vector<u8> rest;  // read, but not yet taken
    Deliver deliver;
    std::function<void(int)> on_end;
    std::recursive_mutex mutex;  // held while callbacks run, so that the destructor waits
};

void FdSource::Impl::watch() {
    if (watched || !waits) return;
    std::weak_ptr<Impl> weak = weak_from_this();
    loop.watch(fd.get(), EPOLLIN, [weak](u32) {
        if (auto self = weak.lock()) self->pump();
    });
    watched = true;
}

void FdSource::Impl::unwatch() {
    if (std::exchange(watched, false)) loop.unwatch(fd.get());
}

void FdSource::Impl::end(int error) {
    ended = true;
    unwatch();
    if (on_end) std::exchange(on_end, {})(error);
}

bool FdSource::Impl::deliver_rest() {
    if (rest.empty()) return true;
    std::size_t taken = deliver(rest);
    rest.erase(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(taken));
    return rest.empty();
}

// On the loop's thread: reads and delivers until there is nothing to read or no room.
void FdSource::Impl::pump() {
    std::lock_guard lock(mutex);
    if (ended || !deliver) return;
    if (!deliver_rest()) {
        unwatch();  // an unread hang-up would wake the loop again and again
        return;
    }
    do {
        u8 chunk[kChunk];
        ssize_t count = ::read(fd.get(), chunk, sizeof chunk);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (count <= 0) {
            end(count < 0 ? errno : 0);
            return;
        }
        rest.assign(chunk, chunk + count);
        if (!deliver_rest()) {
            unwatch();
            return;
        }
    } while (!waits);
    watch();
}

FdSource::FdSource(EventLoop& loop, int fd, Deliver deliver, std::function<void(int error)> on_end)
    : impl_(std::make_shared<Impl>(loop)) {
    impl_->fd = OwnedFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!impl_->fd) throw_errno("cannot read from file descriptor " + std::to_string(fd));
    impl_->deliver = std::move(deliver);
    impl_->on_end = std::move(on_end);
    try {
        std::lock_guard lock(impl_->mutex);
        impl_->watch();
    } catch (const HostError& error) {
        if (error.code != EPERM) throw;
        impl_->waits = false;
        resume();
    }
}

FdSource::~FdSource() {
    bool watched;
    {
        std::lock_guard lock(impl_->mutex);
        impl_->deliver = {};
        impl_->on_end = {};
        impl_->ended = true;
        watched = std::exchange(impl_->watched, false);
    }
    if (watched) impl_->loop.unwatch(impl_->fd.get());  // without the mutex: it waits for pump()
}

void FdSource::resume() {
    std::weak_ptr<Impl> weak = impl_;
    impl_->loop.post([weak] {
        if (auto self = weak.lock()) self->pump();
    });
}

}  // namespace polyvisor::devices
