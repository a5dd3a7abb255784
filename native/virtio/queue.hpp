// The device's side of a virtqueue, split or packed (virtio 1.2, 2.6 to 2.8).
//
//     Chain chain;                                  // one per queue, used again and again
//     while (queue.pop(chain)) {
//         u32 written = serve(chain.readable(), chain.writable());
//         queue.push(chain, written);
//     }
//     if (queue.publish()) interrupt the driver;
//     if (!queue.error().empty()) the device needs a reset
//
// Everything that a driver writes is untrusted. The rings' places are checked once, in configure();
// each descriptor is copied once and checked in pop(), after which a chain holds host addresses
// that stay good for as long as the guest memory lives, whatever the driver does meanwhile. A
// mistake breaks the queue: pop() gives no more, error() says what was wrong, and the device sets
// NEEDS_RESET.
//
// A queue belongs to one thread at a time. No system calls, no locks, no allocation after
// configure().
#pragma once

#include <memory>
#include <span>
#include <string>

#include "memory/guest_memory.hpp"
#include "virtio/ring.hpp"

namespace polyvisor::virtio {

/// Memory of the guest that is contiguous on the host.
struct Buffer {
    u8* data = nullptr;
    u32 size = 0;
    u64 gpa = 0;
};

/// One request: what the device reads, then what it writes.
class Chain {
  public:
    /// Descriptors of one chain, at most: as many as the largest queue that Linux makes.
    static constexpr u32 kMost = 1024;

    Chain() : buffers_(std::make_unique_for_overwrite<Buffer[]>(kMost)) {}

    std::span<const Buffer> readable() const { return {buffers_.get(), at_.readable}; }
    std::span<const Buffer> writable() const {
        return {buffers_.get() + at_.readable, at_.count - at_.readable};
    }
    u32 readable_bytes() const { return at_.readable_bytes; }
    u32 writable_bytes() const { return at_.writable_bytes; }
    /// Head of a split chain, buffer id of a packed one.
    u16 id() const { return id_; }

    /// Copies from the readable part, from `offset` on; bytes copied.
    u32 read(u32 offset, std::span<u8> into) const;
    /// Copies into the writable part, from `offset` on; bytes copied.
    u32 write(u32 offset, std::span<const u8> from) const;

  private:
    friend class Queue;

    struct Cursor {
        u32 count = 0, readable = 0;  // buffers; the latter counts once there is a writable one
        u32 readable_bytes = 0, writable_bytes = 0;
    };
    void finish(const Cursor& at, u32 id, u32 slots) {
        at_ = at;
        if (at.writable_bytes == 0) at_.readable = at.count;
        id_ = static_cast<u16>(id);
        slots_ = static_cast<u16>(slots);
    }

    std::unique_ptr<Buffer[]> buffers_;
    Cursor at_;
    u16 id_ = 0;
    u16 slots_ = 0;  // packed: descriptors it takes in the ring
};

/// Where a driver put a queue. Addresses are guest-physical.
struct QueueConfig {
    u32 size = 0;         ///< split: a power of two up to 32768; packed: up to 32768
    u64 descriptors = 0;  ///< split: aligned to 16; packed: the ring, aligned to 16
    u64 driver = 0;       ///< split: avail, aligned to 2; packed: the driver's events, to 4
    u64 device = 0;       ///< split: used, aligned to 4; packed: the device's events, to 4
    u64 features = 0;     ///< RingFeature bits that were negotiated
};

class Queue {
  public:
    explicit Queue(GuestMemory& memory) : memory_(memory) {}

    /// Starts at the beginning of both rings. False: they cannot be where the driver says; the
    /// queue is broken, and error() says why.
    bool configure(const QueueConfig& config);
    /// Forgets all; pop() gives nothing until the next configure().
    void reset();

    bool ready() const { return ready_; }
    /// Empty, or what the driver did wrong, in one sentence.
    const std::string& error() const { return error_; }
    const QueueConfig& config() const { return config_; }

    /// The next chain, or false: there is none now, or the queue is broken or not configured.
    bool pop(Chain& chain) { return packed_ ? pop_packed(chain) : pop_split(chain); }
    /// Whether pop() would find something (or break the queue).
    bool available();
    /// Puts back what the last pop() gave, as if it had not been called: for a device that cannot
    /// serve it now. Only for the last one, and not after a push().
    void unpop(const Chain& chain);

    /// Gives a chain back; `written` bytes of its writable part, from the first, have new contents.
    /// The driver sees it at publish().
    void push(const Chain& chain, u32 written) {
        if (written != 0) mark_written(chain, written);
        packed_ ? push_packed(chain, written) : push_split(chain, written);
    }
    /// Shows the driver all that was pushed. True: it wants an interrupt for it.
    bool publish();

    /// Asks the driver not to notify: the device looks by itself.
    void disable_notify();
    /// Asks it to notify of the next chain. True: there is one already, pop it instead of waiting.
    bool enable_notify();

    /// Positions, for snapshots; a queue is restored by configure() and set_positions().
    struct Positions {
        u16 next_avail = 0;  ///< packed: bit 15 is the wrap counter, here and below
        u16 next_used = 0;
        bool operator==(const Positions&) const = default;
    };
    Positions positions() const;
    /// False when they are out of the queue's bounds; nothing is changed then.
    bool set_positions(Positions positions);

  private:
    template <class T>
    static T load(const T* from) {
        return __atomic_load_n(from, __ATOMIC_ACQUIRE);
    }
    template <class T>
    static void store(T* to, T value) {
        __atomic_store_n(to, value, __ATOMIC_RELEASE);
    }

    bool pop_split(Chain& chain);
    bool pop_packed(Chain& chain);
    void push_split(const Chain& chain, u32 written);
    void push_packed(const Chain& chain, u32 written);
    bool publish_split();
    bool publish_packed();
    bool add_indirect(Chain::Cursor& at, Buffer* buffers, u64 address, u32 length);
    // Once for every descriptor, so what is usual comes first: in the memory where the last one
    // was, readable before writable. `at` stays in registers as long as that is so.
    bool add(Chain::Cursor& at, Buffer* buffers, u64 address, u32 length, bool write) {
        const u64 offset = address - hint_start_;
        const u32 before = write ? at.writable_bytes : at.readable_bytes;
        const u32 sum = before + length;
        if (PV_UNLIKELY(sum < before || length == 0 || offset >= hint_size_ ||
                        length > hint_size_ - offset || at.count >= Chain::kMost ||
                        (!write && at.writable_bytes != 0))) {
            Chain::Cursor copy = at;
            const bool good = add_slowly(copy, buffers, address, length, write);
            at = copy;
            return good;
        }
        if (write) {  // (no reference to one of the two: that would put them in memory)
            if (before == 0) at.readable = at.count;
            at.writable_bytes = sum;
        } else {
            at.readable_bytes = sum;
        }
        buffers[at.count++] = {hint_host_ + offset, length, address};
        return true;
    }
    bool add_slowly(Chain::Cursor& at, Buffer* buffers, u64 address, u32 length, bool write);
    bool descriptor_ready(u32 slot, bool wrap) const;
    void mark_written(const Chain& chain, u32 written);
    // What this side of the ring writes lies in one region, and is no code.
    void mark_ring(u64 gpa, u64 size) { device_region_->mark_dirty(gpa, size); }
    void mark_events();
    u8* place(u64 gpa, u64 size, u64 alignment, const char* what);
    bool broken(const char* format, ...) __attribute__((format(printf, 2, 3)));

    GuestMemory& memory_;
    // The writable memory where the last buffer was.
    u64 hint_start_ = 0, hint_size_ = 0;
    u8* hint_host_ = nullptr;
    const GuestMemory::Region* device_region_ = nullptr;  // of what this side of the ring writes
    QueueConfig config_;
    bool ready_ = false, packed_ = false, event_index_ = false, indirect_ = false;
    std::string error_;

    // Split
    SplitDescriptor* descriptors_ = nullptr;
    SplitAvail* avail_ = nullptr;
    SplitUsed* used_ = nullptr;
    u16 avail_seen_ = 0;  // the driver's index when we last looked
    u16 published_ = 0;   // ours, as the driver sees it
    u16 mask_ = 0;

    // Packed
    PackedDescriptor* ring_ = nullptr;
    PackedEvent* driver_event_ = nullptr;
    PackedEvent* device_event_ = nullptr;
    bool avail_wrap_ = true, used_wrap_ = true;
    u32 first_slot_ = 0;   // of what was pushed since publish()
    u16 first_flags_ = 0;  // its flags, which publish() writes
    u32 pushed_slots_ = 0;

    // Both: the next one; indices run freely in split rings, are slots in packed ones.
    u16 next_avail_ = 0;
    u16 next_used_ = 0;
};

}  // namespace polyvisor::virtio
