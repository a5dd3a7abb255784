// Output to a descriptor that is not ours alone: a terminal or pipe shared with the shell must not
// be made non-blocking, for that flag belongs to everyone who has it open. So the sink opens the
// same pipe or terminal anew through /proc, with the flag; sockets are written with MSG_DONTWAIT;
// regular files do not block; what is left is written only when poll() says so.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>

#include "base/error.hpp"
#include "devices/char_backends.hpp"

namespace polyvisor::devices {

namespace {

// Keeps a write to a closed pipe from raising SIGPIPE in this thread, whoever's thread it is.
class NoSigpipe {
  public:
    NoSigpipe() {
        ::sigemptyset(&pipe_);
        ::sigaddset(&pipe_, SIGPIPE);
        sigset_t pending;
        ::sigpending(&pending);
        was_pending_ = ::sigismember(&pending, SIGPIPE);
        ::pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
    }
    ~NoSigpipe() {
        int saved = errno;
        timespec none{};
        if (!was_pending_) {
            while (::sigtimedwait(&pipe_, nullptr, &none) < 0 && errno == EINTR) {
            }
        }
        ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
        errno = saved;
    }

  private:
    sigset_t pipe_, before_;
    bool was_pending_;
};

}  // namespace

struct FdSink::Impl : std::enable_shared_from_this<FdSink::Impl> {
    Impl(EventLoop& loop, int fd, std::function<void(int)> on_error);
    ~Impl() { stop_watching(); }

    void open_own(int original);
    ssize_t write_some(const u8* data, std::size_t size);
    /// Writes until all is gone or the descriptor is full. False: full.
    bool flush();
    void flush_on_loop();
    void stop_watching();
    void fail(int code);
    void after_progress();

    EventLoop& loop;
    OwnedFd fd;
    bool socket = false;
    bool must_poll = false;  // a write could block

    std::mutex io_mutex;  // who writes to the descriptor; before mutex
    std::vector<u8> sending;
    std::size_t sent = 0;
    bool watched = false;

    mutable std::mutex mutex;  // a leaf
    std::vector<u8> pending;
    bool scheduled = false;
    std::atomic<std::size_t> queued{0};  // bytes in pending and sending
    std::atomic<bool> held{false};       // ready() said no and the callback is owed
    std::atomic<int> error{0};
    std::atomic<u64> dropped{0};
    std::atomic<bool> closed{false};

    std::recursive_mutex callback_mutex;  // held while a callback runs, so that removing one waits
    std::function<void(int)> on_error;
    std::function<void()> on_ready;
};

FdSink::Impl::Impl(EventLoop& loop, int original, std::function<void(int)> on_error)
    : loop(loop), on_error(std::move(on_error)) {
    open_own(original);
}

void FdSink::Impl::open_own(int original) {
    struct stat info;
    int flags = ::fcntl(original, F_GETFL);
    if (flags < 0 || ::fstat(original, &info) != 0) {
        throw_errno("cannot write to file descriptor " + std::to_string(original));
    }
    if ((flags & O_ACCMODE) == O_RDONLY) {
        throw HostError(EBADF, {},
                        "file descriptor " + std::to_string(original) + " is not open for writing");
    }
    socket = S_ISSOCK(info.st_mode);
    bool nonblocking = flags & O_NONBLOCK;
    // Opening /dev/ptmx again would make another terminal.
    bool terminal = S_ISCHR(info.st_mode) && ::isatty(original) && info.st_rdev != makedev(5, 2);
    if (!nonblocking && (S_ISFIFO(info.st_mode) || terminal)) {
        std::string path = "/proc/self/fd/" + std::to_string(original);
        fd = OwnedFd(::open(path.c_str(), O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
        nonblocking = static_cast<bool>(fd);
    }
    if (!fd) fd = OwnedFd(::fcntl(original, F_DUPFD_CLOEXEC, 0));
    if (!fd) throw_errno("cannot duplicate file descriptor " + std::to_string(original));
    must_poll = !nonblocking && !socket && !S_ISREG(info.st_mode);
}

ssize_t FdSink::Impl::write_some(const u8* data, std::size_t size) {
    if (socket) return ::send(fd.get(), data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (must_poll) {
        pollfd ready{fd.get(), POLLOUT, 0};
        if (::poll(&ready, 1, 0) == 0) {
            errno = EAGAIN;
            return -1;
        }
        size =
            std::min<std::size_t>(size, 512);  // room that a writable pipe or terminal surely has
    }
    NoSigpipe guard;
    return ::write(fd.get(), data, size);
}

void FdSink::Impl::fail(int code) {
    {
        std::lock_guard lock(mutex);
        pending.clear();
        queued = 0;
    }
    sending.clear();
    sent = 0;
    error = code;
}

bool FdSink::Impl::flush() {
    for (;;) {
        if (sent == sending.size()) {
            std::lock_guard lock(mutex);
            sending.clear();
            sent = 0;
            sending.swap(pending);
            if (sending.empty()) {
                scheduled = false;
                return true;
            }
        }
        ssize_t count = write_some(sending.data() + sent, sending.size() - sent);
        if (count >= 0) {
            sent += static_cast<std::size_t>(count);
            queued -= static_cast<std::size_t>(count);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return false;
        } else if (errno != EINTR) {
            fail(errno);
        }
    }
}

void FdSink::Impl::stop_watching() {
    if (std::exchange(watched, false)) loop.unwatch(fd.get());
}

// Callbacks that became due; no other mutex is held.
void FdSink::Impl::after_progress() {
    std::lock_guard lock(callback_mutex);
    if (error != 0 && on_error) std::exchange(on_error, {})(error);
    if (held && queued <= kHigh / 2) {
        held = false;
        if (on_ready) on_ready();
    }
}

void FdSink::Impl::flush_on_loop() {
    {
        std::lock_guard lock(io_mutex);
        if (closed) return;
        if (flush()) {
            stop_watching();
        } else if (!watched) {
            std::weak_ptr<Impl> weak = weak_from_this();
            try {
                loop.watch(fd.get(), EPOLLOUT, [weak](u32) {
                    if (auto self = weak.lock()) self->flush_on_loop();
                });
                watched = true;
            } catch (const HostError& failure) {
                fail(failure.code);
            }
        }
    }
    after_progress();
}

FdSink::FdSink(EventLoop& loop, int fd, std::function<void(int error)> on_error)
    : impl_(std::make_shared<Impl>(loop, fd, std::move(on_error))) {}

FdSink::~FdSink() {
    {
        std::lock_guard lock(impl_->callback_mutex);
        impl_->on_error = {};
        impl_->on_ready = {};
    }
    impl_->closed = true;
    bool watched;
    {
        std::lock_guard lock(impl_->io_mutex);
        watched = std::exchange(impl_->watched, false);
    }
    // Without io_mutex: this waits for a callback in progress, which takes it.
    if (watched) impl_->loop.unwatch(impl_->fd.get());
}

void FdSink::write(std::span<const u8> bytes) {
    if (impl_->error != 0) return;
    bool post = false;
    {
        std::lock_guard lock(impl_->mutex);
        std::size_t room = kLimit - std::min(kLimit, impl_->queued.load());
        std::size_t taken = std::min(room, bytes.size());
        impl_->dropped += bytes.size() - taken;
        impl_->pending.insert(impl_->pending.end(), bytes.begin(), bytes.begin() + taken);
        impl_->queued += taken;
        post = taken > 0 && !std::exchange(impl_->scheduled, true);
    }
    if (post) impl_->loop.post([self = impl_] { self->flush_on_loop(); });
}

bool FdSink::ready() const {
    if (impl_->queued < kHigh) return true;
    impl_->held = true;
    return impl_->queued < kHigh;  // it may have emptied before it saw that we wait
}

void FdSink::set_ready_callback(std::function<void()> callback) {
    std::lock_guard lock(impl_->callback_mutex);
    impl_->on_ready = std::move(callback);
}

bool FdSink::drain(int timeout_ms) {
    using std::chrono::steady_clock;
    auto end = steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    for (;;) {
        {
            std::lock_guard lock(impl_->io_mutex);
            impl_->flush();
        }
        impl_->after_progress();  // a device may have held more back
        if (impl_->queued == 0) return true;
        auto left = std::chrono::ceil<std::chrono::milliseconds>(end - steady_clock::now()).count();
        if (left <= 0) return false;
        pollfd ready{impl_->fd.get(), POLLOUT, 0};
        ::poll(&ready, 1, static_cast<int>(left));
    }
}

u64 FdSink::dropped() const {
    return impl_->dropped;
}

int FdSink::error() const {
    return impl_->error;
}

}  // namespace polyvisor::devices
