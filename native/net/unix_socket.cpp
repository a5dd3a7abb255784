#include "net/unix_socket.hpp"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::net {

namespace {

sockaddr_un address_of(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof address.sun_path) {
        throw ConfigError("socket", "'" + path + "' cannot be a socket's path, which has 1 to " +
                                        std::to_string(sizeof address.sun_path - 1) + " bytes");
    }
    std::memcpy(address.sun_path, path.data(), path.size());
    return address;
}

OwnedFd make(int type) {
    OwnedFd fd(::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) throw_errno("cannot make a socket");
    return fd;
}

int try_connect(int fd, const sockaddr_un& address) {
    const auto* to = reinterpret_cast<const sockaddr*>(&address);
    return ::connect(fd, to, sizeof address) == 0 ? 0 : errno;
}

}  // namespace

OwnedFd bind_unix(const std::string& path, int type) {
    const sockaddr_un address = address_of(path);
    const auto* to = reinterpret_cast<const sockaddr*>(&address);
    OwnedFd fd = make(type);
    int result = ::bind(fd.get(), to, sizeof address);
    if (result != 0 && errno == EADDRINUSE &&
        try_connect(make(type).get(), address) == ECONNREFUSED) {
        ::unlink(path.c_str());
        result = ::bind(fd.get(), to, sizeof address);
    } else if (result != 0 && errno != EADDRINUSE) {
        throw_errno("cannot make the socket '" + path + "'", path);
    }
    if (result != 0) {
        throw HostError(EADDRINUSE, path, "the socket '" + path + "' is in use by another program");
    }
    return fd;
}

OwnedFd connect_unix(const std::string& path, int type) {
    OwnedFd fd = make(type);
    const int error = try_connect(fd.get(), address_of(path));
    if (error != 0) {
        throw HostError(error, path,
                        "cannot connect to the socket '" + path + "': " + std::strerror(error));
    }
    return fd;
}

}  // namespace polyvisor::net
