// Whether a machine's vCPU threads may run: the one place where start, pause, resume and the end
// meet them. It knows threads only as a number and a way to kick them out of the guest.
//
//     created --start--> running <--pause/resume--> paused
//         \_________________\______end______________/--> ended
//
// The end is final, the first one counts, and it may be asked for from any thread, also from a
// device inside a vCPU's own run().
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <vector>

#include "machine/stop_info.hpp"

namespace polyvisor {

class RunControl {
  public:
    enum class Phase : u8 { kCreated, kRunning, kPaused, kEnded };
    using Duration = std::chrono::nanoseconds;
    static constexpr Duration kForever = Duration::max();

    /// `kick` makes every vCPU leave the guest soon. `settle` is called by the last thread that
    /// leaves the guest for a pause or the end, before anybody is told. Both without the mutex
    /// held.
    RunControl(unsigned threads, std::function<void()> kick, std::function<void()> settle)
        : threads_(threads),
          dormant_(threads),
          kick_(std::move(kick)),
          settle_(std::move(settle)) {}

    Phase phase() const;
    /// Moves on; false, changing nothing, when the present phase is not `from`.
    bool start() { return move(Phase::kCreated, Phase::kRunning); }
    bool resume() { return move(Phase::kPaused, Phase::kRunning); }
    bool request_pause();
    /// Ends the machine; later calls change nothing. True for the call that did.
    bool end(StopInfo info);

    /// Waits until no thread is in the guest: all parked (paused) or finished (ended).
    bool wait_quiet(Duration timeout) const;
    /// Waits until the machine is paused and quiet, or has ended and all threads are finished.
    bool wait_stopped(Duration timeout) const;
    /// Waits until the machine has ended and all threads are finished.
    bool wait_ended(Duration timeout) const;
    /// No thread is in the guest now, nor enters it without start() or resume().
    bool quiet() const;
    /// Valid once phase() is kEnded.
    StopInfo stop_info() const;

    // For the vCPU threads.
    /// Returns true when the guest may run, false when the machine has ended; blocks while paused.
    bool enter();
    /// CPU `cpu` has just halted with interrupts off. Ends the machine if every other CPU is
    /// dormant too: asks them all to leave the guest and report() (only they can tell).
    void halted(u32 cpu);
    /// For engines that do not tell: asks every CPU for a report, and ends the machine if all are
    /// dormant. Any thread.
    void ask_dormant();
    /// Whether halted() or ask_dormant() waits for reports.
    bool wants_reports() const { return checking_.load(std::memory_order_relaxed); }
    /// `dormant`: only an INIT, start-up IPI or NMI, that is another CPU, could wake this one.
    void report(u32 cpu, bool dormant);
    /// The thread leaves; it enters no more.
    void leave();
    /// Started threads; those not started count as finished.
    void thread_started();

  private:
    bool move(Phase from, Phase to);
    void leave_guest(std::unique_lock<std::mutex>& lock);
    bool quiet_locked() const { return inside_ == 0 && phase_ != Phase::kRunning; }
    template <class Predicate>
    bool wait(Duration timeout, Predicate predicate) const;

    mutable std::mutex mutex_;  // a leaf
    mutable std::condition_variable changed_;
    Phase phase_ = Phase::kCreated;
    unsigned threads_;
    unsigned alive_ = 0;         // started and not finished
    unsigned inside_ = 0;        // alive and not parked
    std::vector<bool> dormant_;  // CPUs that reported so since the last halted()
    std::atomic<bool> checking_{false};
    StopInfo stop_;
    std::function<void()> kick_, settle_;
};

}  // namespace polyvisor
