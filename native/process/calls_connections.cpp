// Connections between sockets.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "process/paths.hpp"
#include "process/socket_calls.hpp"

namespace polyvisor::process {

namespace {

using State = Socket::State;

// Who listens at an address of the process VM: 0 or -errno.
s64 find_listener(Thread& thread, const Socket& socket, const SocketAddress& address,
                  std::shared_ptr<Socket>& listener) {
    const SocketNames& names = thread.kernel().socket_names;
    InternetAddress parsed;
    std::string name;
    if (socket.domain != AF_UNIX) {
        if (!parse_internet(address, socket.domain, parsed)) return -EAFNOSUPPORT;
        if (!parsed.loopback) return -ENETUNREACH;
        listener = names.find(port_name(socket.domain, socket.type, parsed.port));
        if (!listener && socket.domain == AF_INET) {  // IPv6's "any" is IPv4's, too
            listener = names.find(port_name(AF_INET6, socket.type, parsed.port));
            if (listener && !(parse_internet(listener->name, AF_INET6, parsed) && parsed.any)) {
                listener.reset();
            }
        }
    } else {
        if (family_of(address) != AF_UNIX || address.size() > sizeof(sockaddr_un)) return -EINVAL;
        const std::string path = unix_path(address);
        if (path.empty()) return -ECONNREFUSED;
        if (path.front() == '\0') {
            name = "abstract:" + path;
        } else {
            Tree::Place place;
            if (int error = locate(thread, AT_FDCWD, path, Tree::kFollow, place)) return -error;
            if (!place.exists()) return -ENOENT;
            if (!place.file) return -ECONNREFUSED;
            if (int error = socket_file_name(place.file->get(), "", AT_EMPTY_PATH, name))
                return -error;
        }
        listener = names.find(name);
    }
    if (!listener || listener->state != State::kListening) return -ECONNREFUSED;
    return listener->type == socket.type ? 0 : -EPROTOTYPE;
}

s64 connect_local(Thread& thread, OpenFile& file, const SocketAddress& address) {
    const auto socket = file.socket;
    if (socket->state == State::kConnected) return -EISCONN;
    if (socket->state == State::kListening) return -EINVAL;
    auto attempt = [&]() -> s64 {
        std::shared_ptr<Socket> listener;
        if (s64 error = find_listener(thread, *socket, address, listener); error != 0) return error;
        if (listener->pending.size() >= listener->backlog) return -EAGAIN;
        if (socket->domain != AF_UNIX && socket->name.empty()) {
            SocketAddress own = loopback_address(socket->domain, 0);
            if (s64 error = bind_port(thread, socket, own, {}); error != 0) return error;
            socket->name = own;
        }
        const u8 one = 1;
        if (::write(listener->other.get(), &one, 1) != 1) return -ECONNREFUSED;
        listener->pending.push_back({std::move(socket->other), socket->name});
        socket->peer = listener->name;
        socket->state = State::kConnected;
        return 0;
    };
    return file.nonblocking ? attempt() : until_granted(thread, attempt);
}

// Without the lock while the other side takes its time. A call that is interrupted goes on in the
// background.
s64 connect_host(Thread& thread, OpenFile& file, const SocketAddress& address) {
    const int fd = file.fd.get();
    if (::connect(fd, reinterpret_cast<const sockaddr*>(address.data()),
                  static_cast<socklen_t>(address.size())) == 0) {
        return 0;
    }
    if (errno != EINPROGRESS || file.nonblocking) return -errno;
    if (!thread.wait(fd, POLLOUT, Thread::kForever)) return -EINTR;
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    return -error;
}

s64 sys_connect(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    SocketAddress address;
    InternetAddress parsed;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    if (s64 error = load_address(thread, a[1], a[2], address); error != 0) return error;
    if (!file->socket->local && family_of(address) != AF_UNSPEC) {
        if (!parse_internet(address, file->socket->domain, parsed)) return -EAFNOSUPPORT;
        if (!parsed.loopback) return connect_host(thread, *file, address);
        if (file->socket->type == SOCK_DGRAM) return -ECONNREFUSED;
        if (s64 error = make_local(*file); error != 0) return error;
    }
    return file->socket->local ? connect_local(thread, *file, address)
                               : connect_host(thread, *file, address);
}

s64 accept_from(Thread& thread, u64 number, u64 address, u64 size, u64 flags) {
    std::shared_ptr<OpenFile> file;
    if (flags & ~kMakeSocketFlags) return -EINVAL;
    if (s64 error = socket_of(thread, number, file); error != 0) return error;
    const auto socket = file->socket;
    if (socket->local && socket->type == SOCK_DGRAM) return -EOPNOTSUPP;
    OwnedFd end;
    auto made = connected_socket(socket->domain, socket->type);
    made->protocol = socket->protocol;
    made->local = socket->local;
    const s64 error = until_done(thread, *file, POLLIN, file->nonblocking, [&]() -> s64 {
        if (!socket->local) {
            sockaddr_storage peer{};
            socklen_t room = sizeof peer;
            end = OwnedFd(::accept4(file->fd.get(), reinterpret_cast<sockaddr*>(&peer), &room,
                                    SOCK_NONBLOCK | SOCK_CLOEXEC));
            made->peer = bytes_of(peer);
            made->peer.resize(std::min<std::size_t>(room, sizeof peer));
            return end ? 0 : -errno;
        }
        if (socket->state != State::kListening) return -EINVAL;
        if (socket->pending.empty()) return -EAGAIN;
        u8 one;
        (void)!::read(file->fd.get(), &one, 1);
        end = std::move(socket->pending.front().end);
        made->peer = std::move(socket->pending.front().peer);
        made->name = socket->name;
        socket->pending.pop_front();
        return 0;
    });
    if (error != 0) return error;
    const SocketAddress peer = made->peer.empty() ? unnamed_address(made->domain) : made->peer;
    const s64 descriptor = thread.descriptors().add(
        socket_file(std::move(end), std::move(made), flags & SOCK_NONBLOCK), flags & SOCK_CLOEXEC);
    if (descriptor < 0) return descriptor;
    if (s64 bad = store_address(thread, peer, address, size); bad != 0) {
        thread.descriptors().close(static_cast<u64>(descriptor));
        return bad;
    }
    return descriptor;
}

s64 sys_accept(Thread& thread, const Arguments& a) {
    return accept_from(thread, a[0], a[1], a[2], 0);
}

s64 sys_accept4(Thread& thread, const Arguments& a) {
    return accept_from(thread, a[0], a[1], a[2], a[3]);
}

s64 sys_shutdown(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    Socket& socket = *file->socket;
    if (a[1] > SHUT_RDWR) return -EINVAL;
    if (socket.local && socket.state == State::kNew) return -ENOTCONN;
    if (socket.local && socket.state == State::kListening) {  // who waits in accept() is told
        socket.state = State::kNew;
        socket.pending.clear();
    }
    return result(::shutdown(file->fd.get(), static_cast<int>(a[1])));
}

constexpr Call kCalls[] = {
    {SYS_connect, sys_connect},
    {SYS_accept, sys_accept},
    {SYS_accept4, sys_accept4},
    {SYS_shutdown, sys_shutdown},
};

}  // namespace

std::span<const Call> connection_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
