#include "process/sockets.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "process/socket_calls.hpp"

namespace polyvisor::process {

s64 Socket::check() const {
    if (!local || state == State::kConnected) return 0;
    return type == SOCK_DGRAM ? -EDESTADDRREQ : -ENOTCONN;
}

bool SocketNames::add(const std::string& name, const std::shared_ptr<Socket>& socket) {
    std::erase_if(names_, [](const auto& entry) { return entry.second.expired(); });
    return names_.emplace(name, socket).second;
}

std::shared_ptr<Socket> SocketNames::find(const std::string& name) const {
    const auto found = names_.find(name);
    return found == names_.end() ? nullptr : found->second.lock();
}

// --- Making them ---------------------------------------------------------------------------------

std::shared_ptr<OpenFile> socket_file(OwnedFd fd, std::shared_ptr<Socket> socket,
                                      bool nonblocking) {
    auto file = make_stream(std::move(fd), "socket:", nonblocking);
    file->socket = std::move(socket);
    return file;
}

std::shared_ptr<Socket> connected_socket(int domain, int type) {
    auto socket = std::make_shared<Socket>();
    socket->domain = domain;
    socket->type = type;
    socket->state = Socket::State::kConnected;
    return socket;
}

int socket_pair(int type, OwnedFd (&ends)[2]) {
    int fds[2];
    if (::socketpair(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) != 0) return errno;
    ends[0] = OwnedFd(fds[0]);
    ends[1] = OwnedFd(fds[1]);
    return 0;
}

s64 make_local(OpenFile& file) {
    Socket& socket = *file.socket;
    OwnedFd ends[2];
    if (socket.local) return 0;
    if (int error = socket_pair(socket.type, ends)) return -error;
    if (::dup3(ends[0].get(), file.fd.get(), O_CLOEXEC) < 0) return -errno;
    socket.other = std::move(ends[1]);
    socket.local = true;
    return 0;
}

s64 socket_of(Thread& thread, u64 number, std::shared_ptr<OpenFile>& file) {
    file = file_of(thread, number);
    if (!file) return -EBADF;
    return file->socket ? 0 : -ENOTSOCK;
}

s64 bind_port(Thread& thread, const std::shared_ptr<Socket>& socket, SocketAddress& address,
              InternetAddress parsed) {
    constexpr u16 kFirst = 32768, kLast = 60999;
    SocketNames& names = thread.kernel().socket_names;
    for (u16 port = kFirst; parsed.port == 0 && port <= kLast; ++port) {
        if (!names.find(port_name(socket->domain, socket->type, port))) parsed.port = port;
    }
    address = with_port(address, parsed.port);
    return names.add(port_name(socket->domain, socket->type, parsed.port), socket) ? 0
                                                                                   : -EADDRINUSE;
}

}  // namespace polyvisor::process
