// Address ranges to devices: one Bus for the 64 K ports, one for guest-physical memory.
//
// Ranges are disjoint. attach() and detach() may be called while vCPUs run (PCI BARs move): lookups
// read an immutable table that is replaced as a whole. An access nobody claims reads all ones and is
// counted. An access that starts in a range and runs over its end is unclaimed too.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "bus/device.hpp"

namespace polyvisor {

class Bus {
  public:
    explicit Bus(std::string name, u64 limit) : name_(std::move(name)), limit_(limit) {}

    /// Claims [start, start+size) for `device`, which sees offsets from `start` plus `base`.
    /// Throws MemoryRangeError on overlap, wrap-around or beyond the bus's limit.
    void attach(u64 start, u64 size, std::shared_ptr<Device> device, u64 base = 0);
    /// Releases the range that starts at `start`; throws MemoryRangeError when there is none.
    void detach(u64 start);

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
    u64 unclaimed() const { return unclaimed_.load(std::memory_order_relaxed); }
    u64 limit() const { return limit_; }
    const std::string& name() const { return name_; }

  private:
    struct Table {
        std::vector<Range> ranges;  // sorted by start
    };
    const Range* lookup(const Table& table, u64 address, u64 size) const;

    std::string name_;
    u64 limit_;
    std::mutex mutex_;  // serialises attach/detach
    std::atomic<std::shared_ptr<const Table>> table_{std::make_shared<const Table>()};
    std::atomic<u64> unclaimed_{0};
};

}  // namespace polyvisor
