// Addresses of sockets, as programs give and get them.
#pragma once

#include <netinet/in.h>

#include <cstring>
#include <string>

#include "process/sockets.hpp"
#include "process/thread.hpp"

namespace polyvisor::process {

inline constexpr std::size_t kMostAddress = sizeof(sockaddr_storage);

template <class T>
SocketAddress bytes_of(const T& address) {
    const u8* start = reinterpret_cast<const u8*>(&address);
    return SocketAddress(start, start + sizeof address);
}

template <class T>
T as(const SocketAddress& address) {
    T result{};
    std::memcpy(&result, address.data(), std::min(address.size(), sizeof result));
    return result;
}

int family_of(const SocketAddress& address);
/// 0 or -errno.
s64 load_address(Thread& thread, u64 at, u64 size, SocketAddress& address);
/// Cut to the room that there is; the size is what it would take: 0 or -errno.
s64 store_address(Thread& thread, const SocketAddress& address, u64 at, u64 size_at);

/// An address of the Internet: its port, and whether it means this machine.
struct InternetAddress {
    u16 port = 0;
    bool loopback = false, any = false;
};

/// False: it is none of this family.
bool parse_internet(const SocketAddress& address, int domain, InternetAddress& parsed);
SocketAddress with_port(SocketAddress address, u16 port);
SocketAddress loopback_address(int domain, u16 port);
/// What a socket without a name says that it is called.
SocketAddress unnamed_address(int domain);

/// The name by which SocketNames knows a port.
std::string port_name(int domain, int type, u16 port);
/// The one by which it knows a path of the tree: the file's, whatever it is called. An errno.
int socket_file_name(int folder, const char* path, int flags, std::string& name);
/// What sun_path says: the bytes of an abstract name (which begin with 0), or a path.
std::string unix_path(const SocketAddress& address);

}  // namespace polyvisor::process
