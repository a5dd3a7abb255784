#include "virtio/fake_guest.hpp"

#include <algorithm>
#include <bit>

#include "base/error.hpp"

namespace polyvisor::virtio {

FakeGuest::FakeGuest(Device& device, GuestMemory& memory, const Options& options)
    : device_(device), memory_(memory), options_(options), next_(options.base) {
    interrupts_.resize(device.queues());
    device.reset();
    device.set_status(kAcknowledge);
    device.set_status(kAcknowledge | kDriver);
    features_ = (options.features | kVersion1) & device.offered_features();
    device.set_driver_features(features_);
    device.set_status(kAcknowledge | kDriver | kFeaturesOk);
    if (!(device.status() & kFeaturesOk)) {
        throw StateMismatch("device '" + device.name() + "' refuses the features");
    }
    for (unsigned i = 0; i < device.queues(); ++i) {
        QueueConfig config = device.queue_config(i);
        config.size = std::min(config.size, std::bit_floor(options.queue_size));
        config.descriptors = buffer(static_cast<u32>(split_descriptors_bytes(config.size)));
        config.driver = buffer(static_cast<u32>(split_avail_bytes(config.size)));
        config.device = buffer(static_cast<u32>(split_used_bytes(config.size)));
        config.features = features_;
        drivers_.push_back(std::make_unique<FakeDriver>(memory, config));
        device.set_queue_config(i, config);
        device.enable_queue(i);
    }
    first_buffer_ = next_;
    device.connect(this);
    if (options.start) device.set_status(kAcknowledge | kDriver | kFeaturesOk | kDriverOk);
}

FakeGuest::~FakeGuest() {
    device_.reset();
    device_.connect(nullptr);
}

void FakeGuest::queue_used(unsigned queue) {
    std::lock_guard lock(mutex_);
    ++interrupts_[queue];
    changed_.notify_all();
}

void FakeGuest::config_changed() {
    std::lock_guard lock(mutex_);
    ++config_interrupts_;
    changed_.notify_all();
}

void FakeGuest::kick(unsigned queue) {
    if (drivers_[queue]->publish()) device_.kick(queue);
}

std::optional<FakeDriver::Used> FakeGuest::wait(unsigned queue, std::chrono::nanoseconds timeout) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    std::unique_lock lock(mutex_);
    while (true) {
        const u64 seen = interrupts_[queue];
        lock.unlock();
        // Asks for an interrupt first, so that one that comes in between counts.
        drivers_[queue]->enable_interrupts();
        if (auto used = drivers_[queue]->get()) return used;
        lock.lock();
        if (!changed_.wait_until(lock, deadline, [&] { return interrupts_[queue] != seen; })) {
            lock.unlock();
            return drivers_[queue]->get();
        }
    }
}

u64 FakeGuest::buffer(u32 size) {
    const u64 at = next_;
    memory_.checked(Gpa(at), std::max(size, 1u));
    next_ += (u64{size} + 15) & ~u64{15};
    return at;
}

u64 FakeGuest::buffer(std::span<const u8> contents) {
    const u64 at = buffer(static_cast<u32>(contents.size()));
    memory_.write(Gpa(at), contents);
    return at;
}

std::vector<u8> FakeGuest::bytes(u64 gpa, u32 size) const {
    std::vector<u8> result(size);
    memory_.read(Gpa(gpa), result);
    return result;
}

std::vector<u8> FakeGuest::request(unsigned queue, std::initializer_list<std::span<const u8>> out,
                                   u32 in) {
    std::vector<FakeDriver::Segment> segments;
    for (std::span<const u8> part : out) {
        segments.push_back({buffer(part), static_cast<u32>(part.size()), false});
    }
    u64 answer = 0;
    if (in != 0) {
        answer = buffer(in);
        segments.push_back({answer, in, true});
    }
    auto id = drivers_[queue]->add(segments);
    if (!id) throw StateMismatch("queue " + std::to_string(queue) + " is full");
    kick(queue);
    auto used = wait(queue);
    if (!used) {
        throw StateMismatch("device '" + device_.name() +
                            "' does not answer: " + device_.failure());
    }
    return bytes(answer, in != 0 ? std::min(used->written, in) : 0);
}

u64 FakeGuest::interrupts(unsigned queue) const {
    std::lock_guard lock(mutex_);
    return interrupts_[queue];
}

u64 FakeGuest::config_interrupts() const {
    std::lock_guard lock(mutex_);
    return config_interrupts_;
}

}  // namespace polyvisor::virtio
