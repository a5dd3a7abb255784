// What is sent over sockets.
#include <sys/socket.h>
#include <sys/syscall.h>

#include "process/socket_calls.hpp"

namespace polyvisor::process {

namespace {

// The kernel's struct user_msghdr.
struct Message {
    u64 name = 0;
    s32 name_size = 0;
    u32 unused = 0;
    u64 parts = 0, part_count = 0;
    u64 control = 0, control_size = 0;
    u32 flags = 0, unused2 = 0;
};

s64 send(Thread& thread, OpenFile& file, const Message& message, const Buffers& buffers,
         u64 flags) {
    constexpr u64 kFlags = MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE | MSG_EOR;
    const Socket& socket = *file.socket;
    SocketAddress to;
    InternetAddress parsed;
    if (flags & ~kFlags) return -EOPNOTSUPP;
    // Neither open files nor identities are passed on.
    if (message.control_size != 0) return -EPERM;
    if (message.name != 0 && message.name_size != 0) {
        const auto size = static_cast<u64>(message.name_size);
        if (s64 error = load_address(thread, message.name, size, to); error != 0) return error;
        if (socket.type != SOCK_DGRAM) {
            to.clear();  // as Linux does
        } else if (socket.domain == AF_UNIX) {
            return -ECONNREFUSED;
        } else if (!parse_internet(to, socket.domain, parsed)) {
            return -EAFNOSUPPORT;
        } else if (parsed.loopback || socket.local) {
            return parsed.loopback ? -ECONNREFUSED : -ENETUNREACH;
        }
    }
    if (s64 error = socket.check(); error != 0) return error;
    std::vector<iovec> parts;
    const bool waits = !file.nonblocking && !(flags & MSG_DONTWAIT);
    const int host_flags =
        static_cast<int>(flags & (MSG_MORE | MSG_EOR)) | MSG_NOSIGNAL | MSG_DONTWAIT;
    u64 done = 0;
    do {
        const s64 sent = until_done(thread, file, POLLOUT, !waits, [&]() -> s64 {
            if (int error = buffers.host(thread.space(), false, done, parts)) return -error;
            msghdr header{};
            header.msg_name = to.empty() ? nullptr : to.data();
            header.msg_namelen = static_cast<socklen_t>(to.size());
            header.msg_iov = parts.data();
            header.msg_iovlen = std::min<std::size_t>(parts.size(), Buffers::kMostParts);
            return result(::sendmsg(file.fd.get(), &header, host_flags));
        });
        if (sent == -EPIPE && !(flags & MSG_NOSIGNAL)) nobody_reads(thread);
        if (sent < 0) return done != 0 ? static_cast<s64>(done) : sent;
        done += static_cast<u64>(sent);
        if (sent == 0) break;
    } while (waits && socket.type == SOCK_STREAM && done < buffers.size());
    return static_cast<s64>(done);
}

// `from`: who sent it, when the host knows.
s64 receive(Thread& thread, OpenFile& file, const Buffers& buffers, u64 flags, SocketAddress& from,
            u32& flags_out) {
    constexpr u64 kFlags =
        MSG_PEEK | MSG_DONTWAIT | MSG_WAITALL | MSG_TRUNC | MSG_CMSG_CLOEXEC | MSG_NOSIGNAL;
    const Socket& socket = *file.socket;
    if (flags & MSG_ERRQUEUE) return -EAGAIN;
    if (flags & ~kFlags) return -EOPNOTSUPP;
    if (s64 error = socket.check(); error != 0) return error;
    std::vector<iovec> parts;
    const bool waits = !file.nonblocking && !(flags & MSG_DONTWAIT);
    const bool all =
        (flags & MSG_WAITALL) && waits && socket.type == SOCK_STREAM && !(flags & MSG_PEEK);
    const int host_flags = static_cast<int>(flags & (MSG_PEEK | MSG_TRUNC)) | MSG_DONTWAIT;
    u64 done = 0;
    do {
        const s64 got = until_done(thread, file, POLLIN, !waits, [&]() -> s64 {
            if (int error = buffers.host(thread.space(), true, done, parts)) return -error;
            msghdr header{};
            from.assign(kMostAddress, 0);
            header.msg_name = from.data();
            header.msg_namelen = kMostAddress;
            header.msg_iov = parts.data();
            header.msg_iovlen = std::min<std::size_t>(parts.size(), Buffers::kMostParts);
            const s64 size = result(::recvmsg(file.fd.get(), &header, host_flags));
            from.resize(socket.local ? 0 : std::min<std::size_t>(header.msg_namelen, kMostAddress));
            flags_out = static_cast<u32>(header.msg_flags) & (MSG_TRUNC | MSG_EOR);
            return size;
        });
        if (got < 0) return done != 0 ? static_cast<s64>(done) : got;
        done += static_cast<u64>(got);
        if (got == 0) break;
    } while (all && done < buffers.size());
    return static_cast<s64>(done);
}

s64 sys_sendto(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    const Message message{.name = a[4], .name_size = static_cast<s32>(a[5])};
    return send(thread, *file, message, Buffers(a[1], a[2]), static_cast<u32>(a[3]));
}

s64 sys_recvfrom(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    SocketAddress from;
    u32 flags = 0;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    const s64 got =
        receive(thread, *file, Buffers(a[1], a[2]), static_cast<u32>(a[3]), from, flags);
    if (got < 0) return got;
    const s64 error = store_address(thread, from, a[4], a[5]);
    return error != 0 ? error : got;
}

s64 send_message(Thread& thread, OpenFile& file, u64 address, u64 flags) {
    Message message;
    Buffers buffers;
    if (!thread.space().load(address, message)) return -EFAULT;
    if (message.name_size < 0) return -EINVAL;
    if (int error = buffers.load(thread.space(), message.parts, message.part_count)) return -error;
    return send(thread, file, message, buffers, flags);
}

s64 receive_message(Thread& thread, OpenFile& file, u64 address, u64 flags) {
    Message message;
    Buffers buffers;
    SocketAddress from;
    if (!thread.space().load(address, message)) return -EFAULT;
    if (int error = buffers.load(thread.space(), message.parts, message.part_count)) return -error;
    const s64 got = receive(thread, file, buffers, flags, from, message.flags);
    if (got < 0) return got;
    if (message.name != 0) {
        const auto room = static_cast<std::size_t>(std::max(message.name_size, 0));
        const auto part = std::span(from).first(std::min(from.size(), room));
        if (!thread.space().copy_out(message.name, part)) return -EFAULT;
        message.name_size = static_cast<s32>(from.size());
    }
    message.control_size = 0;
    return thread.space().store(address, message) ? got : -EFAULT;
}

s64 sys_sendmsg(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    return send_message(thread, *file, a[1], static_cast<u32>(a[2]));
}

s64 sys_recvmsg(Thread& thread, const Arguments& a) {
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    return receive_message(thread, *file, a[1], static_cast<u32>(a[2]));
}

// An array of struct mmsghdr: a message, and how long it was.
template <bool sending>
s64 sys_messages(Thread& thread, const Arguments& a) {
    constexpr u64 kStep = 64, kMost = 1024;
    std::shared_ptr<OpenFile> file;
    if (s64 error = socket_of(thread, a[0], file); error != 0) return error;
    u64 flags = static_cast<u32>(a[3]) & ~u64{MSG_WAITFORONE};
    s64 done = 0;
    for (const u64 count = std::min<u64>(static_cast<u32>(a[2]), kMost);
         static_cast<u64>(done) < count; ++done) {
        const u64 at = a[1] + kStep * static_cast<u64>(done);
        const s64 size = sending ? send_message(thread, *file, at, flags)
                                 : receive_message(thread, *file, at, flags);
        if (size < 0) return done != 0 ? done : size;
        if (!thread.space().store(at + sizeof(Message), static_cast<u32>(size))) return -EFAULT;
        if (a[3] & MSG_WAITFORONE) flags |= MSG_DONTWAIT;
    }
    return done;
}

constexpr Call kCalls[] = {
    {SYS_sendto, sys_sendto},           {SYS_recvfrom, sys_recvfrom},
    {SYS_sendmsg, sys_sendmsg},         {SYS_recvmsg, sys_recvmsg},
    {SYS_sendmmsg, sys_messages<true>}, {SYS_recvmmsg, sys_messages<false>},
};

}  // namespace

std::span<const Call> message_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
