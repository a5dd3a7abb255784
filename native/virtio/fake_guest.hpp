// A whole driver without Linux, for tests, fuzzers and benchmarks of devices: negotiates features,
// lays out the queues in guest memory, starts the device, and offers requests in buffers of its
// own.
//
//     FakeGuest guest(device, memory, {.features = kVersion1 | kEventIdx});
//     auto answer = guest.request(0, {bytes}, 512);   // waits for the device; the written part
//     guest.driver(1).add(...); guest.kick(1);         // or by hand
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "virtio/device.hpp"
#include "virtio/fake_driver.hpp"

namespace polyvisor::virtio {

class FakeGuest final : public DriverSignals {
  public:
    struct Options {
        u64 features = ~u64{0};  ///< of those that the device offers
        u32 queue_size = 256;    ///< at most; the device's own limit counts too
        u64 base = 0x10000;      ///< guest-physical: queues first, buffers behind them
        bool start = true;
        u32 seconds = 10;  ///< how long request() waits
    };
    /// Resets the device and starts it. Throws MemoryRangeError when the queues do not fit into the
    /// memory from `base` on, StateMismatch when the device refuses the features.
    FakeGuest(Device& device, GuestMemory& memory, const Options& options);
    FakeGuest(Device& device, GuestMemory& memory) : FakeGuest(device, memory, Options()) {}
    ~FakeGuest() override;  // resets the device

    void queue_used(unsigned queue) override;
    void config_changed() override;

    Device& device() { return device_; }
    u64 features() const { return features_; }
    FakeDriver& driver(unsigned queue) { return *drivers_[queue]; }
    /// Publishes what was added, and notifies the device if it wants that.
    void kick(unsigned queue);
    /// Waits until driver(queue).get() gives something. Nothing after Options::seconds.
    std::optional<FakeDriver::Used> wait(unsigned queue) {
        return wait(queue, std::chrono::seconds(options_.seconds));
    }
    std::optional<FakeDriver::Used> wait(unsigned queue, std::chrono::nanoseconds timeout);

    /// Guest memory for buffers: `size` bytes, aligned to 16, reused from the start by
    /// free_buffers().
    u64 buffer(u32 size);
    u64 buffer(std::span<const u8> contents);
    void free_buffers() { next_ = first_buffer_; }
    std::vector<u8> bytes(u64 gpa, u32 size) const;

    /// One chain of `out` (device-readable, a descriptor each) and then `in` bytes to be written in
    /// one descriptor; its written part. Throws StateMismatch when the device does not answer.
    std::vector<u8> request(unsigned queue, std::initializer_list<std::span<const u8>> out, u32 in);

    u64 interrupts(unsigned queue) const;
    u64 config_interrupts() const;

  private:
    Device& device_;
    GuestMemory& memory_;
    Options options_;
    u64 features_ = 0;
    std::vector<std::unique_ptr<FakeDriver>> drivers_;
    u64 first_buffer_ = 0, next_ = 0;

    mutable std::mutex mutex_;  // a leaf
    std::condition_variable changed_;
    std::vector<u64> interrupts_;
    u64 config_interrupts_ = 0;
};

}  // namespace polyvisor::virtio
