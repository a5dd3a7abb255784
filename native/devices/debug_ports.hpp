// Ports for tests and firmware: the debug console of Bochs and QEMU (0xe9), and isa-debug-exit.
#pragma once

#include <functional>

#include "bus/device.hpp"
#include "devices/char_sink.hpp"

namespace polyvisor::devices {

/// A byte written is output; reads give 0xe9, which is how software finds it. One port.
class DebugConsole final : public Device {
  public:
    /// `sink` outlives the device.
    DebugConsole(Clock& clock, CharSink* sink) : batch_(clock, sink) {}
    std::string_view name() const override { return "debug-console"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;
    /// Output is never read back; a person may wait for it.
    std::vector<PostedRange> posted() const override { return {{0, 1, kDelay}}; }
    void flush() { batch_.flush(); }

  private:
    static constexpr u64 kDelay = 10'000'000;  // ns

    OutputBatch batch_;
};

/// Writing v ends the machine with status (v << 1) | 1. 4 ports, as QEMU's.
class DebugExit final : public Device {
  public:
    /// Called on the vCPU's thread, once per write.
    explicit DebugExit(std::function<void(u32 status)> exit) : exit_(std::move(exit)) {}
    std::string_view name() const override { return "debug-exit"; }
    void read(u64 offset, std::span<u8> data) override;
    void write(u64 offset, std::span<const u8> data) override;

  private:
    std::function<void(u32)> exit_;
};

}  // namespace polyvisor::devices
