#include "virtio/fake_driver.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace polyvisor::virtio {

namespace {

template <class T>
T load(const T* from) {
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}
template <class T>
void store(T* to, T value) {
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
}
// As a full fence does on x86: what comes after is not before. (ThreadSanitizer knows no fences.)
void fence() {
    std::atomic<u32> word{0};
    word.fetch_add(1);
}

}  // namespace

FakeDriver::FakeDriver(GuestMemory& memory, const QueueConfig& config)
    : memory_(memory),
      config_(config),
      packed_(config.features & kRingPacked),
      event_index_(config.features & kEventIdx),
      free_(config.size),
      slots_(config.size) {
    auto clear = [&](u64 gpa, u64 bytes) {
        std::span<u8> part = memory.checked(Gpa(gpa), bytes);
        std::ranges::fill(part, 0);
        return part.data();
    };
    const u32 size = config.size;
    u8* descriptors = clear(config.descriptors, split_descriptors_bytes(size));
    u8* driver = clear(config.driver, packed_ ? sizeof(PackedEvent) : split_avail_bytes(size));
    u8* device = clear(config.device, packed_ ? sizeof(PackedEvent) : split_used_bytes(size));
    if (packed_) {
        ring_ = reinterpret_cast<PackedDescriptor*>(descriptors);
        driver_event_ = reinterpret_cast<PackedEvent*>(driver);
        device_event_ = reinterpret_cast<PackedEvent*>(device);
        for (u32 id = size; id-- > 0;) free_ids_.push_back(static_cast<u16>(id));
        return;
    }
    descriptors_ = reinterpret_cast<SplitDescriptor*>(descriptors);
    avail_ = reinterpret_cast<SplitAvail*>(driver);
    used_ = reinterpret_cast<SplitUsed*>(device);
    for (u32 n = 0; n < size; ++n) descriptors_[n].next = static_cast<u16>(n + 1);
}

std::optional<u16> FakeDriver::add(std::span<const Segment> segments, u64 table) {
    if (segments.empty()) return std::nullopt;
    auto id = packed_ ? add_packed(segments, table) : add_split(segments, table);
    outstanding_ += id.has_value();
    return id;
}

std::optional<u16> FakeDriver::add_split(std::span<const Segment> segments, u64 table) {
    const u32 count = table != 0 ? 1 : static_cast<u32>(segments.size());
    if (count > free_) return std::nullopt;
    const u16 head = free_head_;
    u16 slot = head;
    if (table != 0) {
        for (u32 n = 0; n < segments.size(); ++n) {
            const Segment& segment = segments[n];
            const bool more = n + 1 < segments.size();
            memory_.store(
                Gpa(table + 16 * n),
                SplitDescriptor{segment.gpa, segment.size,
                                static_cast<u16>((segment.write ? kWrite : 0) | (more ? kNext : 0)),
                                static_cast<u16>(more ? n + 1 : 0)});
        }
        SplitDescriptor& entry = descriptors_[slot];
        entry.address = table;
        entry.length = static_cast<u32>(16 * segments.size());
        entry.flags = kIndirect;
        slot = entry.next;
    } else {
        for (u32 n = 0; n < count; ++n) {
            SplitDescriptor& entry = descriptors_[slot];
            entry.address = segments[n].gpa;
            entry.length = segments[n].size;
            entry.flags =
                static_cast<u16>((segments[n].write ? kWrite : 0) | (n + 1 < count ? kNext : 0));
            slot = entry.next;  // the free list is the chain
        }
    }
    free_head_ = slot;
    free_ -= count;
    slots_[head] = static_cast<u16>(count);
    avail_->ring[next_avail_ % config_.size] = head;
    ++next_avail_;
    return head;
}

std::optional<u16> FakeDriver::add_packed(std::span<const Segment> segments, u64 table) {
    const u32 count = table != 0 ? 1 : static_cast<u32>(segments.size());
    if (count > free_ || free_ids_.empty()) return std::nullopt;
    const u16 id = free_ids_.back();
    free_ids_.pop_back();
    if (table != 0) {
        for (u32 n = 0; n < segments.size(); ++n) {
            memory_.store(Gpa(table + 16 * n),
                          PackedDescriptor{segments[n].gpa, segments[n].size, 0,
                                           static_cast<u16>(segments[n].write ? kWrite : 0)});
        }
    }
    for (u32 n = 0; n < count; ++n) {
        PackedDescriptor& entry = ring_[next_avail_];
        u16 flags = avail_wrap_ ? u16{kAvailFlag} : u16{kUsedFlag};
        if (table != 0) {
            entry.address = table;
            entry.length = static_cast<u32>(16 * segments.size());
            flags |= kIndirect;
        } else {
            entry.address = segments[n].gpa;
            entry.length = segments[n].size;
            flags = static_cast<u16>(flags | (segments[n].write ? kWrite : 0) |
                                     (n + 1 < count ? kNext : 0));
        }
        entry.id = id;
        if (added_++ == 0) {
            first_slot_ = next_avail_;
            first_flags_ = flags;
        } else {
            store(&entry.flags, flags);
        }
        if (++next_avail_ == config_.size) {
            next_avail_ = 0;
            avail_wrap_ = !avail_wrap_;
        }
    }
    free_ -= count;
    slots_[id] = static_cast<u16>(count);
    return id;
}

bool FakeDriver::publish() {
    if (packed_) {
        if (added_ == 0) return false;
        store(&ring_[first_slot_].flags, first_flags_);
        const u32 count = std::exchange(added_, 0);
        fence();
        const u16 flags = load(&device_event_->flags);
        if (flags != kEventDescriptor) return flags != kEventDisable;
        const u16 wanted = load(&device_event_->offset_wrap);
        u16 event = wanted & 0x7fff;
        if (static_cast<bool>(wanted >> 15) != avail_wrap_) {
            event = static_cast<u16>(event - config_.size);
        }
        return event_passed(event, next_avail_, static_cast<u16>(next_avail_ - count));
    }
    if (next_avail_ == published_) return false;
    const u16 before = std::exchange(published_, next_avail_);
    store(&avail_->index, next_avail_);
    fence();
    if (!event_index_) return !(load(&used_->flags) & kNoNotify);
    const u16* event = reinterpret_cast<const u16*>(&used_->ring[config_.size]);
    return event_passed(load(event), next_avail_, before);
}

bool FakeDriver::has_used() const {
    if (!packed_) return next_used_ != load(&used_->index);
    const u16 flags = load(&ring_[next_used_].flags);
    return static_cast<bool>(flags & kAvailFlag) == used_wrap_ &&
           static_cast<bool>(flags & kUsedFlag) == used_wrap_;
}

std::optional<FakeDriver::Used> FakeDriver::get() {
    if (!has_used()) return std::nullopt;
    Used used;
    if (packed_) {
        used = {ring_[next_used_].id, ring_[next_used_].length};
    } else {
        const SplitUsedElement& element = used_->ring[next_used_ % config_.size];
        used = {static_cast<u16>(element.id), element.length};
    }
    const u16 count = used.id < slots_.size() ? std::exchange(slots_[used.id], u16{0}) : u16{0};
    free_ += count;
    outstanding_ -= count != 0;
    if (packed_) {
        if (count != 0) free_ids_.push_back(used.id);
        u32 next = u32{next_used_} + std::max<u16>(count, 1);
        if (next >= config_.size) {
            next -= config_.size;
            used_wrap_ = !used_wrap_;
        }
        next_used_ = static_cast<u16>(next);
        return used;
    }
    ++next_used_;
    if (count != 0) {
        u16 last = used.id;
        for (u16 n = 1; n < count; ++n) last = descriptors_[last].next;
        descriptors_[last].next = free_head_;
        free_head_ = used.id;
    }
    return used;
}

void FakeDriver::disable_interrupts() {
    if (packed_) {
        store(&driver_event_->flags, u16{kEventDisable});
    } else if (!event_index_) {
        store(&avail_->flags, kNoInterrupt);
    }
}

bool FakeDriver::enable_interrupts() {
    if (packed_) {
        if (event_index_) {
            store(&driver_event_->offset_wrap, static_cast<u16>(next_used_ | used_wrap_ << 15));
        }
        store(&driver_event_->flags, u16{event_index_ ? kEventDescriptor : kEventEnable});
    } else if (event_index_) {
        store(&avail_->ring[config_.size], next_used_);
    } else {
        store(&avail_->flags, u16{0});
    }
    fence();
    return has_used();
}

}  // namespace polyvisor::virtio
