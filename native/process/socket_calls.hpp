// What the system calls on sockets have in common.
#pragma once

#include "process/socket_addresses.hpp"
#include "process/transfer.hpp"

namespace polyvisor::process {

inline constexpr u64 kMakeSocketFlags = SOCK_NONBLOCK | SOCK_CLOEXEC;

std::shared_ptr<OpenFile> socket_file(OwnedFd fd, std::shared_ptr<Socket> socket, bool nonblocking);
/// A local one, of a pair.
std::shared_ptr<Socket> connected_socket(int domain, int type);
/// Two of the host's that are connected: an errno.
int socket_pair(int type, OwnedFd (&ends)[2]);
/// A socket of the host that turns out to be meant for this machine, which is the process VM: 0 or
/// -errno.
s64 make_local(OpenFile& file);
/// The open file of a socket: 0 or -errno.
s64 socket_of(Thread& thread, u64 number, std::shared_ptr<OpenFile>& file);
/// Gives a local socket the port of `address`, or (0) one that is free: 0 or -errno.
s64 bind_port(Thread& thread, const std::shared_ptr<Socket>& socket, SocketAddress& address,
              InternetAddress parsed);

}  // namespace polyvisor::process
