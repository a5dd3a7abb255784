// The system calls that are served, in the files calls_*.cpp, each by topic.
#pragma once

#include <array>
#include <cerrno>
#include <span>

#include "process/thread.hpp"

namespace polyvisor::process {

/// The result, or -errno.
using Handler = s64 (*)(Thread&, const Arguments&);
struct Call {
    u32 number;
    Handler handler;
};

/// Whether one of the files has this call; others are ENOSYS.
bool is_served(u32 number);

std::span<const Call> memory_calls();
std::span<const Call> file_calls();
std::span<const Call> copy_calls();
std::span<const Call> descriptor_calls();
std::span<const Call> open_calls();
std::span<const Call> lookup_calls();
std::span<const Call> name_calls();
std::span<const Call> attribute_calls();
std::span<const Call> event_calls();
std::span<const Call> socket_calls();
std::span<const Call> connection_calls();
std::span<const Call> socket_option_calls();
std::span<const Call> message_calls();
std::span<const Call> process_calls();
std::span<const Call> task_calls();
std::span<const Call> time_calls();
std::span<const Call> signal_calls();
std::span<const Call> timer_calls();

}  // namespace polyvisor::process
