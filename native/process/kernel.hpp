// What serves the programs of a process VM: the table of its processes, what they were given, and
// the lock that one system call holds at a time.
//
// Each thread of a program runs on a thread of the host. While it executes the program, or waits
// for something, it does not hold the lock; whatever it does here, it does.
#pragma once

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "process/futex.hpp"
#include "process/observer.hpp"
#include "process/process.hpp"
#include "process/sockets.hpp"
#include "process/stops.hpp"
#include "process/symbols.hpp"
#include "process/timers.hpp"
#include "process/tree.hpp"
#include "process/vm.hpp"

namespace polyvisor::process {

struct KernelConfig {
    std::vector<std::string> arguments;
    std::vector<std::string> environment;
    std::string program;  ///< a path of its tree; empty: the first argument
    std::string directory = "/";
    std::vector<Tree::Mount> mounts;
    VmConfig vm;
    u64 output = ~u64{0};            ///< bytes that it may write to its standard output and error
    u64 writes = ~u64{0};            ///< bytes that it may write to files
    u64 instructions = ~u64{0};      ///< soft engine only
    u64 cpu_time = ~u64{0};          ///< of the host, ns: of all its threads together
    u32 threads = 256;               ///< of all its processes together
    u32 files = Descriptors::kMost;  ///< that each process may have open
    std::optional<u64> seed;         ///< of its addresses; nothing: they are others every time
    bool network = false;            ///< sockets that lead out of the process VM
    bool confine = true;             ///< the monitor's threads, too: see confinement.hpp
};

/// What a program was given only so much of.
enum class Limit : u8 { kMemory, kCpuTime, kInstructions, kOutput, kFiles, kThreads, kWrites };

/// What a program has used, and met.
struct Usage {
    u64 limits = 0;  ///< bits, by Limit
    u32 processes = 0, threads = 0;
    u64 instructions = 0;  ///< by threads that have ended; soft engine only
};

/// A program's standard input, output and error; one that is not there is not open.
using StandardFiles = std::array<OwnedFd, 3>;
class KernelImage;

class Kernel {
  public:
    static constexpr int kFirstPid = 1000;

    /// Loads the program; it stands still. Throws ConfigError, HostError (`code`: what execve()
    /// would say).
    Kernel(KernelConfig config, StandardFiles standard);
    /// A copy of what `image` was taken of. `mounts`: those that it has of its own, in the place of
    /// the original's. Throws HostError.
    Kernel(std::shared_ptr<const KernelImage> image, const std::vector<Tree::Mount>& mounts,
           StandardFiles standard);
    /// Ends what still runs.
    ~Kernel();
    Kernel(const Kernel&) = delete;

    // --- From outside ----------------------------------------------------------------------------

    /// Lets it run. Throws HostError when the host has no thread to give.
    void resume();
    /// Waits until it has ended, or stopped by itself, or an inquiry of the observer's waits;
    /// false: `time` is over. Sees to the limit on CPU time meanwhile.
    bool wait(std::chrono::nanoseconds time);
    /// Where it stopped by itself, since the last resume().
    std::optional<Stop> stop() const;
    /// It is to stop before this system call, or at this address (false: nothing is there).
    void stop_before(u32 call);
    bool stop_before_address(u64 address);
    void clear_stops();
    /// resume() will execute the function at `address` with these arguments, in whose place
    /// `copies` puts the addresses of copies on the stack, until the Stop kReturned. Throws
    /// StateMismatch (first_thread()), ConfigError when the stack has no room for them.
    struct Copy {
        std::size_t argument;
        std::vector<u8> bytes;
        u64 address = 0;  ///< where it was put
    };
    void call(u64 address, std::vector<u64> arguments, std::vector<Copy>& copies);
    /// Where the first process's program has a function or variable; nothing: it has none.
    std::optional<u64> symbol(const std::string& name);
    /// The memory of its first process. False: it has none there.
    bool read_memory(u64 address, std::span<u8> into) const;
    bool write_memory(u64 address, std::span<const u8> from);
    /// Its first thread, to be changed while everything stands still. Throws StateMismatch when it
    /// has ended, or is in the middle of a system call.
    Thread& first_thread() const;
    /// When it returns all threads stand still, within milliseconds; resume() goes on with them.
    void pause();
    /// Ends it now, for this reason.
    void kill(End end);
    /// Back to the image that it was made of, standing still. Throws StateMismatch when there was
    /// none, HostError.
    void reset();
    /// The end of its first process, which is everybody's.
    std::optional<End> end() const;
    /// CPU time of the host that all threads have taken, in ns.
    u64 cpu_time() const;
    std::map<u32, CallCount> counts() const;
    Usage usage() const;

    // --- For what serves system calls, with the lock ---------------------------------------------

    std::mutex& mutex() { return mutex_; }
    Alarms& alarms() { return alarms_; }
    const KernelConfig& config() const { return config_; }
    const Tree& tree() const { return tree_; }
    /// nullptr: there is none. Also those that have ended and were not waited for.
    Process* find_process(int pid) const;
    Thread* find_thread(int tid) const;
    const std::map<int, std::shared_ptr<Process>>& processes() const { return processes_; }
    std::size_t threads() const { return threads_.size(); }
    /// Of the addresses of a program that begins.
    u64 next_seed();

    struct CloneRequest {
        u64 flags = 0, stack = 0, tls = 0;
        u64 parent_tid = 0, child_tid = 0;  ///< addresses, as clone() has them
    };
    /// As clone(): the new thread's number, or -errno.
    s64 clone(Thread& caller, const CloneRequest& request);
    /// Takes a process that has ended out of the table.
    void reap(Process& process);

    /// Everybody stands still soon; wait() returns.
    void stop_at(const Stop& stop);

    /// Another process uses the same machine: vfork()'s child, or its parent.
    bool shares_machine(const Process& process) const;

    std::array<std::shared_ptr<OpenFile>, 3> standard_files;
    /// The program has met this limit.
    void meet(Limit limit) { usage_.limits |= bit(static_cast<unsigned>(limit)); }

    const std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
    Futexes futexes;
    SocketNames socket_names;
    Stops stops;
    Observer observer;
    /// Bytes that are to be kept in files are written: false, there is no room for them.
    bool take_writes(u64 bytes);

    u64 output_left = ~u64{0};
    u64 writes_left = ~u64{0};
    u64 instructions_left = ~u64{0};
    std::map<u32, CallCount> call_counts;

  private:
    friend class Thread;
    std::shared_ptr<Process> add_process(std::shared_ptr<Process> process);
    Thread& add_thread(Process& process, int tid, u32 cpu, const GeneralRegisters& registers);
    void start(Thread& thread);
    int next_pid();
    void open_standard(StandardFiles standard);
    Process& begin(std::shared_ptr<Vm> machine);
    void end_all(std::unique_lock<std::mutex>& lock);
    void park(Thread& thread);
    void process_ended(Process& process);
    u64 total_cpu_time() const;
    void end_for_cpu_time();
    void retire(Thread& thread);
    void bury();

    KernelConfig config_;
    Tree tree_;
    mutable std::mutex mutex_;
    Alarms alarms_{mutex_};
    std::condition_variable changed_;  // of what is below
    bool paused_ = true;
    u32 running_ = 0;  // threads that neither wait nor are parked
    std::optional<End> end_;
    std::optional<Stop> stop_;
    std::shared_ptr<const KernelImage> image_;  // that it was made of
    std::shared_ptr<Vm> machine_;               // of a copy's first process, for reset()
    std::array<s64, 3> standard_positions_{};
    std::map<std::string, Symbols> symbols_;  // by path of a program
    int last_pid_ = kFirstPid - 1;
    std::map<int, std::shared_ptr<Process>> processes_;
    std::map<int, std::unique_ptr<Thread>> threads_;
    std::vector<std::unique_ptr<Thread>> ended_;  // whose host threads have to let go of them
    u64 ended_cpu_time_ = 0;
    u64 programs_ = 0;         // that have begun
    u64 cpu_time_before_ = 0;  // the last reset()
    Usage usage_;
};

}  // namespace polyvisor::process
