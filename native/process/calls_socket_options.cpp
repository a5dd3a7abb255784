// What a program may set of its sockets, and be told.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include "process/socket_calls.hpp"

namespace polyvisor::process {

namespace {

// What a program may set, and be told: the sockets of the host alone have all of them.
bool known_option(int level, int option) {
    switch (level) {
        case SOL_SOCKET:
            return option == SO_REUSEADDR || option == SO_REUSEPORT || option == SO_KEEPALIVE ||
                   option == SO_BROADCAST || option == SO_LINGER || option == SO_SNDBUF ||
                   option == SO_RCVBUF || option == SO_OOBINLINE || option == SO_PRIORITY;
        case IPPROTO_TCP:
            return option == TCP_NODELAY || option == TCP_KEEPIDLE || option == TCP_KEEPINTVL ||
                   option == TCP_KEEPCNT || option == TCP_USER_TIMEOUT || option == TCP_CORK ||
                   option == TCP_QUICKACK || option == TCP_DEFER_ACCEPT;
        case IPPROTO_IPV6:
            return option == IPV6_V6ONLY || option == IPV6_RECVERR || option == IPV6_TCLASS;
        case IPPROTO_IP:
            return option == IP_TOS || option == IP_RECVERR || option == IP_TTL;
        default:
            return false;
    }
}

s64 sys_setsockopt(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    u8 value[16];
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    const int level = static_cast<s32>(a[1]), option = static_cast<s32>(a[2]);
    const auto size = static_cast<u32>(a[4]);
    if (!known_option(level, option)) return -ENOPROTOOPT;
    if (size < sizeof(int) || size > sizeof value) return -EINVAL;
    if (!thread.space().copy_in(a[3], {value, size})) return -EFAULT;
    if (file->socket->local) return 0;  // it makes no difference between two ends in one machine
    return result(::setsockopt(file->fd.get(), level, option, value, size));
}

s64 sys_getsockopt(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    u32 room = 0;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    if (!thread.space().load(a[4], room)) return -EFAULT;
    const Socket& socket = *file->socket;
    const int level = static_cast<s32>(a[1]), option = static_cast<s32>(a[2]);
    int values[4]{};
    socklen_t size = sizeof(int);
    if (level == SOL_SOCKET && option == SO_TYPE) {
        values[0] = socket.type;
    } else if (level == SOL_SOCKET && option == SO_DOMAIN) {
        values[0] = socket.domain;
    } else if (level == SOL_SOCKET && option == SO_PROTOCOL) {
        values[0] = socket.protocol;
    } else if (level == SOL_SOCKET && option == SO_ACCEPTCONN && socket.local) {
        values[0] = socket.state == Socket::State::kListening;
    } else if (level == SOL_SOCKET && option == SO_PEERCRED && socket.domain == AF_UNIX) {
        values[0] = thread.process().pid;  // somebody of this process VM, all of whom are root
        size = 3 * sizeof(int);
    } else if (level == SOL_SOCKET && (option == SO_ERROR || option == SO_SNDBUF ||
                                       option == SO_RCVBUF || option == SO_ACCEPTCONN)) {
        if (::getsockopt(file->fd.get(), level, option, values, &size) != 0) return -errno;
    } else if (!known_option(level, option)) {
        return -ENOPROTOOPT;
    } else if (!socket.local) {
        size = sizeof values;
        if (::getsockopt(file->fd.get(), level, option, values, &size) != 0) return -errno;
    }
    size = std::min<socklen_t>(size, room);
    const std::span<const u8> bytes(reinterpret_cast<const u8*>(values), size);
    return thread.space().copy_out(a[3], bytes) && thread.space().store(a[4], u32{size}) ? 0
                                                                                         : -EFAULT;
}

constexpr Call kCalls[] = {
    {SYS_setsockopt, sys_setsockopt},
    {SYS_getsockopt, sys_getsockopt},
};

}  // namespace

std::span<const Call> socket_option_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
