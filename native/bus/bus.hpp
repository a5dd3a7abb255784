// Address ranges to devices: one Bus for the 64 K ports, one for guest-physical memory.
//
// Ranges are disjoint. attach() and detach() may be called while vCPUs run (PCI BARs move). An
// access nobody claims reads all ones and is counted. An access that starts in a range and runs
// over its end is unclaimed too.
//
// A lookup takes no lock and writes no shared memory: it searches a sorted array under a sequence
// count and tries again if attach() or detach() changed it meanwhile. So a device may still be
// called for a moment after detach(); the bus therefore keeps every device it ever held until it is
// destroyed. Moving a BAR to and fro, which a guest may do forever, allocates nothing.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "bus/device.hpp"

namespace polyvisor {

class Bus {
  public:
    /// Addresses are 0..limit-1.
    explicit Bus(std::string name, u64 limit);
    Bus(const Bus&) = delete;
    Bus& operator=(const Bus&) = delete;

    /// Claims [start, start+size) for `device`, which sees offsets from `start` plus `base`.
    /// Throws MemoryRangeError on overlap, wrap-around or beyond the bus's limit.
    void attach(u64 start, u64 size, std::shared_ptr<Device> device, u64 base = 0);
    /// Releases the range that starts at `start`; throws MemoryRangeError when there is none.
    void detach(u64 start);
    /// Drops the references to devices that are no longer attached. Only while no other thread uses
    /// the bus: for an owner that takes its devices away before the bus ends.
    void release_detached();

    /// Serve an access. False: unclaimed (read() has filled data with ones).
    bool read(u64 address, std::span<u8> data);
    bool write(u64 address, std::span<const u8> data);
    /// The device at the address, or nullptr.
    Device* find(u64 address) const;

    struct Range {
        u64 start;
        u64 size;
        u64 base;
        std::shared_ptr<Device> device;
    };
    std::vector<Range> ranges() const;
    /// Told of every range that is attached (now, those already there) and detached, so that an
    /// engine can serve doorbells and posted writes itself. One observer; it must not throw nor
    /// call the bus. Empty: none.
    using Observer = std::function<void(const Range& range, bool attached)>;
    void set_observer(Observer observer);
    u64 unclaimed() const { return unclaimed_.load(std::memory_order_relaxed); }
    u64 limit() const { return limit_; }
    const std::string& name() const { return name_; }

  private:
    // One claimed range as lookups read it. Every field is atomic, for a reader may look while it
    // changes; the sequence count tells it that what it saw is of no use.
    struct Slot {
        std::atomic<u64> start{0};
        std::atomic<u64> size{0};
        std::atomic<u64> base{0};
        std::atomic<Device*> device{nullptr};
    };
    struct Slots {
        explicit Slots(u32 capacity) : capacity(capacity), slots(new Slot[capacity]) {}
        const u32 capacity;
        std::atomic<u32> count{0};
        std::unique_ptr<Slot[]> slots;  // sorted by start
    };
    struct Target {
        Device* device;  // nullptr: unclaimed
        u64 offset;
    };
    Target lookup(u64 address, u64 size) const;
    void publish();

    std::string name_;
    u64 limit_;
    mutable std::mutex mutex_;                    // serialises attach/detach; a leaf
    std::vector<Range> ranges_;                   // sorted by start
    Observer observer_;                           // called with mutex_ held
    std::vector<std::shared_ptr<Device>> kept_;   // every device ever attached, once
    std::vector<std::unique_ptr<Slots>> arrays_;  // the last is in use, each twice the one before
    std::atomic<u64> sequence_{0};                // odd while the slots change
    std::atomic<const Slots*> current_{nullptr};
    mutable std::atomic<u32> hint_{0};  // slot of the last hit; only a guess
    std::atomic<u64> unclaimed_{0};
};

}  // namespace polyvisor
