// One process: what its threads share, and what its parent asks about it.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "process/descriptors.hpp"
#include "process/signals.hpp"
#include "process/timers.hpp"
#include "process/vm.hpp"

namespace polyvisor::process {

class Kernel;
class Thread;
struct LoadRequest;

/// How a process ended.
struct End {
    enum class Reason : u8 { kExited, kSignal, kInstructions, kCpuTime, kMemory, kFailed };
    Reason reason = Reason::kExited;
    int status = 0;    ///< kExited
    int signal = 0;    ///< kSignal
    u64 address = 0;   ///< kSignal: of the fault
    std::string text;  ///< kFailed
    /// As wait4() has it.
    int wait_status() const {
        return reason == Reason::kExited ? status << 8 : reason == Reason::kSignal ? signal : 9;
    }
};

struct CallCount {
    u64 calls = 0, errors = 0;
};

/// Used under the kernel's lock.
class Process {
  public:
    Process(Kernel& kernel, int pid, int parent, std::shared_ptr<Vm> vm);

    Kernel& kernel() const { return kernel_; }
    AddressSpace& space() const { return vm->space(); }

    /// What a child has from its parent.
    void inherit(const Process& from);
    /// Ends all of its threads.
    void exit(End end);
    /// It has no threads any more; `end` says how that came.
    bool ended() const { return threads.empty(); }
    /// A program into the process's (empty) address space: 0 or an errno. Sets where the thread is
    /// to begin.
    int load(const LoadRequest& request, GeneralRegisters& registers);

    const int pid;
    int parent, group, session;
    std::shared_ptr<Vm> vm;  ///< null when it has ended
    Descriptors descriptors;
    std::string directory = "/";
    u32 umask = 022;
    std::string executable;  ///< path of the program
    u64 base = 0;            ///< what the addresses in its file are to be added to
    std::vector<std::string> arguments;
    ProcessSignals signals;
    Timers timers;
    std::vector<Thread*> threads;
    bool exiting = false;
    End end;
    bool in_vfork = false;  ///< its parent waits until it has a Vm of its own, or ended
    u64 cpu_time = 0;       ///< ns, of its threads that have ended
    u64 children_cpu_time = 0;

  private:
    Kernel& kernel_;
};

}  // namespace polyvisor::process
