// A filter around the monitor itself: a thread that runs a program may make the host's system calls
// that serving it takes, and no others, whatever a mistake in the monitor lets a program do.
//
// It holds for one thread and those that it starts (seccomp without TSYNC), so that the Python
// program around it is as free as before. What is refused fails with kRefused, which no call has
// otherwise, so that a call that is missing in the list is seen and not taken for a program's
// error.
#pragma once

#include <cerrno>

namespace polyvisor::process {

struct Confinement {
    bool network = false;  ///< sockets may be made and connected
    bool kvm = true;       ///< requests to KVM
    bool operator==(const Confinement&) const = default;
};

/// errno of what the filter refuses.
inline constexpr int kRefused = EHWPOISON;

/// Confines the calling thread, for ever; a thread that is confined stays as it is. Throws
/// HostError where the host's kernel has no seccomp filters, or does not let them be used.
void confine_this_thread(const Confinement& confinement);

}  // namespace polyvisor::process
