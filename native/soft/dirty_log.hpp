// The soft engine's dirty log: marks on the pages of guest memory.
//
// While it is active, a clean page has the flag kPageDirtyTrack, which no soft TLB lets a store
// pass by: the first one takes the slow path, clears the flag, and sets the page's dirty bit
// (Region::note_first_store). All further stores run at full speed until the page is fetched.
//
// fetch() makes pages clean again while vCPUs run. It notes which bits are set, sets the flag of
// those pages, and waits until each vCPU has dropped the writable translations that are older than
// the flags: at the end of its present block, or at once when it is not executing guest code (it
// has ended, waits, or is inside a device), because then it looks at the request before it stores
// again. After that there is no unnoticed way to store to the pages, and what was stored before is
// in memory for the caller to read. So the bits are cleared, but for pages that lost their flag
// meanwhile: those have a newer store and writable translations, and are reported again next time.
//
// A vCPU that holds up the wait for kPatience (a host that is short of processors, a device that
// fetches while another vCPU waits for it) is not waited for: then no page is made clean, and
// all are reported again next time. That costs work, never a write.
//
// The engine pays for all this with one flag byte per page that it looks at on the slow path
// anyway, and one locked instruction per device access.
#pragma once

#include <chrono>
#include <mutex>
#include <vector>

#include "memory/dirty_log.hpp"

namespace polyvisor::soft {

class SoftVcpu;

class SoftDirtyLog final : public DirtyLog {
  public:
    static constexpr auto kPatience = std::chrono::milliseconds(100);

    explicit SoftDirtyLog(const GuestMemory& memory) : memory_(memory) {}

    const char* method() const override { return "marks"; }
    bool active() const override;
    void start() override;
    void stop() override;
    void fetch(const GuestMemory::Region& region, std::span<u64> bitmap) override;

    void add(SoftVcpu* vcpu);
    void remove(SoftVcpu* vcpu);

  private:
    void arm(const GuestMemory::Region& region, std::span<const u64> pages) const;
    bool wait_for_vcpus() const;
    void clean(const GuestMemory::Region& region, std::span<const u64> pages) const;

    const GuestMemory& memory_;
    mutable std::mutex mutex_;  // never taken by a vCPU that executes guest code
    std::vector<SoftVcpu*> vcpus_;
    bool active_ = false;
};

}  // namespace polyvisor::soft
