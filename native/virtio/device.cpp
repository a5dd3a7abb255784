#include "virtio/device.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::virtio {

namespace {

constexpr u8 kDriverBits = kAcknowledge | kDriver | kDriverOk | kFeaturesOk | kFailed;
constexpr u32 kMagic = 0x6f697670;  // "pvio"

// The saved state: a header, a record for each queue, the configuration space, the device's own.
struct SavedHeader {
    u32 magic, type;
    u64 driver_features;
    u8 status, failed;
    u16 queues;
    u32 config_size;
};
struct SavedQueue {
    u64 descriptors, driver, device;
    u32 size;
    u16 next_avail, next_used;
    u64 enabled;
};
static_assert(std::has_unique_object_representations_v<SavedHeader>);
static_assert(std::has_unique_object_representations_v<SavedQueue>);

template <class T>
void append(std::vector<u8>& bytes, const T& value) {
    const u8* from = reinterpret_cast<const u8*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof value);
}

template <class T>
T take(std::span<const u8>& bytes, const std::string& name) {
    if (bytes.size() < sizeof(T)) {
        throw StateError("size", "the saved state of '" + name + "' is cut short");
    }
    T value;
    std::memcpy(&value, bytes.data(), sizeof value);
    bytes = bytes.subspan(sizeof value);
    return value;
}

}  // namespace

Device::Device(const Environment& environment, Description description)
    : environment_(environment), description_(std::move(description)) {
    for (u16 size : description_.queue_sizes) {
        slots_.push_back(std::make_unique<Slot>(environment_.memory));
        slots_.back()->config.size = size;
    }
    config_.resize(description_.config_size);
}

Device::~Device() = default;

void Device::offer_packed(bool on) {
    description_.ring_features =
        on ? description_.ring_features | kRingPacked : description_.ring_features & ~kRingPacked;
}

// --- Status and features -------------------------------------------------------------------------

u8 Device::status() const {
    const u8 failed = failed_.load(std::memory_order_acquire) ? kNeedsReset : 0;
    return status_.load(std::memory_order_acquire) | failed;
}

void Device::set_status(u8 value) {
    std::lock_guard lock(status_mutex_);
    if (value == 0) {
        reset_locked();
        return;
    }
    const u8 before = status_.load(std::memory_order_relaxed);
    u8 now = before | (value & kDriverBits);  // a driver cannot clear bits (2.1.1)
    if ((now & ~before) & kFeaturesOk) {
        const u64 chosen = driver_features();
        const bool good = (chosen & ~offered_features()) == 0 && (chosen & kVersion1) != 0;
        if (!good || !accept(chosen)) now &= static_cast<u8>(~kFeaturesOk);
    }
    if (!(now & kFeaturesOk)) now &= static_cast<u8>(~kDriverOk);
    const bool starts = ((now & ~before) & kDriverOk) != 0;
    if (starts) start(driver_features());
    status_.store(now, std::memory_order_release);
    if (starts) start_locked();
}

void Device::set_driver_features(u64 features) {
    std::lock_guard lock(status_mutex_);
    if (status_.load(std::memory_order_relaxed) & kFeaturesOk) return;
    driver_features_.store(features, std::memory_order_relaxed);
}

void Device::start_locked() {
    for (unsigned i = 0; i < queues(); ++i) {
        bool alive = false;
        {
            std::lock_guard lock(slots_[i]->mutex);
            alive = slots_[i]->enabled && go_live(i);
        }
        if (alive) kick(i);  // what a driver offered before it set DRIVER_OK
    }
}

// With the slot's mutex. The rings' places are looked at only here: a driver may write them in any
// order.
bool Device::go_live(unsigned index) {
    Slot& slot = *slots_[index];
    slot.config.features = driver_features();
    slot.live = slot.queue.configure(slot.config);
    if (!slot.live) fail("queue " + std::to_string(index) + ": " + slot.queue.error());
    return slot.live;
}

void Device::reset_locked() {
    for (auto& slot : slots_) {
        std::lock_guard lock(slot->mutex);
        slot->live = false;
    }
    // Also without DRIVER_OK: a driver may have failed after its requests were taken.
    stop();
    for (unsigned i = 0; i < queues(); ++i) {
        Slot& slot = *slots_[i];
        std::lock_guard lock(slot.mutex);
        slot.queue.reset();
        slot.config = {};
        slot.config.size = description_.queue_sizes[i];
        slot.enabled = false;
    }
    {
        std::lock_guard lock(config_mutex_);
        failure_.clear();
    }
    driver_features_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_release);
    status_.store(0, std::memory_order_release);
}

void Device::fail(const std::string& why) {
    {
        std::lock_guard lock(config_mutex_);
        if (!failure_.empty()) return;
        failure_ = why;
    }
    failed_.store(true, std::memory_order_release);
    if (environment_.log != nullptr) environment_.log->note("virtio", name() + ": " + why);
    signal_config();
}

std::string Device::failure() const {
    std::lock_guard lock(config_mutex_);
    return failure_;
}

// --- Queues --------------------------------------------------------------------------------------

QueueConfig Device::queue_config(unsigned index) const {
    std::lock_guard lock(slots_[index]->mutex);
    return slots_[index]->config;
}

void Device::set_queue_config(unsigned index, const QueueConfig& config) {
    Slot& slot = *slots_[index];
    std::lock_guard lock(slot.mutex);
    if (!slot.enabled) slot.config = config;
}

bool Device::queue_enabled(unsigned index) const {
    std::lock_guard lock(slots_[index]->mutex);
    return slots_[index]->enabled;
}

void Device::enable_queue(unsigned index) {
    std::lock_guard lock(status_mutex_);
    Slot& slot = *slots_[index];
    bool alive = false;
    {
        std::lock_guard queue(slot.mutex);
        if (slot.enabled) return;
        if (slot.config.size > description_.queue_sizes[index]) {
            fail("queue " + std::to_string(index) + " has " + std::to_string(slot.config.size) +
                 " entries; the device allows " + std::to_string(description_.queue_sizes[index]));
            return;
        }
        slot.enabled = true;
        alive = (status_.load(std::memory_order_relaxed) & kDriverOk) && go_live(index);
    }
    if (alive) kick(index);
}

void Device::reset_queue(unsigned index) {
    std::lock_guard lock(status_mutex_);
    Slot& slot = *slots_[index];
    {
        std::lock_guard queue(slot.mutex);
        if (!slot.enabled) return;
        slot.live = false;
    }
    stop_queue(index);
    std::lock_guard queue(slot.mutex);
    slot.queue.reset();
    slot.config = {};
    slot.config.size = description_.queue_sizes[index];
    slot.enabled = false;
}

void Device::kick(unsigned index) {
    if (index >= queues() || quiescing_.load(std::memory_order_acquire)) return;
    Held held = hold(index);
    if (held && !quiescing_.load(std::memory_order_relaxed)) serve(index, held.queue());
}

Device::Held::Held(Device* device, unsigned index)
    : device_(nullptr), index_(index), lock_(device->slots_[index]->mutex) {
    if (device->slots_[index]->live && !device->failed_.load(std::memory_order_acquire) &&
        !device->paused_.load(std::memory_order_acquire)) {
        device_ = device;
    } else {
        lock_.unlock();
    }
}

Device::Held::~Held() {
    if (device_ == nullptr) return;
    Queue& queue = device_->slots_[index_]->queue;
    // A queue that broke shows what was pushed before.
    const bool wanted = queue.publish();
    if (PV_UNLIKELY(!queue.error().empty())) {
        device_->fail("queue " + std::to_string(index_) + ": " + queue.error());
        return;
    }
    DriverSignals* signals = device_->signals_.load(std::memory_order_acquire);
    if (wanted && signals != nullptr) signals->queue_used(index_);
}

// --- Configuration space -------------------------------------------------------------------------

void Device::read_config(u32 offset, std::span<u8> data) const {
    std::lock_guard lock(config_mutex_);
    std::fill(data.begin(), data.end(), u8{0});
    if (offset >= config_.size()) return;
    const std::size_t here = std::min(data.size(), config_.size() - offset);
    std::memcpy(data.data(), config_.data() + offset, here);
}

void Device::write_config(u32 offset, std::span<const u8> data) {
    bool written = false;
    {
        std::lock_guard lock(config_mutex_);
        for (std::size_t i = 0; i < data.size() && offset + i < config_.size(); ++i) {
            if (!config_writable(static_cast<u32>(offset + i))) continue;
            config_[offset + i] = data[i];
            written = true;
        }
    }
    if (written) config_written(offset, static_cast<u32>(data.size()));
}

void Device::set_config(u32 offset, std::span<const u8> bytes) {
    {
        std::lock_guard lock(config_mutex_);
        if (offset + bytes.size() > config_.size() ||
            std::equal(bytes.begin(), bytes.end(), config_.begin() + offset)) {
            return;
        }
        std::copy(bytes.begin(), bytes.end(), config_.begin() + offset);
    }
    generation_.fetch_add(1, std::memory_order_acq_rel);
    signal_config();
}

// (Before DRIVER_OK there is nobody who would want to know.)
void Device::signal_config() {
    DriverSignals* signals = signals_.load(std::memory_order_acquire);
    if (signals != nullptr && (status_.load(std::memory_order_acquire) & kDriverOk)) {
        signals->config_changed();
    }
}

// --- The machine ---------------------------------------------------------------------------------

void Device::pause() {
    std::lock_guard lock(status_mutex_);
    if (paused_.load(std::memory_order_relaxed)) return;
    quiescing_.store(true, std::memory_order_release);
    // A serve() under way comes to its end, and what it has begun is in flight.
    for (auto& slot : slots_) std::lock_guard wait(slot->mutex);
    quiesce();
    paused_.store(true, std::memory_order_release);
    // Who held a queue when the flag was set has let go of it after this.
    for (auto& slot : slots_) std::lock_guard wait(slot->mutex);
}

void Device::resume() {
    std::lock_guard lock(status_mutex_);
    if (!paused_.load(std::memory_order_relaxed)) return;
    paused_.store(false, std::memory_order_release);
    quiescing_.store(false, std::memory_order_release);
    unquiesce();
    for (unsigned i = 0; i < queues(); ++i) kick(i);
}

std::vector<u8> Device::save() const {
    std::lock_guard lock(status_mutex_);
    std::vector<u8> bytes;
    append(bytes, SavedHeader{kMagic, description_.type, driver_features(),
                              status_.load(std::memory_order_relaxed),
                              failed_.load(std::memory_order_relaxed), static_cast<u16>(queues()),
                              static_cast<u32>(config_.size())});
    for (const auto& slot : slots_) {
        std::lock_guard queue(slot->mutex);
        Queue::Positions at;
        if (slot->live) at = slot->queue.positions();
        append(bytes, SavedQueue{slot->config.descriptors, slot->config.driver, slot->config.device,
                                 slot->config.size, at.next_avail, at.next_used, slot->enabled});
    }
    {
        std::lock_guard config(config_mutex_);
        bytes.insert(bytes.end(), config_.begin(), config_.end());
    }
    std::vector<u8> own = save_device();
    bytes.insert(bytes.end(), own.begin(), own.end());
    return bytes;
}

void Device::restore(std::span<const u8> state) {
    std::lock_guard lock(status_mutex_);
    auto header = take<SavedHeader>(state, name());
    auto check = [&](bool good, const char* field) {
        if (good) return;
        throw StateError(field, "the saved state of '" + name() + "' has another '" + field +
                                    "' than the device; make it as the snapshot's was made");
    };
    check(header.magic == kMagic, "magic");
    check(header.type == description_.type, "type");
    check(header.queues == queues(), "queues");
    check(header.config_size == config_.size(), "config_size");
    check((header.driver_features & ~offered_features()) == 0, "features");
    check((header.status & ~kDriverBits) == 0, "status");
    std::vector<SavedQueue> saved;
    for (unsigned i = 0; i < queues(); ++i) {
        saved.push_back(take<SavedQueue>(state, name()));
        check(saved.back().size <= description_.queue_sizes[i], "queue size");
        QueueConfig places{saved[i].size, saved[i].descriptors, saved[i].driver, saved[i].device,
                           header.driver_features};
        Queue trial(environment_.memory);
        const bool lives = saved[i].enabled && (header.status & kDriverOk) && !header.failed;
        check(!lives || (trial.configure(places) &&
                         trial.set_positions({saved[i].next_avail, saved[i].next_used})),
              "queue");
    }
    check(state.size() >= config_.size(), "size");
    const auto config = state.first(config_.size());
    if (status_.load(std::memory_order_relaxed) != 0) reset_locked();
    restore_device(state.subspan(config_.size()));  // may throw; a device that was reset is sound
    {
        std::lock_guard guard(config_mutex_);
        std::copy(config.begin(), config.end(), config_.begin());
        if (header.failed) failure_ = "it failed before the snapshot";
    }
    generation_.fetch_add(1);
    driver_features_.store(header.driver_features, std::memory_order_relaxed);
    failed_.store(header.failed, std::memory_order_release);
    if (header.status & kDriverOk) start(header.driver_features);
    status_.store(header.status, std::memory_order_release);
    for (unsigned i = 0; i < queues(); ++i) {
        Slot& slot = *slots_[i];
        std::lock_guard queue(slot.mutex);
        slot.config = {saved[i].size, saved[i].descriptors, saved[i].driver, saved[i].device, 0};
        slot.enabled = saved[i].enabled;
        if (slot.enabled && (header.status & kDriverOk) && !header.failed && go_live(i)) {
            slot.queue.set_positions({saved[i].next_avail, saved[i].next_used});
        }
    }
}

void Device::restore_device(std::span<const u8> state) {
    if (!state.empty()) {
        throw StateError("size", "the saved state of '" + name() + "' is longer than it can be");
    }
}

}  // namespace polyvisor::virtio
