// Guest memory as KVM sees it: one memslot per region of GuestMemory, read-only ones for ROM.
#pragma once

#include <linux/kvm.h>

#include <mutex>
#include <vector>

#include "memory/guest_memory.hpp"

namespace polyvisor::kvm {

class Memslots {
  public:
    /// `limit`: KVM_CAP_NR_MEMSLOTS.
    Memslots(int vm_fd, const GuestMemory& memory, unsigned limit)
        : vm_fd_(vm_fd), memory_(memory), limit_(limit) {}

    struct Slot {
        u32 id = 0;
        const GuestMemory::Region* region = nullptr;
        u32 flags = 0;  ///< KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES as the kernel has them
    };

    /// Makes a slot for every region that has none yet; a few loads when there is nothing to do.
    /// Throws HostError, ConfigError when the kernel has no room for more.
    void sync();
    /// Switches KVM_MEM_LOG_DIRTY_PAGES for all of them, and for those that sync() adds later.
    void log_dirty(bool on);
    /// A copy; slots only ever get more.
    std::vector<Slot> slots() const;

  private:
    void set(Slot& slot, u32 flags);

    int vm_fd_;
    const GuestMemory& memory_;
    unsigned limit_;
    bool log_dirty_ = false;
    mutable std::mutex mutex_;  // a leaf
    std::vector<Slot> slots_;
    std::atomic<std::size_t> synced_{0};  // regions that have a slot
};

}  // namespace polyvisor::kvm
