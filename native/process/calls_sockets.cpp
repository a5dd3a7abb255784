// Sockets: how they are made, and get their names.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdio>

#include "process/paths.hpp"
#include "process/socket_calls.hpp"

namespace polyvisor::process {

namespace {

using State = Socket::State;
constexpr u64 kMostBacklog = 128;

// --- Making them ---------------------------------------------------------------------------------

s64 sys_socket(Thread& thread, const Arguments& a) {
    const int domain = static_cast<s32>(a[0]),
              type = static_cast<int>(a[1] & ~kMakeSocketFlags & 0xff);
    if (domain != AF_UNIX && domain != AF_INET && domain != AF_INET6) return -EAFNOSUPPORT;
    if (type != SOCK_STREAM && type != SOCK_DGRAM &&
        !(type == SOCK_SEQPACKET && domain == AF_UNIX)) {
        return type == SOCK_RAW && domain != AF_UNIX ? -EPERM : -ESOCKTNOSUPPORT;
    }
    if (a[1] & ~kMakeSocketFlags & ~u64{0xff}) return -EINVAL;
    auto socket = std::make_shared<Socket>();
    socket->domain = domain;
    socket->type = type;
    socket->protocol = static_cast<s32>(a[2]);
    socket->local = domain == AF_UNIX || !thread.kernel().config().network;
    OwnedFd ends[2];
    if (socket->local) {
        if (int error = socket_pair(type, ends)) return -error;
        socket->other = std::move(ends[1]);
    } else {
        ends[0] = OwnedFd(::socket(domain, type | SOCK_NONBLOCK | SOCK_CLOEXEC, socket->protocol));
        if (!ends[0]) return -errno;
    }
    return thread.descriptors().add(
        socket_file(std::move(ends[0]), std::move(socket), a[1] & SOCK_NONBLOCK),
        a[1] & SOCK_CLOEXEC);
}

s64 sys_socketpair(Thread& thread, const Arguments& a) {
    const int type = static_cast<int>(a[1] & ~kMakeSocketFlags);
    if (static_cast<s32>(a[0]) != AF_UNIX) return -EOPNOTSUPP;
    if (type != SOCK_STREAM && type != SOCK_DGRAM && type != SOCK_SEQPACKET) {
        return -ESOCKTNOSUPPORT;
    }
    if (a[2] != 0 && a[2] != AF_UNIX) return -EPROTONOSUPPORT;
    OwnedFd ends[2];
    if (int error = socket_pair(type, ends)) return -error;
    const bool nonblocking = a[1] & SOCK_NONBLOCK;
    return add_pair(thread, a[3],
                    socket_file(std::move(ends[0]), connected_socket(AF_UNIX, type), nonblocking),
                    socket_file(std::move(ends[1]), connected_socket(AF_UNIX, type), nonblocking),
                    a[1] & SOCK_CLOEXEC);
}

// --- Names ---------------------------------------------------------------------------------------

s64 bind_path(Thread& thread, const std::shared_ptr<Socket>& socket, const std::string& path) {
    Tree::Place place;
    std::string name;
    if (int error = locate(thread, AT_FDCWD, path, Tree::kStay, place)) return -error;
    if (place.exists()) return -EADDRINUSE;
    if (!place.writable) return -EROFS;
    if (!thread.kernel().take_writes(kNameBytes)) return -EDQUOT;
    // For others it is a socket that nobody listens at.
    const mode_t mode = S_IFSOCK | (0777 & ~thread.process().umask);
    if (::mknodat(place.parent->get(), place.name.c_str(), mode, 0) != 0) {
        return errno == EEXIST ? -EADDRINUSE : -errno;
    }
    if (int error =
            socket_file_name(place.parent->get(), place.name.c_str(), AT_SYMLINK_NOFOLLOW, name)) {
        return -error;
    }
    return thread.kernel().socket_names.add(name, socket) ? 0 : -EADDRINUSE;
}

s64 bind_unix(Thread& thread, const std::shared_ptr<Socket>& socket, SocketAddress& address) {
    if (family_of(address) != AF_UNIX || address.size() > sizeof(sockaddr_un)) return -EINVAL;
    if (socket->type == SOCK_DGRAM) return -EOPNOTSUPP;
    std::string path = unix_path(address);
    SocketNames& names = thread.kernel().socket_names;
    if (!path.empty() && path.front() != '\0') return bind_path(thread, socket, path);
    for (u32 number = 0; path.empty(); ++number) {  // a name that is free
        char text[8];
        std::snprintf(text, sizeof text, "%c%05x", 0, number & 0xfffff);
        if (names.find("abstract:" + std::string(text, 6))) continue;
        path.assign(text, 6);
        address.insert(address.end(), path.begin(), path.end());
    }
    return names.add("abstract:" + path, socket) ? 0 : -EADDRINUSE;
}

s64 sys_bind(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    SocketAddress address;
    InternetAddress parsed;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    if (s64 error = load_address(thread, a[1], a[2], address); error != 0) return error;
    const auto socket = file->socket;
    if (!socket->name.empty()) return -EINVAL;
    s64 error = 0;
    if (socket->domain == AF_UNIX) {
        error = bind_unix(thread, socket, address);
    } else if (!parse_internet(address, socket->domain, parsed)) {
        return family_of(address) == socket->domain ? -EINVAL : -EAFNOSUPPORT;
    } else if (!socket->local && (!parsed.loopback || parsed.any)) {
        return result(::bind(file->fd.get(), reinterpret_cast<sockaddr*>(address.data()),
                             static_cast<socklen_t>(address.size())));
    } else if (!parsed.loopback) {
        return -EADDRNOTAVAIL;
    } else if (error = make_local(*file); error == 0) {
        error = bind_port(thread, socket, address, parsed);
    }
    if (error == 0) socket->name = address;
    return error;
}

s64 sys_listen(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    const auto socket = file->socket;
    const auto backlog = std::min<u64>(static_cast<u32>(a[1]), kMostBacklog);
    if (!socket->local) return result(::listen(file->fd.get(), static_cast<int>(backlog)));
    if (socket->type == SOCK_DGRAM) return -EOPNOTSUPP;
    if (socket->state == State::kConnected) return -EINVAL;
    if (socket->name.empty()) {
        if (socket->domain == AF_UNIX) return -EINVAL;
        SocketAddress address = loopback_address(socket->domain, 0);
        if (s64 error = bind_port(thread, socket, address, {}); error != 0) return error;
        socket->name = address;
    }
    socket->state = State::kListening;
    socket->backlog = backlog + 1;
    return 0;
}

using HostName = int (*)(int, sockaddr*, socklen_t*);

s64 name_of(Thread& thread, const Arguments& a, bool peer, HostName host) {
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    const Socket& socket = *file->socket;
    SocketAddress address = peer ? socket.peer : socket.name;
    if (!socket.local) {
        socklen_t size = kMostAddress;
        address.assign(size, 0);
        if (host(file->fd.get(), reinterpret_cast<sockaddr*>(address.data()), &size) != 0) {
            return -errno;
        }
        address.resize(std::min<std::size_t>(size, kMostAddress));
    } else if (peer && socket.state != State::kConnected) {
        return -ENOTCONN;
    } else if (address.empty()) {
        address = unnamed_address(socket.domain);
    }
    return a[1] == 0 ? -EFAULT : store_address(thread, address, a[1], a[2]);
}

s64 sys_getsockname(Thread& thread, const Arguments& a) {
    return name_of(thread, a, false, ::getsockname);
}

s64 sys_getpeername(Thread& thread, const Arguments& a) {
    return name_of(thread, a, true, ::getpeername);
}

constexpr Call kCalls[] = {
    {SYS_socket, sys_socket},
    {SYS_socketpair, sys_socketpair},
    {SYS_bind, sys_bind},
    {SYS_listen, sys_listen},
    {SYS_getsockname, sys_getsockname},
    {SYS_getpeername, sys_getpeername},
};

}  // namespace

std::span<const Call> socket_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
