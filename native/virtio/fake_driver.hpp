// The driver's side of a virtqueue, for tests, fuzzers and benchmarks of devices: what Linux's
// virtio_ring does, without Linux. It works on the same guest memory as the device's Queue, and
// publishes with the same orderings, so the two may run on two threads.
//
//     FakeDriver driver(memory, config);            // clears the rings
//     u16 id = *driver.add({{request, 16, false}, {answer, 512, true}});
//     if (driver.publish()) ring the doorbell;
//     while (auto used = driver.get()) { used->id, used->written }
#pragma once

#include <initializer_list>
#include <optional>
#include <span>
#include <vector>

#include "virtio/queue.hpp"

namespace polyvisor::virtio {

class FakeDriver {
  public:
    struct Segment {
        u64 gpa = 0;
        u32 size = 0;
        bool write = false;  ///< the device writes it
    };
    struct Used {
        u16 id = 0;
        u32 written = 0;
    };

    /// Clears the rings. Throws MemoryRangeError when they are not in memory.
    FakeDriver(GuestMemory& memory, const QueueConfig& config);

    /// Offers a chain; its id comes back from get(). Nothing: the ring is full. With `table`, an
    /// indirect table is written there, of 16 bytes per segment.
    std::optional<u16> add(std::span<const Segment> segments, u64 table = 0);
    std::optional<u16> add(std::initializer_list<Segment> segments, u64 table = 0) {
        return add(std::span(segments.begin(), segments.size()), table);
    }
    /// Shows the device all that was added. True: it wants to be notified.
    bool publish();
    /// What the device gave back next.
    std::optional<Used> get();

    void disable_interrupts();
    /// Asks for an interrupt at the next chain that is given back. True: there is one already.
    bool enable_interrupts();

    /// Descriptors that are free.
    u32 free() const { return free_; }
    /// Chains that were offered and are not back.
    u32 outstanding() const { return outstanding_; }

  private:
    std::optional<u16> add_split(std::span<const Segment> segments, u64 table);
    std::optional<u16> add_packed(std::span<const Segment> segments, u64 table);
    bool has_used() const;

    GuestMemory& memory_;
    QueueConfig config_;
    bool packed_, event_index_;
    u32 free_;
    u32 outstanding_ = 0;
    std::vector<u16> slots_;  // per id: descriptors it takes; 0: not offered

    // Split
    SplitDescriptor* descriptors_ = nullptr;
    SplitAvail* avail_ = nullptr;
    SplitUsed* used_ = nullptr;
    u16 free_head_ = 0;
    u16 next_avail_ = 0, published_ = 0, next_used_ = 0;

    // Packed
    PackedDescriptor* ring_ = nullptr;
    PackedEvent* driver_event_ = nullptr;
    PackedEvent* device_event_ = nullptr;
    std::vector<u16> free_ids_;
    bool avail_wrap_ = true, used_wrap_ = true;
    u32 added_ = 0, first_slot_ = 0;  // since publish()
    u16 first_flags_ = 0;
};

}  // namespace polyvisor::virtio
