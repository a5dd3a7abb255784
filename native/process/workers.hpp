// Threads of the host that run the threads of programs, one after another.
//
// A thread that may serve programs is behind a filter (confinement.hpp), which takes the host's
// kernel longer to install than many programs run; so a thread that has nothing to do waits some
// time for the next program that is to be confined as it is.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/types.hpp"
#include "process/confinement.hpp"

namespace polyvisor::process {

/// Work that a thread of the host does.
class Worker {
  public:
    /// What work leaves to be destroyed when nobody waits for it any more.
    using Rest = std::shared_ptr<void>;
    /// Does not throw. `failure`: why the thread could not be confined; empty: it was.
    using Work = std::function<Rest(const std::string& failure)>;

    Worker() = default;
    /// Begins. Throws HostError when the host has no thread to give.
    Worker(const std::optional<Confinement>& confinement, Work work);
    /// Waits until it is over.
    ~Worker() { wait(); }
    Worker(Worker&&) = default;
    Worker& operator=(Worker&& other) noexcept;

    bool begun() const { return state_ != nullptr; }
    bool over() const;
    void wait() const;
    /// CPU time of the host that it has taken so far, ns.
    u64 cpu_time() const;

    struct State;

  private:
    std::shared_ptr<State> state_;
};

}  // namespace polyvisor::process
