// What split and packed queues have in common.
#include "virtio/queue.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace polyvisor::virtio {

namespace {

constexpr u32 kLargest = 32768;
constexpr char kTableInTable[] = "an indirect table inside an indirect table";

unsigned long long wide(u64 value) {
    return value;
}

}  // namespace

void Queue::reset() {
    ready_ = false;
    packed_ = false;
    error_.clear();
    config_ = {};
    avail_seen_ = published_ = next_avail_ = next_used_ = 0;
    avail_wrap_ = used_wrap_ = true;
    pushed_slots_ = 0;
}

bool Queue::configure(const QueueConfig& config) {
    reset();
    config_ = config;
    event_index_ = config.features & kEventIdx;
    indirect_ = config.features & kIndirectDesc;
    const bool packed = config.features & kRingPacked;
    const u32 size = config.size;
    if (size == 0 || size > kLargest || (!packed && !std::has_single_bit(size))) {
        return broken("the queue's size is %u, but must be %s up to %u", size,
                      packed ? "a number" : "a power of two", kLargest);
    }
    u8* descriptors = place(config.descriptors, split_descriptors_bytes(size), 16, "descriptors");
    u8* driver = place(config.driver, packed ? sizeof(PackedEvent) : split_avail_bytes(size),
                       packed ? 4 : 2, packed ? "driver events" : "available ring");
    u8* device = place(config.device, packed ? sizeof(PackedEvent) : split_used_bytes(size), 4,
                       packed ? "device events" : "used ring");
    if (!error_.empty()) return false;
    if (packed) {
        ring_ = reinterpret_cast<PackedDescriptor*>(descriptors);
        driver_event_ = reinterpret_cast<PackedEvent*>(driver);
        device_event_ = reinterpret_cast<PackedEvent*>(device);
    } else {
        descriptors_ = reinterpret_cast<SplitDescriptor*>(descriptors);
        avail_ = reinterpret_cast<SplitAvail*>(driver);
        used_ = reinterpret_cast<SplitUsed*>(device);
        mask_ = static_cast<u16>(size - 1);
    }
    // Packed queues have their events apart, which are written rarely: see mark_events().
    device_region_ = memory_.find(Gpa(packed ? config.descriptors : config.device));
    packed_ = packed;
    ready_ = true;
    return true;
}

// The host's address of a part of the queue. ROM is refused for all parts: a driver that works has
// no reason to put one there.
u8* Queue::place(u64 gpa, u64 size, u64 alignment, const char* what) {
    if (gpa % alignment != 0) {
        broken("the %s at 0x%llx are not aligned to %llu", what, wide(gpa), wide(alignment));
        return nullptr;
    }
    const GuestMemory::Region* region = memory_.find(Gpa(gpa));
    if (region == nullptr || region->read_only ||
        size > region->size - (gpa - region->start.value)) {
        broken("the %s, %llu bytes at 0x%llx, are not in the guest's memory", what, wide(size),
               wide(gpa));
        return nullptr;
    }
    return region->host(gpa);
}

bool Queue::broken(const char* format, ...) {
    if (!error_.empty()) return false;  // the first reason is the one
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error_ = text;
    ready_ = false;
    avail_seen_ = next_avail_;  // pop() looks at `ready_` only when it has nothing left
    return false;
}

bool Queue::available() {
    if (!ready_) return false;
    if (packed_) return descriptor_ready(next_avail_, avail_wrap_);
    return next_avail_ != load(&avail_->index);
}

void Queue::unpop(const Chain& chain) {
    if (!packed_) {
        --next_avail_;
        return;
    }
    if (next_avail_ < chain.slots_) {
        next_avail_ = static_cast<u16>(next_avail_ + config_.size);
        avail_wrap_ = !avail_wrap_;
    }
    next_avail_ = static_cast<u16>(next_avail_ - chain.slots_);
}

bool Queue::publish() {
    return packed_ ? publish_packed() : publish_split();
}

// --- Buffers -------------------------------------------------------------------------------------

// What add() leaves: a mistake, or a buffer that lies in another region of memory, or in several.
bool Queue::add_slowly(Chain::Cursor& at, Buffer* buffers, u64 address, u32 length, bool write) {
    if (!write && at.writable_bytes != 0) {
        return broken("a descriptor that the device reads stands behind one that it writes");
    }
    if (write && at.writable_bytes == 0) at.readable = at.count;
    u32& bytes = write ? at.writable_bytes : at.readable_bytes;
    if (__builtin_add_overflow(bytes, length, &bytes)) {
        return broken("a chain is 4 GiB long or more");
    }
    const u64 first = address;
    for (u64 left = length; left != 0;) {
        const GuestMemory::Region* region = memory_.find(Gpa(address));
        if (region == nullptr || (write && region->read_only)) {
            return broken("a buffer of %u bytes at 0x%llx is not in the guest's memory", length,
                          wide(first));
        }
        if (at.count == Chain::kMost) {
            return broken("a chain has more than %u buffers", Chain::kMost);
        }
        const u64 here = std::min(left, region->size - (address - region->start.value));
        buffers[at.count++] = {region->host(address), static_cast<u32>(here), address};
        if (!region->read_only) {
            hint_start_ = region->start.value;
            hint_size_ = region->size;
            hint_host_ = region->host(hint_start_);
        }
        address += here;
        left -= here;
    }
    return true;
}

// A table of descriptors outside the ring (2.7.5.3, 2.8.7). In packed queues its entries follow one
// another; in split ones they are linked.
bool Queue::add_indirect(Chain::Cursor& at, Buffer* buffers, u64 address, u32 length) {
    if (!indirect_) return broken("an indirect descriptor, which was not negotiated");
    if (length == 0 || length % sizeof(SplitDescriptor) != 0) {
        return broken("an indirect table of %u bytes, which is no multiple of 16", length);
    }
    const u8* table = memory_.span(Gpa(address), length).data();
    if (table == nullptr) {
        return broken("an indirect table of %u bytes at 0x%llx is not in the guest's memory",
                      length, wide(address));
    }
    const u32 entries = length / sizeof(SplitDescriptor);
    u32 slot = 0;
    for (u32 seen = 1;; ++seen) {
        if (packed_) {
            PackedDescriptor entry;
            std::memcpy(&entry, table + sizeof entry * slot, sizeof entry);
            if (entry.flags & kIndirect) return broken("%s", kTableInTable);
            if (!add(at, buffers, entry.address, entry.length, entry.flags & kWrite)) return false;
            if (++slot == entries) return true;
            continue;
        }
        SplitDescriptor entry;
        std::memcpy(&entry, table + sizeof entry * slot, sizeof entry);
        if (entry.flags & kIndirect) return broken("%s", kTableInTable);
        if (!add(at, buffers, entry.address, entry.length, entry.flags & kWrite)) return false;
        if (!(entry.flags & kNext)) return true;
        slot = entry.next;
        if (slot >= entries) {
            return broken("an indirect table of %u entries leads to its entry %u", entries, slot);
        }
        if (seen == entries) return broken("an indirect table's descriptors lead in a circle");
    }
}

void Queue::mark_written(const Chain& chain, u32 written) {
    for (const Buffer& buffer : chain.writable()) {
        u32 here = std::min(written, buffer.size);
        memory_.note_write(Gpa(buffer.gpa), here);
        written -= here;
        if (written == 0) return;
    }
}

// --- Snapshots -----------------------------------------------------------------------------------

Queue::Positions Queue::positions() const {
    if (!packed_) return {next_avail_, next_used_};
    return {static_cast<u16>(next_avail_ | avail_wrap_ << 15),
            static_cast<u16>(next_used_ | used_wrap_ << 15)};
}

bool Queue::set_positions(Positions positions) {
    if (!ready_) return false;
    if (!packed_) {
        if (static_cast<u16>(positions.next_avail - positions.next_used) > config_.size) {
            return false;
        }
        next_avail_ = avail_seen_ = positions.next_avail;
        next_used_ = published_ = positions.next_used;
        return true;
    }
    const u16 avail = positions.next_avail & 0x7fff, used = positions.next_used & 0x7fff;
    if (avail >= config_.size || used >= config_.size) return false;
    next_avail_ = avail;
    avail_wrap_ = positions.next_avail >> 15;
    next_used_ = used;
    used_wrap_ = positions.next_used >> 15;
    pushed_slots_ = 0;
    return true;
}

}  // namespace polyvisor::virtio
