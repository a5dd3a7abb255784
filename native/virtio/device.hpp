// What all virtio devices have in common (virtio 1.2, chapter 2 and 3): features, status, queues,
// configuration space. A device knows no transport, a transport (transport_mmio, transport_pci) no
// device: both know this class.
//
// To add a device: derive, describe it, and answer serve(). Everything else has a default.
//
//     class Sink final : public Device {
//       public:
//         explicit Sink(const Environment& environment)
//             : Device(environment, {.type = 42, .name = "virtio-sink", .queue_sizes = {64}}) {}
//       private:
//         void serve(unsigned, Queue& queue) override {
//             drain(queue, chain_, [&] { queue.push(chain_, 0); });
//         }
//         Chain chain_;
//     };
//
// Threads. serve() runs where the driver's notification arrives: on the vCPU's thread, or on the
// machine's event loop where the engine has doorbells. A backend's thread takes a queue with
// hold(). Each queue has a mutex, which both have while they use it. Lock order: the status mutex,
// a queue's mutex (of one device: in the order of their numbers), a backend's, and interrupt chips
// last.
//
// A driver's mistakes never throw: the queue breaks or the device calls fail(), and the driver
// finds DEVICE_NEEDS_RESET.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/log.hpp"
#include "bus/event_loop.hpp"
#include "memory/guest_memory.hpp"
#include "virtio/queue.hpp"

namespace polyvisor::virtio {

/// Device types (virtio 1.2, 5).
enum DeviceType : u16 {
    kNet = 1,
    kBlock = 2,
    kConsole = 3,
    kEntropy = 4,
    kBalloon = 5,
    kVsock = 19,
    kFs = 26,
};

/// Bits of the device status (2.1).
enum Status : u8 {
    kAcknowledge = 1,
    kDriver = 2,
    kDriverOk = 4,
    kFeaturesOk = 8,
    kNeedsReset = 64,
    kFailed = 128,
};

/// How a device reaches its driver; a transport implements it. Any thread, with a queue's mutex
/// held or not.
class DriverSignals {
  public:
    virtual ~DriverSignals() = default;
    /// The driver's interrupt for buffers used in `queue`.
    virtual void queue_used(unsigned queue) = 0;
    /// The configuration space or the status changed.
    virtual void config_changed() = 0;
};

/// What a machine gives its devices. The references outlive them.
struct Environment {
    GuestMemory& memory;
    EventLoop& loop;  ///< for backends: its thread calls back, and may block for microseconds only
    Log* log = nullptr;
};

/// Memory of the host's that the guest sees through the transport (2.10).
struct SharedRegion {
    u8 id = 0;
    Mapping* mapping = nullptr;
};

struct Description {
    u16 type = 0;
    std::string name;                   ///< "virtio-blk"
    u64 features = 0;                   ///< the device's own; the rings' are added
    std::vector<u16> queue_sizes;       ///< the largest that each queue can have, a power of two
    u32 config_size = 0;                ///< bytes of configuration space
    u64 ring_features = kDefaultRings;  ///< RingFeature bits that are offered
    u32 pci_class = 0xff0000;           ///< base, sub-class, interface

    static constexpr u64 kDefaultRings = kIndirectDesc | kEventIdx | kVersion1 | kRingReset;
};

class Device {
  public:
    Device(const Environment& environment, Description description);
    virtual ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    const Description& description() const { return description_; }
    const std::string& name() const { return description_.name; }
    /// Offers packed rings too, which Linux then takes. Before the driver comes.
    void offer_packed(bool on);

    // --- For transports: what the driver does. Any thread. ---------------------------------------

    /// nullptr: nobody listens.
    void connect(DriverSignals* signals) { signals_.store(signals, std::memory_order_release); }

    u8 status() const;
    /// The driver's write to the status: 0 resets and returns when nothing of the device uses the
    /// guest's memory any more.
    void set_status(u8 status);
    u64 offered_features() const { return description_.features | description_.ring_features; }
    u64 driver_features() const { return driver_features_.load(std::memory_order_relaxed); }
    /// Ignored once the driver set FEATURES_OK.
    void set_driver_features(u64 features);

    unsigned queues() const { return static_cast<unsigned>(slots_.size()); }
    /// Places of a queue as the driver wrote them; `size` begins as the largest.
    QueueConfig queue_config(unsigned index) const;
    /// Ignored for an enabled queue. `features` does not count.
    void set_queue_config(unsigned index, const QueueConfig& config);
    bool queue_enabled(unsigned index) const;
    void enable_queue(unsigned index);
    /// (2.6.1) Returns when nothing uses the queue any more.
    void reset_queue(unsigned index);
    /// The driver's notification.
    void kick(unsigned index);

    /// Beyond the space: zeroes, and nothing.
    void read_config(u32 offset, std::span<u8> data) const;
    void write_config(u32 offset, std::span<const u8> data);
    u32 config_generation() const { return generation_.load(std::memory_order_acquire); }
    virtual std::vector<SharedRegion> shared_regions() const { return {}; }

    // --- For the machine -------------------------------------------------------------------------

    /// Back to power-on, as the driver's reset.
    void reset() { set_status(0); }
    /// After it returns, nothing of the device touches the guest's memory until resume(). Kicks
    /// meanwhile are made up for then.
    void pause();
    void resume();
    /// While paused. restore() throws StateError before it changes anything.
    std::vector<u8> save() const;
    void restore(std::span<const u8> state);

    /// The guest runs no more; whoever waits for something of it on the host should stop.
    virtual void machine_ended() {}

    /// Why it needs a reset; empty: it does not.
    std::string failure() const;

    /// A queue, held: its mutex is this object's. False when the driver has not started the queue,
    /// it was reset, or the machine stands still; then it must not be used, and what is to be done
    /// has to wait for the next serve(). At its end it publishes what was pushed, interrupts the
    /// driver if that is wanted, and sees to mistakes the queue found.
    class Held {
      public:
        Held(Held&& other) noexcept : device_(other.device_), index_(other.index_) {
            lock_ = std::move(other.lock_);
            other.device_ = nullptr;
        }
        Held& operator=(Held&&) = delete;
        ~Held();
        explicit operator bool() const { return device_ != nullptr; }
        Queue* operator->() const { return &queue(); }
        Queue& queue() const { return device_->slots_[index_]->queue; }

      private:
        friend class Device;
        Held(Device* device, unsigned index);
        Device* device_;
        unsigned index_;
        std::unique_lock<std::mutex> lock_;
    };
    Held hold(unsigned index) { return Held(this, index); }

  protected:
    // --- For devices -----------------------------------------------------------------------------

    /// There may be chains in the queue, which the calling thread holds: the driver notified, has
    /// just started it, or the machine goes on. Publishing and interrupting is seen to.
    virtual void serve(unsigned index, Queue& queue) = 0;
    /// False: these features do not go together, and FEATURES_OK is refused.
    virtual bool accept(u64 features) { return (void)features, true; }
    /// The driver has set DRIVER_OK; queues come alive next. No queue is held.
    virtual void start(u64 features) { (void)features; }
    /// The device is reset. No queue is held, and hold() fails. Returns when no request is in
    /// flight; what completes meanwhile finds that hold() fails and forgets it.
    virtual void stop() {}
    /// The same for one queue.
    virtual void stop_queue(unsigned index) { (void)index; }
    /// Waits until no request is in flight, and takes no new ones from a backend until unquiesce().
    /// hold() works until it returns.
    virtual void quiesce() {}
    virtual void unquiesce() {}
    /// After the driver's write to the configuration space; `config_` has it. Which bytes a driver
    /// may write says config_writable().
    virtual void config_written(u32 offset, u32 size) { (void)offset, (void)size; }
    virtual bool config_writable(u32 offset) const { return (void)offset, false; }
    /// What the device's State is beyond features, queues and configuration.
    virtual std::vector<u8> save_device() const { return {}; }
    virtual void restore_device(std::span<const u8> state);

    /// Pops and calls `each` for every chain, until there is none and the driver knows that it has
    /// to notify. `each` returns nothing, or false to stop (it has unpopped the chain, and somebody
    /// will call serve() or hold() later). Driver notifications are off meanwhile. A pause ends it
    /// early: resume() kicks.
    template <class Each>
    void drain(Queue& queue, Chain& chain, Each each) {
        do {
            queue.disable_notify();
            while (!quiescing_.load(std::memory_order_relaxed) && queue.pop(chain)) {
                if constexpr (std::is_same_v<decltype(each()), bool>) {
                    if (!each()) return;
                } else {
                    each();
                }
            }
        } while (queue.enable_notify() && !quiescing_.load(std::memory_order_relaxed));
    }

    GuestMemory& memory() const { return environment_.memory; }
    EventLoop& loop() const { return environment_.loop; }
    Log* log() const { return environment_.log; }
    /// The driver's features, once it has set DRIVER_OK.
    bool has(u64 feature) const { return (driver_features() & feature) != 0; }
    bool started() const { return (status() & kDriverOk) != 0; }
    /// Between pause() and resume(): hold() fails, and resume() serves all queues.
    bool paused() const { return paused_.load(std::memory_order_acquire); }
    /// Stores `bytes` at `offset` of the configuration space and tells the driver when they are
    /// new to it.
    void set_config(u32 offset, std::span<const u8> bytes);
    template <class T>
    void set_config(u32 offset, const T& value) {
        set_config(offset, std::span(reinterpret_cast<const u8*>(&value), sizeof value));
    }
    template <class T>
    T config(u32 offset) const {
        T value;
        read_config(offset, {reinterpret_cast<u8*>(&value), sizeof value});
        return value;
    }
    /// The driver has to reset it: `why` is a sentence about what it did. Any thread, whatever is
    /// held.
    void fail(const std::string& why);

  private:
    struct Slot {
        explicit Slot(GuestMemory& memory) : queue(memory) {}
        mutable std::mutex mutex;
        Queue queue;
        QueueConfig config;
        bool enabled = false;
        bool live = false;  // enabled, DRIVER_OK, and not being reset
    };

    void reset_locked();
    void start_locked();
    bool go_live(unsigned index);
    void signal_config();

    Environment environment_;
    Description description_;
    std::vector<std::unique_ptr<Slot>> slots_;
    std::atomic<DriverSignals*> signals_{nullptr};

    mutable std::recursive_mutex status_mutex_;
    std::atomic<u8> status_{0};
    std::atomic<u64> driver_features_{0};
    std::atomic<bool> failed_{false};
    std::atomic<bool> paused_{false};     // hold() fails
    std::atomic<bool> quiescing_{false};  // kicks wait

    mutable std::mutex config_mutex_;  // a leaf
    std::vector<u8> config_;
    std::string failure_;
    std::atomic<u32> generation_{0};
};

}  // namespace polyvisor::virtio
