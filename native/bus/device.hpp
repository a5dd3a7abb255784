// What a device is, and the few things it may touch. To add a device: derive from Device, take what
// you need (IrqLine, backend, GuestMemory, Clock) in the constructor, answer read() and write() by
// offset. The device knows no address, no interrupt number and no engine; the machine decides
// those.
//
//     class Scratch final : public Device {
//       public:
//         void read(u64 offset, std::span<u8> data) override { data[0] = offset == 0 ? value_ :
//         0xff; } void write(u64 offset, std::span<const u8> data) override { if (offset == 0)
//         value_ = data[0]; } void reset() override { value_ = 0; }
//       private:
//         u8 value_ = 0;
//     };
//
// read() and write() may be called by any vCPU thread, several at once: a device with state locks
// its own mutex. data.size() is the access width: 1, 2 or 4 for ports, 1 to 64 for memory. Neither
// may throw for anything a guest can cause.
#pragma once

#include <atomic>
#include <span>
#include <string_view>
#include <vector>

#include "base/types.hpp"

namespace polyvisor {

/// Offsets of a device whose writes need no answer, only a wake-up: virtio's notify registers.
struct Doorbell {
    u64 offset = 0;
    u8 size = 0;           ///< bytes of the write; 0: any
    bool matches = false;  ///< only writes of `value` ring it
    u64 value = 0;
    int event_fd = -1;  ///< counts the rings; the device's, and valid while it is attached
};

/// Offsets where a write changes nothing that anyone could see before the next access to the
/// device: an engine may deliver such writes late and together, though always in order and before
/// anything else of the same vCPU. An access is one that calls read() or write(): a device whose
/// doorbells depend on such writes must not post them.
struct PostedRange {
    u64 offset = 0;
    u64 size = 0;
    /// ns after which the write has to come though no access follows; 0: it may wait for ever. An
    /// engine needs a timer for that, and may let it come at once instead.
    u64 max_delay = 0;
};

class Device {
  public:
    Device() = default;
    /// A copy is another device: it starts its own counts.
    Device(const Device&) {}
    Device& operator=(const Device&) { return *this; }
    virtual ~Device() = default;
    virtual std::string_view name() const = 0;
    virtual void read(u64 offset, std::span<u8> data) = 0;
    virtual void write(u64 offset, std::span<const u8> data) = 0;
    /// Back to the state after power-on.
    virtual void reset() {}
    /// The State POD as bytes; restore() throws StateError, before changing anything, when they do
    /// not fit. Devices without state keep the defaults.
    virtual std::vector<u8> save() const { return {}; }
    virtual void restore(std::span<const u8> state);

    /// What an engine may serve without calling write(); write() must work for these offsets too.
    /// Asked when the device is attached.
    virtual std::vector<Doorbell> doorbells() const { return {}; }
    virtual std::vector<PostedRange> posted() const { return {}; }

    /// Accesses that the buses passed on to it. Any thread.
    u64 reads() const { return reads_.load(std::memory_order_relaxed); }
    u64 writes() const { return writes_.load(std::memory_order_relaxed); }

  private:
    friend class Bus;
    std::atomic<u64> reads_{0}, writes_{0};
};

/// One wire into an interrupt chip. Level: set(true) ... set(false). Edge: pulse().
/// Safe from any thread.
class IrqLine {
  public:
    virtual ~IrqLine() = default;
    virtual void set(bool level) = 0;
    void pulse() {
        set(true);
        set(false);
    }
};

/// Where message-signalled interrupts go: a 32-bit data write to an address in 0xfeexxxxx.
class MsiSink {
  public:
    virtual ~MsiSink() = default;
    virtual void send(u64 address, u32 data) = 0;
};

/// A line that goes nowhere.
class NullIrqLine final : public IrqLine {
  public:
    void set(bool) override {}
};

}  // namespace polyvisor
