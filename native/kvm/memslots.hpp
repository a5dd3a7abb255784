// Guest memory as KVM sees it: one memslot per region of GuestMemory, read-only ones for ROM.
//
// A slot's id is the order in which its region was first seen, and neither ever changes: what KVM
// reports by slot (dirty rings) can be looked up at any later time.
//
// A region may become private memory (guest_memfd, KVM_SET_USER_MEMORY_REGION2): such a region
// would own a second descriptor, made by KVM_CREATE_GUEST_MEMFD, and set() would hand that and the
// offset 0 to KVM together with what it hands over now. A Slot knows its region, and nothing
// outside set() knows which ioctl made it, so that is the only place to change.
#pragma once

#include "kvm/abi.hpp"

#include <atomic>
#include <mutex>
#include <vector>

#include "memory/guest_memory.hpp"

namespace polyvisor::kvm {

class Memslots {
  public:
    /// `limit`: KVM_CAP_NR_MEMSLOTS.
    Memslots(int vm_fd, const GuestMemory& memory, unsigned limit)
        : vm_fd_(vm_fd), memory_(memory), limit_(limit) {}
    Memslots(const Memslots&) = delete;
    Memslots& operator=(const Memslots&) = delete;

    struct Slot {
        u32 id = 0;
        const GuestMemory::Region* region = nullptr;
        u32 flags = 0;  ///< KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES as the kernel has them
    };

    /// Makes a slot for every region that has none yet; a few loads when there is nothing to do.
    /// Throws HostError, ConfigError when the kernel has no room for more.
    void sync();
    /// Switches KVM_MEM_LOG_DIRTY_PAGES for all that a guest can write, and for those that sync()
    /// adds later. Switching it on (again) begins with every page clean. Throws HostError, and then
    /// none is switched on.
    void log_dirty(bool on);
    /// The shadows of the guest's page tables: KVM throws all of them away whenever a slot goes,
    /// whichever it is. Throws HostError.
    void forget_tables() const;
    /// A copy; slots only ever get more.
    std::vector<Slot> slots() const;

  private:
    void set(Slot& slot, u32 flags) const;
    void switch_log(bool on);
    u32 flags_of(const GuestMemory::Region& region) const;

    int vm_fd_;
    const GuestMemory& memory_;
    unsigned limit_;
    bool log_dirty_ = false;
    mutable std::mutex mutex_;  // a leaf
    std::vector<Slot> slots_;
    std::atomic<std::size_t> synced_{0};  // regions that have a slot
};

}  // namespace polyvisor::kvm
