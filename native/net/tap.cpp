#include "net/tap.hpp"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::net {

namespace {

constexpr const char* kDevice = "/dev/net/tun";
/// Frames that are read in one go, so that the loop's other work has its turn.
constexpr int kBatch = 64;

static_assert(TUN_F_CSUM == kChecksum && TUN_F_TSO4 == kTso4 && TUN_F_TSO6 == kTso6 &&
              TUN_F_TSO_ECN == kEcnTso);

OwnedFd open_device() {
    OwnedFd fd(::open(kDevice, O_RDWR | O_CLOEXEC | O_NONBLOCK));
    if (fd) return fd;
    const int error = errno;
    std::string advice = error == ENOENT || error == ENXIO || error == ENODEV
                             ? "; the module tun provides it (modprobe tun)"
                         : error == EACCES || error == EPERM
                             ? "; it takes root, or a user network, which needs no privileges"
                             : "";
    throw HostError(
        error, kDevice,
        std::string("cannot open ") + kDevice + " for a tap: " + std::strerror(error) + advice);
}

HostError refusal(int error, const std::string& name) {
    std::string text = "cannot use the tap '" + name + "': " + std::strerror(error);
    if (error == EPERM || error == EACCES) {
        text += "; make it for this user first (ip tuntap add " + name +
                " mode tap user NAME), or take a user network, which needs no privileges";
    } else if (error == EBUSY) {
        text += "; another program has it";
    } else if (error == EINVAL) {
        text += "; an interface of that name is there and is no tap, or has not as many queues";
    }
    return HostError(error, kDevice, text);
}

// Says which interface the descriptor is; its name.
std::string take_interface(int fd, const std::string& name, bool several) {
    ifreq request{};
    std::memcpy(request.ifr_name, name.data(), name.size());
    request.ifr_flags =
        static_cast<short>(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (several ? IFF_MULTI_QUEUE : 0));
    int result = ::ioctl(fd, TUNSETIFF, &request);
    if (result != 0 && errno == EINVAL && !several) {  // one that was made for several queues
        request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_MULTI_QUEUE);
        result = ::ioctl(fd, TUNSETIFF, &request);
    }
    if (result != 0) throw refusal(errno, name);
    int header = sizeof(FrameHeader);
    if (::ioctl(fd, TUNSETVNETHDRSZ, &header) != 0) throw refusal(errno, name);
    return {request.ifr_name, ::strnlen(request.ifr_name, IFNAMSIZ)};
}

}  // namespace

Tap::Tap(EventLoop& loop, Log* log, const std::string& name, unsigned queues)
    : log_(log), name_(name) {
    if (name.size() >= IFNAMSIZ || name.find('/') != std::string::npos) {
        throw ConfigError("tap", "'" + name + "' cannot be an interface: a name has up to " +
                                     std::to_string(IFNAMSIZ - 1) + " characters and no slash");
    }
    for (unsigned i = 0; i < queues; ++i) {
        auto queue = std::make_unique<Queue>(loop);
        queue->fd = open_device();
        name_ = take_interface(queue->fd.get(), name_, queues > 1);
        queue->buffer.resize(sizeof(FrameHeader) + kLongestFrame);
        queue->wakeup = std::make_unique<Wakeup>(loop, [this, i] {
            Queue& own = *queues_[i];
            if (own.waiting == 0 || !give(i, own.waiting)) return;
            own.waiting = 0;
            own.watch.set(EPOLLIN);
        });
        queues_.push_back(std::move(queue));
    }
}

Tap::~Tap() {
    stop();
}

void Tap::attach(Port* port) {
    stop();
    port_ = port;
}

void Tap::start(u32 offloads) {
    // One interface: what is said of one queue holds for all.
    if (::ioctl(queues_[0]->fd.get(), TUNSETOFFLOAD, static_cast<unsigned long>(offloads)) != 0 &&
        log_ != nullptr && !gone_) {
        log_->note("net", name() + " refuses the guest's offloads: " + std::strerror(errno));
    }
    if (started_ || gone_) return;
    started_ = true;
    for (unsigned i = 0; i < queues(); ++i) {
        queues_[i]->watch.start(queues_[i]->fd.get(), EPOLLIN, [this, i](u32 events) {
            if (events & EPOLLIN) read(i);
            if (events & (EPOLLERR | EPOLLHUP)) unplugged(EBADFD);
        });
    }
}

void Tap::stop() {
    for (auto& queue : queues_) queue->watch.stop();
    started_ = false;
}

bool Tap::send(unsigned queue, const FrameHeader& header, std::span<u8> frame) {
    const iovec parts[] = {{const_cast<FrameHeader*>(&header), sizeof header},
                           {frame.data(), frame.size()}};
    // (EIO: the interface is down. The event loop finds out when it is gone.)
    return ::writev(queues_[queue]->fd.get(), parts, 2) > 0;
}

void Tap::read(unsigned index) {
    Queue& queue = *queues_[index];
    for (int i = 0; i < kBatch; ++i) {
        const ssize_t size = ::read(queue.fd.get(), queue.buffer.data(), queue.buffer.size());
        if (size < 0) {
            if (errno != EAGAIN && errno != EINTR) unplugged(errno);
            return;
        }
        if (static_cast<std::size_t>(size) <= sizeof(FrameHeader)) continue;
        if (!give(index, static_cast<std::size_t>(size))) {
            // The kernel keeps the others, and drops them when it has enough.
            queue.waiting = static_cast<std::size_t>(size);
            queue.watch.set(0);
            return;
        }
    }
}

bool Tap::give(unsigned index, std::size_t size) {
    Queue& queue = *queues_[index];
    FrameHeader header;
    std::memcpy(&header, queue.buffer.data(), sizeof header);
    const auto frame = std::span(queue.buffer).subspan(sizeof header, size - sizeof header);
    return port_->receive(index, header, frame) != Port::Outcome::kNoRoom;
}

// Somebody deleted the interface: the descriptors are good for nothing any more, and would wake the
// loop for ever.
void Tap::unplugged(int error) {
    for (auto& queue : queues_) queue->watch.stop();
    if (gone_.exchange(true)) return;
    if (log_ != nullptr) {
        log_->note("net", name() + " is gone (" + std::strerror(error) +
                              "); the guest's cable is unplugged");
    }
    port_->carrier(false);
}

void Tap::wake(unsigned queue) {
    queues_[queue]->wakeup->raise();
}

}  // namespace polyvisor::net
