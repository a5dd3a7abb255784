// The control socket, init's side.
#pragma once

#include "host/init/root.hpp"

namespace polyvisor::host::init {

constexpr unsigned kMaxFds = 64;

struct Received {
    Message message;
    int fds[kMaxFds];
    unsigned fd_count;
};

/// Waits for the launcher's message; ends this process if the launcher has ended.
Received receive_message();

/// A descriptor to the launcher.
void send_terminal(int fd);

}  // namespace polyvisor::host::init
