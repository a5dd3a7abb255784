// Packed virtqueues (virtio 1.2, 2.8): one ring, in which the device overwrites the descriptors of
// the chains that it gives back. An entry belongs to the side that its two flags name, as both
// sides count how often the ring went round.
#include "virtio/queue.hpp"

namespace polyvisor::virtio {

bool Queue::descriptor_ready(u32 slot, bool wrap) const {
    const u16 flags = load(&ring_[slot].flags);
    return static_cast<bool>(flags & kAvailFlag) == wrap &&
           static_cast<bool>(flags & kUsedFlag) != wrap;
}

bool Queue::pop_packed(Chain& chain) {
    if (!ready_ || !descriptor_ready(next_avail_, avail_wrap_)) return false;
    const u32 size = config_.size;
    u32 slot = next_avail_, seen = 0;
    bool wrapped = false;
    u16 id = 0;
    Chain::Cursor at;
    Buffer* buffers = chain.buffers_.get();
    for (bool more = true; more;) {
        if (PV_UNLIKELY(seen == size)) return broken("a chain is longer than its queue");
        const PackedDescriptor entry = copy_descriptor(&ring_[slot]);
        ++seen;
        if (++slot == size) {
            slot = 0;
            wrapped = true;
        }
        id = entry.id;  // the last one's counts
        more = entry.flags & kNext;
        if (PV_UNLIKELY(entry.flags & kIndirect)) {
            if (more) return broken("an indirect descriptor that another one follows");
            Chain::Cursor copy = at;  // so that `at` itself stays in registers
            if (!add_indirect(copy, buffers, entry.address, entry.length)) return false;
            at = copy;
        } else if (PV_UNLIKELY(
                       !add(at, buffers, entry.address, entry.length, entry.flags & kWrite))) {
            return false;
        }
    }
    chain.finish(at, id, seen);
    next_avail_ = static_cast<u16>(slot);
    avail_wrap_ ^= wrapped;
    return true;
}

void Queue::push_packed(const Chain& chain, u32 written) {
    PackedDescriptor& entry = ring_[next_used_];
    entry.id = chain.id_;
    entry.length = written;
    const u16 flags =
        static_cast<u16>((used_wrap_ ? kAvailFlag | kUsedFlag : 0) | (written != 0 ? kWrite : 0));
    if (pushed_slots_ == 0) {
        // The first one's flags come last, so that the driver sees all or nothing.
        first_slot_ = next_used_;
        first_flags_ = flags;
    } else {
        store(&entry.flags, flags);
    }
    pushed_slots_ += chain.slots_;
    u32 next = u32{next_used_} + chain.slots_;
    if (next >= config_.size) {
        next -= config_.size;
        used_wrap_ = !used_wrap_;
    }
    next_used_ = static_cast<u16>(next);
}

void Queue::mark_events() {
    memory_.find(Gpa(config_.device))->mark_dirty(config_.device, sizeof(PackedEvent));
}

bool Queue::publish_packed() {
    if (pushed_slots_ == 0) return false;
    store(&ring_[first_slot_].flags, first_flags_);
    const u32 count = pushed_slots_;
    pushed_slots_ = 0;
    if (first_slot_ + count <= config_.size) {
        mark_ring(config_.descriptors + u64{16} * first_slot_, u64{16} * count);
    } else {
        mark_ring(config_.descriptors, split_descriptors_bytes(config_.size));
    }
    // Behind the mark's barrier, as in publish_split().
    const u16 flags = load(&driver_event_->flags);
    if (flags != kEventDescriptor) return flags != kEventDisable;
    const u16 wanted = load(&driver_event_->offset_wrap);
    u16 event = wanted & 0x7fff;
    if (static_cast<bool>(wanted >> 15) != used_wrap_) {
        event = static_cast<u16>(event - config_.size);
    }
    return event_passed(event, next_used_, static_cast<u16>(next_used_ - count));
}

}  // namespace polyvisor::virtio
