// The two layouts of a virtqueue in guest memory (virtio 1.2, 2.7 and 2.8), as both sides see them.
// All fields are little-endian, as is the only host this runs on.
#pragma once

#include <bit>

#include "base/types.hpp"

namespace polyvisor::virtio {

/// Feature bits that concern the rings (virtio 1.2, 6).
enum RingFeature : u64 {
    kIndirectDesc = bit(28),
    kEventIdx = bit(29),
    kVersion1 = bit(32),
    kRingPacked = bit(34),
    kInOrder = bit(35),
    kRingReset = bit(40),
};

/// Flags of a descriptor; the last two in packed rings only.
enum DescriptorFlag : u16 {
    kNext = 1,
    kWrite = 2,  ///< the device writes it
    kIndirect = 4,
    kAvailFlag = 1 << 7,
    kUsedFlag = 1 << 15,
};

// --- Split (2.7) ---------------------------------------------------------------------------------

struct SplitDescriptor {
    u64 address;
    u32 length;
    u16 flags;
    u16 next;
};
static_assert(sizeof(SplitDescriptor) == 16);

/// What the driver offers. `ring` has the queue's size of entries, and used_event behind it.
struct SplitAvail {
    u16 flags;  ///< kNoInterrupt
    u16 index;
    u16 ring[];
};
inline constexpr u16 kNoInterrupt = 1;

struct SplitUsedElement {
    u32 id;
    u32 length;
};
/// What the device gave back; avail_event behind the ring.
struct SplitUsed {
    u16 flags;  ///< kNoNotify
    u16 index;
    SplitUsedElement ring[];
};
inline constexpr u16 kNoNotify = 1;

/// One copy of a descriptor of either layout, whatever the other side does to it meanwhile.
template <class Descriptor>
Descriptor copy_descriptor(const Descriptor* from) {
    static_assert(sizeof(Descriptor) == 16);
    const u64* words = reinterpret_cast<const u64*>(from);
    const u64 copied[2] = {__atomic_load_n(words, __ATOMIC_RELAXED),
                           __atomic_load_n(words + 1, __ATOMIC_RELAXED)};
    return std::bit_cast<Descriptor>(copied);
}

constexpr u64 split_descriptors_bytes(u32 size) {
    return u64{16} * size;
}
constexpr u64 split_avail_bytes(u32 size) {
    return 6 + u64{2} * size;
}
constexpr u64 split_used_bytes(u32 size) {
    return 6 + u64{8} * size;
}

/// Whether index moved past `event` on its way from `before` to `now` (2.7.10).
constexpr bool event_passed(u16 event, u16 now, u16 before) {
    return static_cast<u16>(now - event - 1) < static_cast<u16>(now - before);
}

// --- Packed (2.8) --------------------------------------------------------------------------------

struct PackedDescriptor {
    u64 address;
    u32 length;
    u16 id;
    u16 flags;
};
static_assert(sizeof(PackedDescriptor) == 16);

/// Event suppression of one side (2.8.14).
struct PackedEvent {
    u16 offset_wrap;  ///< bit 15 is the wrap counter
    u16 flags;
};
enum PackedEventFlags : u16 { kEventEnable = 0, kEventDisable = 1, kEventDescriptor = 2 };

}  // namespace polyvisor::virtio
