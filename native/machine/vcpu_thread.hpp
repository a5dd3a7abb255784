// The host thread of one vCPU.
#pragma once

#include <time.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "base/log.hpp"
#include "cpu/engine.hpp"
#include "machine/breakpoints.hpp"
#include "machine/exit_handler.hpp"
#include "machine/run_control.hpp"

namespace polyvisor {

/// Runs the vCPU until the machine ends. Nothing escapes: an exception out of the engine ends the
/// machine with kEngineFailure.
void run_loop(Vcpu& vcpu, RunControl& control, Breakpoints& breakpoints, ExitCounters& counters,
              Log& log);

class VcpuThread {
  public:
    /// Called first and last on the thread itself; may be empty.
    struct Hooks {
        std::function<void()> started;
        std::function<void()> finished;
    };

    VcpuThread(Vcpu& vcpu, RunControl& control, Breakpoints& breakpoints, Log& log)
        : vcpu_(vcpu), control_(control), breakpoints_(breakpoints), log_(log) {}
    ~VcpuThread() { join(); }

    /// Starts the thread. Throws HostError when the host has no room for one.
    void start(const Hooks& hooks);
    void join();
    bool is_current() const { return thread_.get_id() == std::this_thread::get_id(); }
    /// CPU time that the thread has used, in ns; 0 before it was started.
    u64 cpu_time() const;
    const ExitCounters& counters() const { return counters_; }

  private:
    static constexpr clockid_t kNoClock = 0;  // CLOCK_REALTIME: never a thread's

    Vcpu& vcpu_;
    RunControl& control_;
    Breakpoints& breakpoints_;
    Log& log_;
    ExitCounters counters_;
    std::atomic<clockid_t> cpu_clock_{kNoClock};
    std::thread thread_;
};

/// Blocks, while it lives, the signals that belong to the program's main thread, so that threads
/// made meanwhile never run its handlers. Those that a fault raises stay open.
class BlockedSignals {
  public:
    BlockedSignals();
    ~BlockedSignals();
    BlockedSignals(const BlockedSignals&) = delete;
    BlockedSignals& operator=(const BlockedSignals&) = delete;

  private:
    struct Mask;
    std::unique_ptr<Mask> before_;
};

}  // namespace polyvisor
