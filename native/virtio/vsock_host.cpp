// The host's side of vsock: the socket at PATH, those at PATH_P, and programs of this process.
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "base/error.hpp"
#include "virtio/vsock.hpp"

namespace polyvisor::virtio {

namespace {

/// False: the path is too long.
bool make_address(const std::string& path, sockaddr_un& address) {
    address = {};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) return false;
    std::memcpy(address.sun_path, path.data(), path.size());
    return true;
}

OwnedFd unix_socket() {
    return OwnedFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

int connect_to(const OwnedFd& socket, const sockaddr_un& address) {
    return ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
}

/// Two ends; the first does not block.
std::array<OwnedFd, 2> pair() {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return {};
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
    return {OwnedFd(ends[0]), OwnedFd(ends[1])};
}

bool pass(const OwnedFd& channel, const OwnedFd& socket, u32 guest_port) {
    iovec bytes{&guest_port, sizeof guest_port};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    const int fd = socket.get();
    std::memcpy(CMSG_DATA(head), &fd, sizeof fd);
    return ::sendmsg(channel.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof guest_port;
}

/// The port of "CONNECT <port>\n".
bool parse_greeting(std::string_view line, u32& port) {
    constexpr std::string_view kWord = "CONNECT ";
    if (!line.starts_with(kWord)) return false;
    line.remove_prefix(kWord.size());
    const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), port);
    return error == std::errc() && end + 1 == line.data() + line.size();
}

}  // namespace

void Vsock::open_listener() {
    if (config_.path.empty()) return;
    sockaddr_un address;
    // "_" and a port number follow it.
    if (!make_address(config_.path + "_4294967295", address)) {
        throw ConfigError("path", "the path of a vsock's socket is too long: '" + config_.path +
                                      "'; a socket's path has at most 107 characters");
    }
    make_address(config_.path, address);
    // A socket that nobody serves was left behind by a process that died.
    struct stat info;
    if (::lstat(config_.path.c_str(), &info) == 0) {
        OwnedFd probe = unix_socket();
        if (!S_ISSOCK(info.st_mode) || connect_to(probe, address) == 0 || errno != ECONNREFUSED) {
            throw ConfigError("path", "'" + config_.path +
                                          "' is there already, and not a socket that nobody "
                                          "serves; take another path for the vsock");
        }
        ::unlink(config_.path.c_str());
    }
    OwnedFd listener = unix_socket();
    if (!listener ||
        ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        throw_errno("cannot make the vsock's socket '" + config_.path + "'", config_.path);
    }
    listener_ = std::move(listener);
    try {
        // Nobody can connect before it listens.
        if (::chmod(config_.path.c_str(), 0600) != 0 || ::listen(listener_.get(), 128) != 0) {
            throw_errno("cannot listen on '" + config_.path + "'", config_.path);
        }
        loop().watch(listener_.get(), EPOLLIN | EPOLLET, [this](u32) { accept_host(); });
    } catch (...) {
        close_listener();
        throw;
    }
}

void Vsock::close_listener() {
    if (!listener_) return;
    loop().unwatch(listener_.get());
    listener_.reset();
    ::unlink(config_.path.c_str());
}

// On the loop's thread. Whom the process has no descriptor for waits for the next one to come.
void Vsock::accept_host() {
    for (;;) {
        OwnedFd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (!socket) {
            if (errno == EINTR || errno == ECONNABORTED) continue;
            if (errno != EAGAIN && log() != nullptr) {
                log()->note("virtio",
                            name() + ": cannot accept a connection: " + std::strerror(errno));
            }
            break;
        }
        std::lock_guard lock(mutex_);
        VsockConnection* connection = add(std::move(socket), State::kGreeting);
        if (connection != nullptr) read_greeting(*connection, false);
    }
    pump();
}

void Vsock::read_greeting(VsockConnection& connection, bool ended) {
    // No more than the line is taken: what follows is for the guest.
    char line[24];
    const ssize_t got = ::recv(connection.fd(), line, sizeof line, MSG_PEEK);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    const void* end = got > 0 ? std::memchr(line, '\n', static_cast<std::size_t>(got)) : nullptr;
    u32 port = 0;
    if (end == nullptr) {
        if (got <= 0 || got == sizeof line || ended) forget(connection);
        return;
    }
    const auto size = static_cast<std::size_t>(static_cast<const char*>(end) - line + 1);
    if (!parse_greeting({line, size}, port)) return forget(connection);
    (void)!::recv(connection.fd(), line, size, 0);
    request(connection, port);
}

OwnedFd Vsock::connect(u32 port) {
    auto [ours, theirs] = pair();
    if (!ours) throw_errno("cannot make a socket");
    {
        std::lock_guard lock(mutex_);
        VsockConnection* connection = add(std::move(ours), State::kGreeting);
        if (connection != nullptr) request(*connection, port);
    }
    loop().post([this, alive = std::weak_ptr(alive_)] {
        if (auto keep = alive.lock()) pump();
    });
    return std::move(theirs);
}

void Vsock::listen(u32 port, OwnedFd socket) {
    std::lock_guard lock(mutex_);
    auto at = listeners_.find(port);
    if (at != listeners_.end()) {
        // Its other end may be closed, which a listener that nobody called told nobody of.
        char byte;
        if (::recv(at->second.get(), &byte, 1, MSG_DONTWAIT) != 0) {
            throw ConfigError("port", "port " + std::to_string(port) + " of the vsock is taken");
        }
    }
    listeners_[port] = std::move(socket);
}

// The host's end of the guest's connection to `host_port`; nothing: nobody listens there.
OwnedFd Vsock::reach_host(u32 host_port, u32 guest_port) {
    auto at = listeners_.find(host_port);
    if (at != listeners_.end()) {
        auto [ours, theirs] = pair();
        if (ours && pass(at->second, theirs, guest_port)) return std::move(ours);
        if (errno != EPIPE && errno != ECONNRESET) return {};
        listeners_.erase(at);
    }
    sockaddr_un address;
    if (config_.path.empty() ||
        !make_address(config_.path + "_" + std::to_string(host_port), address)) {
        return {};
    }
    OwnedFd socket = unix_socket();
    if (!socket || connect_to(socket, address) != 0) return {};
    return socket;
}

}  // namespace polyvisor::virtio
