// Machines that are made before they are needed, and used again: making and closing one takes
// longer than a short program runs, and where it takes long it waits for the host's other CPUs.
//
// A machine comes back by itself when its program has ended. A thread of the pool's own empties it,
// makes new ones, and closes those that are too many, so that nobody waits for that. What a
// machine keeps is its engine, its CPUs, and the tables that it had memory for; CPUs get all of
// their state anew when a program begins.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "process/vm.hpp"

namespace polyvisor::process {

class VmPool : public std::enable_shared_from_this<VmPool> {
  public:
    /// `count`: machines that are idle or in use, and kept; those beyond it are closed when they
    /// come back. Owned by a shared_ptr. Throws HostError when the host has no thread to give.
    VmPool(VmConfig config, std::size_t count);
    /// Closes what is idle; what is in use is closed when it is given up.
    ~VmPool();
    VmPool(const VmPool&) = delete;
    VmPool& operator=(const VmPool&) = delete;

    /// An idle one, or a new one: any thread. Throws what Vm's constructor does.
    std::shared_ptr<Vm> take();
    /// As the destructor, which may come later; take() makes new ones.
    void close();

    std::size_t idle() const;
    const VmConfig& config() const { return config_; }

  private:
    void main();
    void give_back(std::unique_ptr<Vm> machine);
    bool ours() const;

    const VmConfig config_;
    const std::size_t count_;
    const pid_t pid_;
    // What the thread shares. A forked child, where there is no such thread, leaves it alone:
    // it cannot be used there, nor destroyed.
    struct Shared {
        std::mutex mutex;  // a leaf
        std::condition_variable changed;
        bool closing = false;
        bool failed = false;     // to make one: until somebody who can be told has tried
        std::size_t in_use = 0;  // or about to be idle
        std::vector<std::unique_ptr<Vm>> idle, returned;
        std::thread thread;
    };
    std::unique_ptr<Shared> shared_;
};

/// From the configuration's pool, if it has one.
std::shared_ptr<Vm> make_vm(const VmConfig& config);

}  // namespace polyvisor::process
