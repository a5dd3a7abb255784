// Which pages of guest memory were written: one interface over KVM's log, KVM's rings and the soft
// engine's marks, for migration, incremental snapshots and displays.
//
//     log.start();                       // every page is clean
//     ... the guest runs ...
//     log.fetch(region, bitmap);         // what was written since, which is clean again
//     log.stop();
#pragma once

#include <atomic>
#include <span>

#include "memory/guest_memory.hpp"

namespace polyvisor {

class DirtyLog {
  public:
    virtual ~DirtyLog() = default;
    /// How it works, for people: "log", "ring", "marks".
    virtual const char* method() const = 0;
    virtual bool active() const = 0;
    /// Begins (or begins anew) with every page clean. Throws HostError. The vCPUs may run.
    virtual void start() = 0;
    virtual void stop() = 0;
    /// Sets in `bitmap` (bit n of word n/64: page n of the region) the pages written since start()
    /// or the last fetch(), by vCPUs or through GuestMemory::write()/note_write(), and clears none;
    /// they count as clean from then on. A write that is in progress meanwhile shows up now or next
    /// time, never in neither. Throws StateMismatch unless active.
    virtual void fetch(const GuestMemory::Region& region, std::span<u64> bitmap) = 0;

    /// What one user fetches another no longer gets, so there is one at a time: false when the log
    /// is another's until that one's release().
    bool claim() { return !claimed_.exchange(true); }
    void release() { claimed_ = false; }

  private:
    std::atomic<bool> claimed_{false};
};

}  // namespace polyvisor
