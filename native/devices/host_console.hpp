// What is plugged into a serial port, or a port of a virtio console: everything the guest ever sent
// (up to a limit), for readers that wait, and a queue of what is to be typed at it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include "devices/char_sink.hpp"

namespace polyvisor::devices {

class HostConsole final : public CharSink {
  public:
    /// Output kept; older bytes are dropped, their offsets stay taken.
    static constexpr std::size_t kKept = 16 << 20;
    /// With flow control: unread bytes from which on the port is made to wait.
    static constexpr std::size_t kHigh = 256 << 10;

    using Duration = std::chrono::nanoseconds;
    static constexpr Duration kForever = Duration::max();

    // CharSink, for the port.
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
    bool wait(u64 offset, Duration timeout) const;
    /// No more output will come: wakes the waiters. Reading goes on working.
    void close();
    bool closed() const;
    /// On: the guest waits while its output is not read, and nothing is ever dropped.
    void set_flow_control(bool on);

    /// The port that send() types at. It outlives its use: detach() before it dies.
    void attach(CharPort& port);
    void detach();
    /// Queues `bytes` and feeds the port as it has room. Never blocks.
    void send(std::span<const u8> bytes);
    /// Bytes queued that the port has not taken yet.
    std::size_t unsent() const;

  private:
    static constexpr std::size_t kChunk = 64 << 10;

    void append(std::span<const u8> bytes);
    bool ready_locked() const { return !flow_control_ || size_ - read_ < kHigh; }
    void feed();

    mutable std::mutex mutex_;  // a leaf: guards the output
    mutable std::condition_variable changed_;
    mutable unsigned waiting_ = 0;  // threads in wait()
    // [first_, size_) of the output, in pieces of kChunk; the oldest becomes the newest, so that a
    // console that prints for ever takes no new memory.
    std::deque<std::unique_ptr<u8[]>> kept_;
    u64 first_ = 0;
    u64 size_ = 0;
    u64 read_ = 0;  // highest offset a reader has reached
    bool closed_ = false;
    bool flow_control_ = false;
    std::function<void()> ready_;

    mutable std::mutex input_mutex_;  // before the port's
    std::deque<u8> input_;
    CharPort* port_ = nullptr;
};

}  // namespace polyvisor::devices
