#include "block/rate_limit.hpp"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>

#include <algorithm>
#include <cmath>

#include "base/error.hpp"

namespace polyvisor::block {

namespace {

u64 monotonic_now() {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<u64>(now.tv_sec) * 1'000'000'000 + static_cast<u64>(now.tv_nsec);
}

}  // namespace

RateLimit::RateLimit(EventLoop& loop, const Rates& rates, std::function<void()> again)
    : loop_(loop), last_(monotonic_now()) {
    auto bucket = [&](u64 rate) {
        const double per_second = static_cast<double>(rate);
        const double most = std::max(per_second * rates.burst_seconds, 1.0);
        return Bucket{per_second, most, most};
    };
    bytes_ = bucket(rates.bytes_per_second);
    operations_ = bucket(rates.operations_per_second);
    timer_ = OwnedFd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
    if (!timer_) throw_errno("cannot create a timer for a disk's rate limit");
    loop_.watch(timer_.get(), EPOLLIN, [this, again = std::move(again)](u32) {
        u64 count;
        (void)!::read(timer_.get(), &count, sizeof count);
        {
            std::lock_guard lock(mutex_);
            waiting_ = false;
        }
        again();
    });
}

RateLimit::~RateLimit() {
    loop_.unwatch(timer_.get());
}

void RateLimit::refill() {
    const u64 now = monotonic_now();
    const double seconds = static_cast<double>(now - last_) * 1e-9;
    last_ = now;
    for (Bucket* bucket : {&bytes_, &operations_}) {
        if (bucket->rate == 0) continue;
        bucket->tokens = std::min(bucket->tokens + bucket->rate * seconds, bucket->most);
    }
}

bool RateLimit::admit(u64 bytes) {
    std::lock_guard lock(mutex_);
    refill();
    const double costs[] = {static_cast<double>(bytes), 1};
    Bucket* const buckets[] = {&bytes_, &operations_};
    double wait = 0;
    for (unsigned i = 0; i < 2; ++i) {
        const Bucket& bucket = *buckets[i];
        const double missing = std::min(costs[i], bucket.most) - bucket.tokens;
        if (bucket.rate > 0 && missing > 0) wait = std::max(wait, missing / bucket.rate);
    }
    if (wait == 0) {
        for (unsigned i = 0; i < 2; ++i) buckets[i]->tokens -= costs[i];
        return true;
    }
    if (!waiting_) {
        waiting_ = true;
        const u64 nanoseconds = static_cast<u64>(std::ceil(wait * 1e9));
        itimerspec when{};
        when.it_value.tv_sec = static_cast<time_t>(nanoseconds / 1'000'000'000);
        when.it_value.tv_nsec = static_cast<long>(nanoseconds % 1'000'000'000);
        ::timerfd_settime(timer_.get(), 0, &when, nullptr);
    }
    return false;
}

}  // namespace polyvisor::block
