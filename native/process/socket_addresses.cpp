#include "process/socket_addresses.hpp"

#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>

namespace polyvisor::process {

int family_of(const SocketAddress& address) {
    return as<sa_family_t>(address);
}

s64 load_address(Thread& thread, u64 at, u64 size, SocketAddress& address) {
    if (size < sizeof(sa_family_t) || size > kMostAddress) return -EINVAL;
    address.resize(size);
    return thread.space().copy_in(at, address) ? 0 : -EFAULT;
}

s64 store_address(Thread& thread, const SocketAddress& address, u64 at, u64 size_at) {
    s32 room = 0;
    if (at == 0) return 0;
    if (!thread.space().load(size_at, room)) return -EFAULT;
    if (room < 0) return -EINVAL;
    const auto part = std::span(address).first(std::min<std::size_t>(address.size(), room));
    const bool good = thread.space().copy_out(at, part) &&
                      thread.space().store(size_at, static_cast<s32>(address.size()));
    return good ? 0 : -EFAULT;
}

bool parse_internet(const SocketAddress& address, int domain, InternetAddress& parsed) {
    if (family_of(address) != domain) return false;
    if (domain == AF_INET) {
        if (address.size() < sizeof(sockaddr_in)) return false;
        const auto v4 = as<sockaddr_in>(address);
        const u32 host = ntohl(v4.sin_addr.s_addr);
        parsed = {ntohs(v4.sin_port), host >> 24 == 127 || host == 0, host == 0};
        return true;
    }
    if (address.size() < sizeof(sockaddr_in6)) return false;
    const auto v6 = as<sockaddr_in6>(address);
    const bool mapped = IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr);
    const u8 first = v6.sin6_addr.s6_addr[12];
    const bool any = IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr) ||
                     (mapped && std::memcmp(v6.sin6_addr.s6_addr + 12, "\0\0\0\0", 4) == 0);
    parsed = {ntohs(v6.sin6_port),
              any || IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr) || (mapped && first == 127), any};
    return true;
}

SocketAddress with_port(SocketAddress address, u16 port) {
    // At the same place in both families.
    static_assert(offsetof(sockaddr_in, sin_port) == offsetof(sockaddr_in6, sin6_port));
    const u16 value = htons(port);
    std::memcpy(address.data() + offsetof(sockaddr_in, sin_port), &value, sizeof value);
    return address;
}

SocketAddress loopback_address(int domain, u16 port) {
    if (domain == AF_INET) {
        sockaddr_in v4{};
        v4.sin_family = AF_INET;
        v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        return with_port(bytes_of(v4), port);
    }
    sockaddr_in6 v6{};
    v6.sin6_family = AF_INET6;
    v6.sin6_addr = in6addr_loopback;
    return with_port(bytes_of(v6), port);
}

SocketAddress unnamed_address(int domain) {
    if (domain != AF_UNIX) return loopback_address(domain, 0);
    return bytes_of(static_cast<sa_family_t>(domain));
}

std::string port_name(int domain, int type, u16 port) {
    return (domain == AF_INET ? "inet:" : "inet6:") + std::to_string(type) + ":" +
           std::to_string(port);
}

int socket_file_name(int folder, const char* path, int flags, std::string& name) {
    struct stat about{};
    if (::fstatat(folder, path, &about, flags) != 0) return errno;
    if (!S_ISSOCK(about.st_mode)) return ECONNREFUSED;
    name = "file:" + std::to_string(about.st_dev) + ":" + std::to_string(about.st_ino);
    return 0;
}

std::string unix_path(const SocketAddress& address) {
    std::string path(address.begin() + offsetof(sockaddr_un, sun_path), address.end());
    if (path.empty() || path.front() == '\0') return path;
    return path.substr(0, path.find('\0'));
}

}  // namespace polyvisor::process
