// Split virtqueues (virtio 1.2, 2.7).
#include "virtio/queue.hpp"

namespace polyvisor::virtio {

bool Queue::pop_split(Chain& chain) {
    if (next_avail_ == avail_seen_) {
        if (!ready_) return false;
        avail_seen_ = load(&avail_->index);
        const u16 waiting = static_cast<u16>(avail_seen_ - next_avail_);
        if (waiting == 0) return false;
        if (waiting > config_.size) {
            return broken("the driver offers %u chains in a queue of %u", waiting, config_.size);
        }
    }
    const u32 size = config_.size;
    u32 slot = __atomic_load_n(&avail_->ring[next_avail_ & mask_], __ATOMIC_RELAXED);
    const u32 head = slot;
    Chain::Cursor at;
    Buffer* buffers = chain.buffers_.get();
    for (u32 seen = 1;; ++seen) {
        if (PV_UNLIKELY(slot >= size)) {
            return broken("a chain leads to descriptor %u of a queue of %u", slot, size);
        }
        const SplitDescriptor entry = copy_descriptor(&descriptors_[slot]);
        if (PV_UNLIKELY(entry.flags & kIndirect)) {
            if (entry.flags & kNext) {
                return broken("an indirect descriptor that another one follows");
            }
            Chain::Cursor copy = at;  // so that `at` itself stays in registers
            if (!add_indirect(copy, buffers, entry.address, entry.length)) return false;
            at = copy;
            break;
        }
        if (PV_UNLIKELY(!add(at, buffers, entry.address, entry.length, entry.flags & kWrite))) {
            return false;
        }
        if (!(entry.flags & kNext)) break;
        slot = entry.next;
        if (PV_UNLIKELY(seen == size)) return broken("a chain's descriptors lead in a circle");
    }
    chain.finish(at, head, 1);
    ++next_avail_;
    return true;
}

void Queue::push_split(const Chain& chain, u32 written) {
    used_->ring[next_used_ & mask_] = {chain.id_, written};
    ++next_used_;
}

bool Queue::publish_split() {
    if (next_used_ == published_ || used_ == nullptr) return false;
    const u16 before = published_;
    published_ = next_used_;
    store(&used_->index, next_used_);
    const u32 first = before & mask_, count = static_cast<u16>(next_used_ - before);
    if (first + count > config_.size || config_.size <= 256) {  // one page, or nearly
        mark_ring(config_.device, split_used_bytes(config_.size));
    } else {
        mark_ring(config_.device + 4 + u64{8} * first, u64{8} * count);
        mark_ring(config_.device, 4);
    }
    // The marks are read-modify-writes, which keep what follows behind the index (2.7.7.2). A
    // driver that went to sleep in between would never wake up otherwise.
    if (event_index_) return event_passed(load(&avail_->ring[config_.size]), next_used_, before);
    return !(load(&avail_->flags) & kNoInterrupt);
}

void Queue::disable_notify() {
    if (!ready_) return;
    if (packed_) {
        store(&device_event_->flags, u16{kEventDisable});
        mark_events();
    } else if (!event_index_) {  // otherwise the event's index stays behind, which is enough
        store(&used_->flags, kNoNotify);
        mark_ring(config_.device, 2);
    }
}

bool Queue::enable_notify() {
    if (!ready_) return false;
    if (packed_) {
        if (event_index_) {
            store(&device_event_->offset_wrap, positions().next_avail);
            store(&device_event_->flags, u16{kEventDescriptor});
        } else {
            store(&device_event_->flags, u16{kEventEnable});
        }
        mark_events();
    } else if (event_index_) {
        u16* avail_event = reinterpret_cast<u16*>(&used_->ring[config_.size]);
        store(avail_event, next_avail_);
        mark_ring(config_.device + 4 + u64{8} * config_.size, 2);
    } else {
        store(&used_->flags, u16{0});
        mark_ring(config_.device, 2);
    }
    return available();  // behind the marks' barrier
}

}  // namespace polyvisor::virtio
