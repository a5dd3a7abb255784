#include "bus/bus.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor {

namespace {

constexpr u32 kFirstCapacity = 32;

std::string hex(u64 value) {
    char text[24];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

}  // namespace

void Device::restore(std::span<const u8> state) {
    if (!state.empty()) {
        throw StateError("size", "device '" + std::string(name()) + "' has no state, but " +
                                     std::to_string(state.size()) + " bytes were given for it");
    }
}

Bus::Bus(std::string name, u64 limit) : name_(std::move(name)), limit_(limit) {
    arrays_.push_back(std::make_unique<Slots>(kFirstCapacity));
    current_.store(arrays_.back().get(), std::memory_order_release);
}

void Bus::attach(u64 start, u64 size, std::shared_ptr<Device> device, u64 base) {
    std::string what = name_ + " range " + hex(start) + "+" + hex(size) + " of device '" +
                       std::string(device->name()) + "'";
    if (size == 0 || start >= limit_ || size > limit_ - start) {
        throw MemoryRangeError(start, size,
                               what + " is empty or beyond the end of the bus at " + hex(limit_));
    }
    std::lock_guard lock(mutex_);
    auto next = std::find_if(ranges_.begin(), ranges_.end(),
                             [&](const Range& range) { return range.start + range.size > start; });
    if (next != ranges_.end() && next->start < start + size) {
        throw MemoryRangeError(start, size,
                               what + " overlaps device '" + std::string(next->device->name()) +
                                   "' at " + hex(next->start) + "+" + hex(next->size));
    }
    if (std::find(kept_.begin(), kept_.end(), device) == kept_.end()) kept_.push_back(device);
    auto at = ranges_.insert(next, Range{start, size, base, std::move(device)});
    publish();
    if (observer_) observer_(*at, true);
}

void Bus::detach(u64 start) {
    std::lock_guard lock(mutex_);
    auto at = std::find_if(ranges_.begin(), ranges_.end(),
                           [&](const Range& range) { return range.start == start; });
    if (at == ranges_.end()) {
        throw MemoryRangeError(start, 0,
                               "no device starts at " + hex(start) + " of the " + name_ +
                                   " bus, so none can be detached there");
    }
    Range gone = std::move(*at);
    ranges_.erase(at);
    publish();
    if (observer_) observer_(gone, false);
}

void Bus::set_observer(Observer observer) {
    std::lock_guard lock(mutex_);
    observer_ = std::move(observer);
    if (!observer_) return;
    for (const Range& range : ranges_) observer_(range, true);
}

void Bus::release_detached() {
    std::vector<std::shared_ptr<Device>> gone;  // destroyed last, without the mutex
    std::lock_guard lock(mutex_);
    auto attached = [&](const std::shared_ptr<Device>& device) {
        return std::any_of(ranges_.begin(), ranges_.end(),
                           [&](const Range& range) { return range.device == device; });
    };
    auto middle = std::partition(kept_.begin(), kept_.end(), attached);
    gone.assign(std::make_move_iterator(middle), std::make_move_iterator(kept_.end()));
    kept_.erase(middle, kept_.end());
}

// The writer's half of the sequence lock. Each store is a release so that a reader who sees it also
// sees the odd count stored before it.
void Bus::publish() {
    u64 sequence = sequence_.load(std::memory_order_relaxed);
    sequence_.store(sequence + 1, std::memory_order_relaxed);
    if (ranges_.size() > arrays_.back()->capacity) {
        arrays_.push_back(std::make_unique<Slots>(arrays_.back()->capacity * 2));
    }
    Slots& array = *arrays_.back();
    array.count.store(static_cast<u32>(ranges_.size()), std::memory_order_release);
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
        Slot& slot = array.slots[i];
        slot.start.store(ranges_[i].start, std::memory_order_release);
        slot.size.store(ranges_[i].size, std::memory_order_release);
        slot.base.store(ranges_[i].base, std::memory_order_release);
        slot.device.store(ranges_[i].device.get(), std::memory_order_release);
    }
    current_.store(&array, std::memory_order_release);
    sequence_.store(sequence + 2, std::memory_order_release);
}

Bus::Target Bus::lookup(u64 address, u64 size) const {
    constexpr auto acquire = std::memory_order_acquire;
    for (;;) {
        u64 sequence = sequence_.load(acquire);
        if (PV_UNLIKELY(sequence & 1)) continue;  // a few stores, never a wait for a lock
        const Slots* array = current_.load(acquire);
        u32 count = std::min(array->count.load(acquire), array->capacity);
        u32 at = hint_.load(std::memory_order_relaxed);
        if (at >= count ||
            address - array->slots[at].start.load(acquire) >= array->slots[at].size.load(acquire)) {
            u32 low = 0;
            for (u32 high = count; low < high;) {  // the first that starts beyond the address
                u32 middle = (low + high) / 2;
                if (array->slots[middle].start.load(acquire) <= address) {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            at = low - 1;  // ~0 when the address is below all
            if (at < count) hint_.store(at, std::memory_order_relaxed);
        }
        Target target{nullptr, 0};
        if (at < count) {
            const Slot& slot = array->slots[at];
            u64 offset = address - slot.start.load(acquire);
            u64 room = slot.size.load(acquire);
            if (offset < room && size <= room - offset) {
                target = {slot.device.load(acquire), offset + slot.base.load(acquire)};
            }
        }
        if (PV_LIKELY(sequence_.load(std::memory_order_relaxed) == sequence)) return target;
    }
}

bool Bus::read(u64 address, std::span<u8> data) {
    Target target = lookup(address, data.size());
    if (PV_LIKELY(target.device != nullptr)) {
        target.device->reads_.fetch_add(1, std::memory_order_relaxed);
        target.device->read(target.offset, data);
        return true;
    }
    std::memset(data.data(), 0xff, data.size());
    unclaimed_.fetch_add(1, std::memory_order_relaxed);
    return false;
}

bool Bus::write(u64 address, std::span<const u8> data) {
    Target target = lookup(address, data.size());
    if (PV_LIKELY(target.device != nullptr)) {
        target.device->writes_.fetch_add(1, std::memory_order_relaxed);
        target.device->write(target.offset, data);
        return true;
    }
    unclaimed_.fetch_add(1, std::memory_order_relaxed);
    return false;
}

Device* Bus::find(u64 address) const {
    return lookup(address, 1).device;
}

std::vector<Bus::Range> Bus::ranges() const {
    std::lock_guard lock(mutex_);
    return ranges_;
}

}  // namespace polyvisor
