// A capture file (pcap, with nanoseconds), as tcpdump and Wireshark read it.
#pragma once

#include <atomic>
#include <mutex>
#include <span>
#include <string>

#include "base/fd.hpp"
#include "base/log.hpp"

namespace polyvisor::net {

class Capture {
  public:
    explicit Capture(Log* log) : log_(log) {}

    /// Begins a new file; one that is being written ends. Throws HostError.
    void start(const std::string& path);
    void stop();
    bool active() const { return active_.load(std::memory_order_acquire); }
    /// A full disk ends the capture with a line in the log.
    void add(std::span<const u8> frame);

  private:
    Log* log_;
    std::atomic<bool> active_{false};
    std::mutex mutex_;  // a leaf
    OwnedFd file_;
    std::string path_;
};

}  // namespace polyvisor::net
