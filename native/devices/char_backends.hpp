// Ready-made ends for consoles: a file descriptor, an in-memory buffer, and input from a
// descriptor.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>

#include "base/fd.hpp"
#include "bus/event_loop.hpp"
#include "devices/char_sink.hpp"

namespace polyvisor::devices {

/// Writes to a file descriptor from the event loop's thread, never blocking a vCPU: what the
/// descriptor does not take now is kept, and ready() is false while more than kHigh bytes are.
/// Devices that cannot wait may go up to kLimit; what is beyond is dropped and counted.
///
/// The descriptor's own flags (shared with other processes, as a terminal's are) are not changed.
/// A reader that went away is an error passed to `on_error`, not a signal.
class FdSink final : public CharSink {
  public:
    static constexpr std::size_t kHigh = 64 * 1024;
    static constexpr std::size_t kLimit = 4 * 1024 * 1024;

    /// `fd` is not owned and must stay open. `on_error(errno)` is called once, on the loop's thread
    /// (or in drain()); from then on output is discarded. Throws HostError.
    FdSink(EventLoop& loop, int fd, std::function<void(int error)> on_error = {});
    ~FdSink() override;  // does not wait: call drain() first

    void write(std::span<const u8> bytes) override;
    bool ready() const override;
    void set_ready_callback(std::function<void()> callback) override;

    /// Writes what is buffered, for at most `timeout_ms`. True when nothing is left. The loop need
    /// not be running.
    bool drain(int timeout_ms);
    u64 dropped() const;
    /// errno of the write that failed; 0 while all is well.
    int error() const;

  private:
    struct Impl;
    std::shared_ptr<Impl> impl_;  // shared with tasks posted to the loop
};

/// Keeps the last `limit` bytes in memory.
class BufferSink final : public CharSink {
  public:
    explicit BufferSink(std::size_t limit = 1024 * 1024) : limit_(limit) {}
    void write(std::span<const u8> bytes) override;
    /// All bytes kept, oldest first.
    std::string text() const;
    /// Takes them out.
    std::string take();
    /// Total bytes ever written.
    u64 written() const;
    /// Called after each write, without locks held.
    void set_callback(std::function<void()> callback);

  private:
    mutable std::mutex mutex_;  // a leaf
    std::size_t limit_;
    std::string bytes_;
    u64 written_ = 0;
    std::function<void()> callback_;
};

/// Gives the same bytes to several sinks; ready when all are.
class TeeSink final : public CharSink {
  public:
    explicit TeeSink(std::vector<CharSink*> sinks) : sinks_(std::move(sinks)) {}
    void write(std::span<const u8> bytes) override;
    bool ready() const override;
    void set_ready_callback(std::function<void()> callback) override;

  private:
    std::vector<CharSink*> sinks_;
};

/// Reads a descriptor on the event loop as fast as `deliver` (Serial::receive) accepts, and no
/// faster: after it took less than it was given, nothing is read until resume().
class FdSource final {
  public:
    using Deliver = std::function<std::size_t(std::span<const u8>)>;
    /// `fd` is not owned. `on_end(errno)`: 0 at end of file. Throws HostError.
    FdSource(EventLoop& loop, int fd, Deliver deliver, std::function<void(int error)> on_end = {});
    ~FdSource();
    /// There is room again (Serial's room callback). Safe from any thread.
    void resume();

  private:
    struct Impl;
    std::shared_ptr<Impl> impl_;
};

}  // namespace polyvisor::devices
