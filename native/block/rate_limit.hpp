// A limit of operations and bytes per second: two token buckets. A request may go when both have
// what it costs. One that costs more than a bucket can hold goes when it is full, and the following
// ones wait for the rest: so a request of any size goes some time, and the rate holds over time.
#pragma once

#include <functional>
#include <mutex>
#include <optional>

#include "base/fd.hpp"
#include "bus/event_loop.hpp"

namespace polyvisor::block {

class RateLimit {
  public:
    struct Rates {
        u64 bytes_per_second = 0;  ///< 0: no limit
        u64 operations_per_second = 0;
        double burst_seconds = 0.1;  ///< how much may be saved up while nothing happens
        bool limited() const { return bytes_per_second != 0 || operations_per_second != 0; }
    };

    /// `again` is called on the loop's thread when a request that was refused may go. Throws
    /// HostError.
    RateLimit(EventLoop& loop, const Rates& rates, std::function<void()> again);
    ~RateLimit();
    RateLimit(const RateLimit&) = delete;
    RateLimit& operator=(const RateLimit&) = delete;

    /// True: a request of that many bytes may go, and has been counted. False: `again` will be
    /// called. Any thread.
    bool admit(u64 bytes);

  private:
    struct Bucket {
        double rate, most, tokens;  // rate 0: no limit
    };
    void refill();

    EventLoop& loop_;
    std::mutex mutex_;  // a leaf
    Bucket bytes_, operations_;
    u64 last_ = 0;  // nanoseconds of the host's monotonic clock
    bool waiting_ = false;
    OwnedFd timer_;
};

}  // namespace polyvisor::block
