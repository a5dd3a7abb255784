// One thread of a program: a vCPU, and the thread of the host that runs it.
#pragma once

#include <poll.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <span>
#include <string>

#include "base/fd.hpp"
#include "process/kernel.hpp"
#include "process/workers.hpp"

namespace polyvisor::process {

class Thread {
  public:
    using TimePoint = std::chrono::steady_clock::time_point;
    static constexpr s64 kForever = -1;

    Thread(Kernel& kernel, Process& process, int tid, u32 cpu);

    Kernel& kernel() const { return kernel_; }
    Process& process() const { return process_; }
    Vm& vm() const { return *process_.vm; }
    AddressSpace& space() const { return process_.space(); }
    Descriptors& descriptors() const { return process_.descriptors; }
    Vcpu& vcpu() const { return vm().vcpu(cpu); }
    int tid() const { return tid_; }

    // --- For its own system calls, with the lock, which they give up meanwhile -------------------

    /// Waits for `fd` (-1: for nothing), at most `timeout` ns (kForever). False: something else
    /// came first that the thread has to see to (a signal, its end): the call is to return -EINTR.
    bool wait(int fd, short events, s64 timeout);
    /// As ppoll() on the program's descriptors, whose `revents` it sets: how many, or -errno.
    s64 poll(std::span<pollfd> wanted, s64 timeout);
    /// Waits for `done`, which others make true under the lock and then call notify(). False: it is
    /// not, because of `until`, or (interrupted()) as in wait().
    bool block(const std::function<bool()>& done, std::optional<TimePoint> until = {});
    /// In which the lock is not held: for what may take the host long. What the thread knew of the
    /// program before may have changed when it ends.
    class Unlocked {
      public:
        explicit Unlocked(Thread& thread) : thread_(thread) { thread.leave(); }
        ~Unlocked() { thread_.enter(); }
        Unlocked(const Unlocked&) = delete;

      private:
        Thread& thread_;
    };
    /// As execve(): an errno, and all is as it was; or 0, and another program is about to run.
    int execute(const std::string& program, std::vector<std::string> arguments,
                std::vector<std::string> environment);
    /// Waits for `done`, as block() does, but for the thread's end nothing else comes first.
    void wait_until(const std::function<bool()>& done);
    /// A string of the program's, with its end `most` bytes at the most; nothing: there is none.
    std::optional<std::string> string(u64 address, std::size_t most = 4096) const;
    /// As string(); until forget_strings() the call finds it as it was shown, whatever other
    /// threads write there.
    std::optional<std::string> show_string(u64 address);
    void forget_strings() { shown_.clear(); }
    /// Ends this thread alone.
    void exit() { ending = true; }

    // --- For others, with the lock ---------------------------------------------------------------

    /// It looks at what it has to do soon, whatever it does.
    void interrupt();
    /// What block() waits for may have come.
    void notify() { wake_.notify_all(); }
    /// A word of its memory, by which processes that share it agree.
    Futexes::Key futex_key(u64 address) const;
    /// It has to leave a wait: there is a signal for it, or its end.
    bool interrupted() const;
    /// CPU time of the host, ns.
    u64 cpu_time() const;

    u32 cpu;  ///< of its Vm
    GeneralRegisters registers;
    bool ending = false;
    std::string title = "program";
    ThreadSignals signals;
    u64 clear_child_tid = 0;    ///< address of a word that is cleared and woken at its end; 0: none
    u64 robust_list = 0;        ///< address, as set_robust_list() has it
    bool between_calls = true;  ///< it stands still in the program, not in a system call

  private:
    friend class Kernel;
    Worker::Rest main(const std::string& failure);
    void run_program();
    bool take_budget();
    void begin_instructions();
    void settle_instructions();
    void serve();
    void take_exception(const Trap& trap);
    void finish();
    s64 wait_for(std::span<pollfd> wanted, s64 timeout);
    void leave();
    void enter();

    Kernel& kernel_;
    Process& process_;
    const int tid_;
    OwnedFd event_;  // wakes wait()
    std::condition_variable wake_;
    std::unique_lock<std::mutex> lock_;  // while it does not execute the program, nor wait
    Worker host_;
    u64 generation_ = 0;  // of the Vm, that its CPU has seen
    std::map<u64, std::optional<std::string>> shown_;
    u64 instructions_before_ = 0;  // that its CPU had executed for others
    u64 budget_end_ = 0;  // its CPU's count of instructions, when it needs more of the kernel's
};

/// The result of the system call, or -errno. `number` is the program's RAX.
s64 serve_system_call(Thread& thread, u32 number, const Arguments& arguments);
/// "openat"; "syscall_999" for one without a name.
std::string system_call_name(u32 number);
/// The opposite; nothing: there is none of this name.
std::optional<u32> system_call_number(const std::string& name);

}  // namespace polyvisor::process
