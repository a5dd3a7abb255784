#include "block/channel.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <cerrno>

#include "base/error.hpp"
#include "block/thread_channel.hpp"
#include "block/uring_channel.hpp"

namespace polyvisor::block {

Io parse_io(const std::string& name) {
    if (name == "auto") return Io::kAuto;
    if (name == "io_uring") return Io::kUring;
    if (name == "threads") return Io::kThreads;
    throw ConfigError("io", "there is no way of I/O named '" + name +
                                "'; choose \"auto\", \"io_uring\" or \"threads\"");
}

Wakeup::Wakeup(EventLoop& loop, Channel::Notify notify) : loop_(loop) {
    fd_ = OwnedFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!fd_) throw_errno("cannot create an eventfd for a disk");
    loop.watch(fd_.get(), EPOLLIN, [fd = fd_.get(), notify = std::move(notify)](u32) {
        u64 count;
        (void)!::read(fd, &count, sizeof count);
        notify();
    });
}

Wakeup::~Wakeup() {
    loop_.unwatch(fd_.get());
}

void Wakeup::signal() {
    const u64 one = 1;
    (void)!::write(fd_.get(), &one, sizeof one);
}

std::unique_ptr<Channel> make_channel(Store& store, EventLoop& loop, Io io,
                                      Channel::Notify notify) {
    if (io == Io::kUring && store.file() == nullptr) {
        throw HostError(EOPNOTSUPP, {},
                        "disk '" + store.name() +
                            "' is no raw file, so io_uring cannot serve it; "
                            "use io=\"auto\"");
    }
    auto wakeup = std::make_shared<Wakeup>(loop, std::move(notify));
    if (io != Io::kThreads && store.file() != nullptr) {
        try {
            return std::make_unique<UringChannel>(*store.file(), wakeup);
        } catch (const HostError&) {
            if (io == Io::kUring) throw;
        }
    }
    return std::make_unique<ThreadChannel>(store, std::move(wakeup));
}

}  // namespace polyvisor::block
