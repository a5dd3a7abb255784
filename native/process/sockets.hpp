// Sockets of programs. Those that lead to another program of the same process VM never reach the
// host's names: they are pairs of connected sockets, of which one end waits to be handed to whoever
// they are connected with. That goes for AF_UNIX, and for TCP on loopback addresses, which are the
// process VM's own. With a network, others are sockets of the host.
#pragma once

#include <sys/socket.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/types.hpp"

namespace polyvisor::process {

/// A struct sockaddr, as long as it is.
using SocketAddress = std::vector<u8>;

struct Socket {
    enum class State : u8 { kNew, kListening, kConnected };

    int domain = 0, type = 0, protocol = 0;
    State state = State::kNew;
    bool local = true;
    SocketAddress name, peer;  ///< of a local one; empty: none
    /// Of a local one that is not connected: the other end of its pair. When it listens, what is
    /// written there says that somebody has connected.
    OwnedFd other;
    struct Pending {
        OwnedFd end;
        SocketAddress peer;
    };
    std::deque<Pending> pending;  ///< connections that are not accepted yet
    std::size_t backlog = 0;

    /// 0, or -errno: reading and writing makes no sense.
    s64 check() const;
};

/// Which local socket has which name.
class SocketNames {
  public:
    /// False: somebody else has it.
    bool add(const std::string& name, const std::shared_ptr<Socket>& socket);
    std::shared_ptr<Socket> find(const std::string& name) const;

  private:
    std::map<std::string, std::weak_ptr<Socket>> names_;
};

}  // namespace polyvisor::process
