// A record of a program's system calls, exceptions and ends: lines as strace prints them, or as
// JSON, and events for a program to look at.
#pragma once

#include <signal.h>

#include <deque>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "process/observer.hpp"

namespace polyvisor::process {

class Process;

struct Event {
    enum class Kind : u8 { kCall, kSignal, kEnd };
    Kind kind = Kind::kCall;
    int pid = 0, tid = 0;
    u64 start = 0, nanoseconds = 0;  ///< since the trace began, and how long it took
    // kCall
    u32 number = 0;
    Arguments arguments{};
    std::vector<std::string> texts{};  ///< of the arguments, as strace has them
    /// Arguments that are paths, whole: their numbers and bytes.
    std::vector<std::pair<unsigned, std::string>> strings{};
    bool finished = false;  ///< false: the thread ended within it, and there is no result
    s64 result = 0;
    // kSignal: "SIGSEGV {si_signo=SIGSEGV, ...}"; kEnd: "exited with 3", "killed by SIGKILL"
    std::string text{};

    /// As strace has it, without the number of the process.
    std::string line() const;
    std::string json() const;
    /// Bytes of memory that it takes, about.
    std::size_t size() const;
};

struct TraceConfig {
    OwnedFd fd{};            ///< where lines go; none: nowhere
    bool json = false;       ///< a JSON object for each event instead of a line
    std::size_t events = 0;  ///< how many are kept for take()
};

/// Used with the kernel's lock.
class Trace {
  public:
    /// Bytes that events which are kept may take together, about.
    static constexpr std::size_t kMostBytes = 64 << 20;

    explicit Trace(TraceConfig config);

    /// A call begins: its arguments are what they are now.
    Event enter(Thread& thread, u32 number, const Arguments& arguments);
    /// ... and ends, or its thread does. Times in ns of CLOCK_MONOTONIC.
    void leave(Thread& thread, Event event, s64 result, u64 begin, u64 took);
    /// A signal or an exception, that the thread is about to see.
    void signal(Thread& thread, const siginfo_t& info);
    void end(Thread& last, const Process& process);

    /// The events that were kept since the last time.
    std::deque<Event> take();
    /// Events that were dropped as there were too many, and lines that nobody read in time.
    u64 lost() const { return lost_; }

  private:
    void add(Thread& thread, Event event);
    void write(Thread& thread, const std::string& text);
    u64 since_begin(u64 time) const { return time > begin_ ? time - begin_ : 0; }

    TraceConfig config_;
    const u64 begin_;
    bool may_block_ = false;
    std::deque<Event> events_;
    std::size_t bytes_ = 0;
    u64 lost_ = 0;
};

}  // namespace polyvisor::process
