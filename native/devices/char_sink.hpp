// Where the bytes of a console go, and how they get there in batches.
#pragma once

#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "bus/clock.hpp"

namespace polyvisor::devices {

/// Takes a console's output. Calls come from any thread, one at a time per device, in order.
class CharSink {
  public:
    virtual ~CharSink() = default;
    /// Takes all of `bytes`; never blocks.
    virtual void write(std::span<const u8> bytes) = 0;
    /// False while a device that can wait (a UART) should send no more.
    virtual bool ready() const { return true; }
    /// `callback` runs, on any thread and without locks held, when ready() became true again.
    virtual void set_ready_callback(std::function<void()> callback) { (void)callback; }
};

/// Takes what the outside types at a console: a UART, a port of a virtio console.
class CharPort {
  public:
    virtual ~CharPort() = default;
    /// Offers bytes; returns how many were taken.
    virtual std::size_t receive(std::span<const u8> bytes) = 0;
    /// `callback` runs, on any thread and without locks held, when receive() took less than offered
    /// and there is room again.
    virtual void set_room_callback(std::function<void()> callback) = 0;
};

/// Collects bytes and passes them on at a newline, after kBatch bytes, or kIdle after the first of
/// them: few calls, order kept, and nothing a person could notice as a delay.
class OutputBatch {
  public:
    static constexpr std::size_t kBatch = 512;
    static constexpr Nanoseconds kIdle = 2'000'000;  ///< ns

    /// `sink` may be nullptr: bytes vanish.
    OutputBatch(Clock& clock, CharSink* sink);
    void put(u8 byte);
    void flush();
    CharSink* sink() const { return sink_; }

  private:
    void idle();
    void flush_locked();

    CharSink* sink_;
    Clock& clock_;
    std::mutex mutex_;  // after the device's; the sink's own is taken under it
    std::vector<u8> bytes_;
    bool timer_armed_ = false;
    Timer timer_;
};

}  // namespace polyvisor::devices
