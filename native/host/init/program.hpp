// The program itself: terminal, credentials, limits, system call filter, execve().
#pragma once

#include "host/init/root.hpp"

namespace polyvisor::host::init {

/// Makes a terminal of the /dev/pts that is there and sends its master to the launcher; the slave,
/// or -1 if none is wanted.
int open_terminal(const Message& message);

/// Becomes whom the set-up needs: a user that exists in the user namespace.
void become_setup_user(const Wire& wire);

/// Executes the program in this process; fail() if it cannot. `terminal` is open_terminal()'s.
[[noreturn]] void execute(const Message& message, int terminal);

/// The permitted ones of this process.
u64 all_capabilities();

/// Of a signal, whatever the launcher's process does with it.
void default_action(int signal);

/// What is left of init's own rights: to send signals.
void drop_rights();

}  // namespace polyvisor::host::init
