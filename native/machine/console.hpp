// What is plugged into a serial port: everything it ever sent (up to a limit), for readers that
// wait, and a queue of what is to be typed at it.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>

#include "devices/serial.hpp"
#include "machine/run_control.hpp"

namespace polyvisor {

class SerialConsole final : public devices::CharSink {
  public:
    /// Output kept; older bytes are dropped, their offsets stay taken.
    static constexpr std::size_t kKept = 16 << 20;
    /// With flow control: unread bytes from which on the port is made to wait.
    static constexpr std::size_t kHigh = 256 << 10;

    // CharSink, for the serial port.
    void write(std::span<const u8> bytes) override;
    bool ready() const override;
    void set_ready_callback(std::function<void()> callback) override;

    /// Bytes sent since the machine was made.
    u64 size() const;
    /// Appends to `into` what was sent from `offset` on (at most `limit` bytes), and returns the
    /// offset behind it. Starts at the oldest byte kept when `offset` is older.
    u64 read(u64 offset, std::size_t limit, std::string& into);
    /// Waits until there is output beyond `offset`, the console is closed, or the time is up. True
    /// for output.
    bool wait(u64 offset, RunControl::Duration timeout) const;
    /// No more output will come: wakes the waiters. Reading goes on working.
    void close();
    bool closed() const;
    /// On: the guest waits while its output is not read, and nothing is ever dropped.
    void set_flow_control(bool on);

    /// The port that send() types at. The port outlives its use: detach() before it dies.
    void attach(devices::Serial& port);
    void detach();
    /// Queues `bytes` and feeds the port as it has room. Never blocks.
    void send(std::span<const u8> bytes);
    /// Bytes queued that the port has not taken yet.
    std::size_t unsent() const;

  private:
    bool ready_locked() const { return !flow_control_ || size_ - read_ < kHigh; }
    void feed();

    mutable std::mutex mutex_;  // a leaf: guards the output
    mutable std::condition_variable changed_;
    std::string kept_;
    u64 size_ = 0;
    u64 read_ = 0;  // highest offset a reader has reached
    bool closed_ = false;
    bool flow_control_ = false;
    std::function<void()> ready_;

    mutable std::mutex input_mutex_;  // before the port's
    std::deque<u8> input_;
    devices::Serial* port_ = nullptr;
};

}  // namespace polyvisor
