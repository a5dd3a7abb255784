#include "net/socket.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "net/packet.hpp"
#include "net/unix_socket.hpp"

namespace polyvisor::net {

namespace {

constexpr std::size_t kLength = 4;
constexpr int kBatch = 64;  // datagrams that are read in one go

}  // namespace

// --- Streams -------------------------------------------------------------------------------------

StreamSocket::StreamSocket(EventLoop& loop, Log* log, const std::string& path, bool listen)
    : log_(log), path_(path), listening_(loop), reading_(loop) {
    in_.resize(4 * (kLength + kLongestFrame));
    wakeup_ = std::make_unique<Wakeup>(loop, [this] {
        if (!no_room_.exchange(false) || !deliver()) return;
        std::lock_guard lock(mutex_);
        set_events();
    });
    if (listen) {
        listener_ = bind_unix(path, SOCK_STREAM);
        if (::listen(listener_.get(), 1) != 0) throw_errno("cannot listen on '" + path + "'", path);
    } else {
        peer_ = connect_unix(path, SOCK_STREAM);
    }
}

StreamSocket::~StreamSocket() {
    attach(nullptr);
    if (listener_) ::unlink(path_.c_str());
}

void StreamSocket::attach(Port* port) {
    listening_.stop();
    reading_.stop();
    if (port == nullptr) {
        wakeup_.reset();
        return;
    }
    port_ = port;
    port->carrier(static_cast<bool>(peer_));
    if (peer_) plug(std::move(peer_));
    if (listener_) listening_.start(listener_.get(), EPOLLIN, [this](u32) { accept(); });
}

void StreamSocket::plug(OwnedFd peer) {
    std::lock_guard lock(mutex_);
    peer_ = std::move(peer);
    out_.clear();
    in_start_ = in_end_ = 0;
    no_room_ = false;
    reading_.start(peer_.get(), EPOLLIN, [this](u32 events) { serve(events); });
}

void StreamSocket::accept() {
    OwnedFd peer(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!peer) return;
    // One at a time: others wait in the listener's queue.
    listening_.set(0);
    plug(std::move(peer));
    port_->carrier(true);
}

void StreamSocket::unplug(const std::string& why) {
    {
        std::lock_guard lock(mutex_);
        reading_.stop();
        peer_.reset();
        out_.clear();
    }
    if (log_ != nullptr) log_->note("net", name() + ": " + why);
    port_->carrier(false);
    listening_.set(EPOLLIN);
}

// With the mutex.
void StreamSocket::set_events() {
    reading_.set((no_room_ ? 0u : u32{EPOLLIN}) | (out_.empty() ? 0u : u32{EPOLLOUT}));
}

void StreamSocket::serve(u32 events) {
    if (events & EPOLLIN) {
        if (!read()) return;
    } else if (events & (EPOLLERR | EPOLLHUP)) {
        unplug("the peer is gone; the guest's cable is unplugged");
        return;
    }
    std::lock_guard lock(mutex_);
    if (events & EPOLLOUT) write_waiting();
    set_events();
}

// False: there is no peer any more.
bool StreamSocket::read() {
    const ssize_t size = ::read(peer_.get(), in_.data() + in_end_, in_.size() - in_end_);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (size <= 0) {
        unplug("the peer is gone; the guest's cable is unplugged");
        return false;
    }
    in_end_ += static_cast<std::size_t>(size);
    return deliver() || no_room_;
}

// What is whole of in_; there is always room for one more frame afterwards. False: the guest has no
// room, or the peer does not speak this protocol.
bool StreamSocket::deliver() {
    while (in_end_ - in_start_ >= kLength) {
        const u32 size = load_be32(in_.data() + in_start_);
        if (size > kLongestFrame) {
            unplug("the peer announces a frame of " + std::to_string(size) +
                   " bytes, which is no frame");
            return false;
        }
        if (in_end_ - in_start_ < kLength + size) break;
        const auto frame = std::span(in_).subspan(in_start_ + kLength, size);
        if (port_->receive(0, {}, frame) == Port::Outcome::kNoRoom) {
            no_room_ = true;
            return false;
        }
        in_start_ += kLength + size;
    }
    std::copy(in_.begin() + static_cast<std::ptrdiff_t>(in_start_),
              in_.begin() + static_cast<std::ptrdiff_t>(in_end_), in_.begin());
    in_end_ -= std::exchange(in_start_, 0);
    return true;
}

bool StreamSocket::send(unsigned, const FrameHeader&, std::span<u8> frame) {
    u8 length[kLength];
    store_be32(length, static_cast<u32>(frame.size()));
    std::lock_guard lock(mutex_);
    if (!peer_ || out_.size() + frame.size() > kMostWaiting) return false;
    std::size_t sent = 0;
    if (out_.empty()) {
        iovec parts[] = {{length, kLength}, {frame.data(), frame.size()}};
        msghdr message{};
        message.msg_iov = parts;
        message.msg_iovlen = 2;
        const ssize_t size = ::sendmsg(peer_.get(), &message, MSG_NOSIGNAL);
        if (size < 0 && errno != EAGAIN) return false;  // the loop finds out that it is gone
        sent = size < 0 ? 0 : static_cast<std::size_t>(size);
    }
    if (sent < kLength) out_.insert(out_.end(), length + sent, length + kLength);
    const std::size_t rest = sent < kLength ? 0 : sent - kLength;
    out_.insert(out_.end(), frame.begin() + static_cast<std::ptrdiff_t>(rest), frame.end());
    set_events();
    return true;
}

bool StreamSocket::write_waiting() {
    const ssize_t size = ::send(peer_.get(), out_.data(), out_.size(), MSG_NOSIGNAL);
    if (size > 0) out_.erase(out_.begin(), out_.begin() + size);
    return out_.empty();
}

// --- Datagrams -----------------------------------------------------------------------------------

DatagramSocket::DatagramSocket(EventLoop& loop, Log*, const std::string& path,
                               const std::string& peer)
    : path_(path), peer_(peer), fd_(bind_unix(path, SOCK_DGRAM)), reading_(loop) {
    if (peer.empty() || peer.size() >= sizeof(sockaddr_un::sun_path)) {
        ::unlink(path_.c_str());
        throw ConfigError("peer", "'" + peer + "' cannot be the path of a peer's socket");
    }
    int size = 1 << 20;  // a burst of 64 KiB frames; the default holds three
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    buffer_.resize(kLongestFrame + 1);
    wakeup_ = std::make_unique<Wakeup>(loop, [this] {
        if (waiting_ == 0) return;
        const auto frame = std::span(buffer_).first(waiting_);
        if (port_->receive(0, {}, frame) == Port::Outcome::kNoRoom) return;
        waiting_ = 0;
        reading_.set(EPOLLIN);
    });
}

DatagramSocket::~DatagramSocket() {
    attach(nullptr);
    ::unlink(path_.c_str());
}

void DatagramSocket::attach(Port* port) {
    reading_.stop();
    if (port == nullptr) {
        wakeup_.reset();
        return;
    }
    port_ = port;
    reading_.start(fd_.get(), EPOLLIN, [this](u32) { read(); });
}

void DatagramSocket::read() {
    for (int i = 0; i < kBatch; ++i) {
        const ssize_t size = ::recv(fd_.get(), buffer_.data(), buffer_.size(), 0);
        if (size < 0) return;
        const auto frame = std::span(buffer_).first(static_cast<std::size_t>(size));
        if (port_->receive(0, {}, frame) == Port::Outcome::kNoRoom) {
            waiting_ = frame.size();
            reading_.set(0);
            return;
        }
    }
}

bool DatagramSocket::send(unsigned, const FrameHeader&, std::span<u8> frame) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, peer_.data(), peer_.size());
    return ::sendto(fd_.get(), frame.data(), frame.size(), MSG_NOSIGNAL,
                    reinterpret_cast<const sockaddr*>(&address), sizeof address) >= 0;
}

}  // namespace polyvisor::net
