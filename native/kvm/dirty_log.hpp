// DirtyLog over KVM's per-slot bitmaps (KVM_GET_DIRTY_LOG, cleared by KVM_CLEAR_DIRTY_LOG where the
// kernel can) or its per-vCPU rings (KVM_CAP_DIRTY_LOG_RING), with the host's own writes added.
//
// A bitmap costs a fetch in proportion to the memory, a ring in proportion to the writes; but a
// vCPU whose ring is full leaves the guest until it was collected, and on Intel hosts with PML the
// processor holds the last 512 pages back until the vCPU leaves the guest for whatever reason, so
// that they show up in a later fetch. The bitmap is the default.
//
// Rings: the kernel logs a page once and lets it be written freely until KVM_RESET_DIRTY_RINGS,
// which must therefore come after an entry was read and before the page's contents are. mutex_
// makes that one step towards fetch(): a page that another thread has taken out of a ring, but not
// reset yet, must not be reported as clean from now on.
//
// The kernel keeps 64 entries of a ring back for what one entry of the guest can write, and does
// not look whether that is enough. Where it emulates instructions (a host that cannot run the
// guest's ring 0 itself, long string instructions to MMIO) it may not be: the kernel then writes
// over entries that nobody has read. A ring whose every entry was dirty may have been overrun; all
// pages are reported then, and all are protected again.
#pragma once

#include "kvm/abi.hpp"

#include <mutex>
#include <vector>

#include "base/mapping.hpp"
#include "memory/dirty_log.hpp"

namespace polyvisor::kvm {

class Vm;

class KvmDirtyLog final : public DirtyLog {
  public:
    /// Chooses the method, EngineConfig::dirty_ring, which the kernel must know before it has a
    /// vCPU. Throws ConfigError for a ring that cannot be had.
    explicit KvmDirtyLog(Vm& vm);
    ~KvmDirtyLog() override;
    const char* method() const override { return ring_entries_ != 0 ? "ring" : "log"; }
    bool active() const override;
    void start() override;
    void stop() override;
    void fetch(const GuestMemory::Region& region, std::span<u64> bitmap) override;

    /// On KVM_EXIT_DIRTY_RING_FULL: makes room in the vCPU's ring.
    /// Throws HostError when the kernel has lost track of its own ring.
    void collect(u32 vcpu);
    /// How often a ring was, or may have been, overrun.
    u64 overruns() const;

  private:
    struct Ring {
        Mapping mapping;
        u32 next = 0;          ///< counts up; modulo the ring's size, the entry to look at next
        u32 idle = 0;          ///< it was said to be full, but was empty, so often in a row
        bool overrun = false;  ///< the kernel may be further along than `next`
    };

    void enable_ring();
    bool open_ring(u32 vcpu);
    u32 harvest(u32 vcpu);
    void harvest_all();
    void find_next(Ring& ring) const;
    void finish_harvest(bool overrun);
    kvm_dirty_gfn& entry(const Ring& ring, u32 index) const;
    void fetch_bitmap(const GuestMemory::Region& region, std::span<u64> bitmap);
    void clear(u32 slot, std::span<u64> pages, u64 count) const;

    Vm& vm_;
    u32 ring_entries_ = 0;
    bool manual_clear_ = false;
    mutable std::mutex mutex_;  // before Memslots' own
    bool active_ = false;
    u64 overruns_ = 0;
    std::vector<Ring> rings_;   // by vCPU
    std::vector<u64> scratch_;  // the kernel's bitmap of one slot
};

}  // namespace polyvisor::kvm
