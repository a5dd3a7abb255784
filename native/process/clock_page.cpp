#include "process/clock_page.hpp"

#include <cpuid.h>
#include <time.h>
#include <x86intrin.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace polyvisor::process {

namespace {

constexpr u64 kMicrosecond = 1000, kMillisecond = 1'000'000, kSecond = 1'000'000'000;

u64 read_clock(clockid_t clock) {
    timespec now{};
    ::clock_gettime(clock, &now);
    return static_cast<u64>(now.tv_sec) * kSecond + static_cast<u64>(now.tv_nsec);
}

// Whether the host's own vDSO goes by the TSC: it counts at one rate, on all CPUs alike.
bool host_tsc_is_good() {
    static const bool good = [] {
        u32 a = 0, b = 0, c = 0, d = 0;
        constexpr u32 kPowerManagement = 0x8000'0007, kInvariantTsc = 1 << 8;
        if (!__get_cpuid(kPowerManagement, &a, &b, &c, &d) || !(d & kInvariantTsc)) return false;
        std::ifstream file("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        std::string source;
        file >> source;
        return source == "tsc" || source == "kvm-clock" || source == "hyperv_clocksource_tsc_page";
    }();
    return good;
}

// How far `clock` is ahead of CLOCK_MONOTONIC. It changes when somebody sets the clock; what is
// less than can be measured is none.
void measure_offset(clockid_t clock, s64& offset) {
    s64 best = 0;
    u64 least = ~u64{0};
    for (int tries = 0; tries < 4 && least > kMicrosecond; ++tries) {
        const u64 before = read_clock(CLOCK_MONOTONIC);
        const u64 there = read_clock(clock);
        const u64 took = read_clock(CLOCK_MONOTONIC) - before;
        if (took < least) {
            least = took;
            best = static_cast<s64>(there - before - took / 2);
        }
    }
    constexpr s64 kNoise = 10 * kMicrosecond;
    if (offset == 0 || std::abs(best - offset) > kNoise) offset = best;
}

void store(u32& at, u32 value) {
    __atomic_store_n(&at, value, __ATOMIC_RELEASE);
}
void store(u64& at, u64 value) {
    __atomic_store_n(&at, value, __ATOMIC_RELEASE);
}
void store(int64_t& at, s64 value) {
    __atomic_store_n(&at, value, __ATOMIC_RELEASE);
}

}  // namespace

ClockPage::ClockPage(Clock& clock, bool native, u8* page)
    : clock_(clock),
      native_(native),
      page_(*reinterpret_cast<pv_clock_page*>(page)),
      valid_(kValidMilliseconds * clock.tsc_khz()),
      nominal_((kMillisecond << 32) / clock.tsc_khz()),
      monotonic_{CLOCK_MONOTONIC, &page_.monotonic},
      raw_{CLOCK_MONOTONIC_RAW, &page_.raw} {
    monotonic_.rate = raw_.rate = nominal_;
    clock_.set(native_ ? clock_.time_of_tsc(__rdtsc()) : read_clock(CLOCK_MONOTONIC));
}

u64 ClockPage::tsc() const {
    return native_ ? __rdtsc() : clock_.tsc();
}

void ClockPage::confirm(u64 seen) {
    if (confirmed_ || (native_ && !host_tsc_is_good())) return;
    const u64 second = clock_.tsc_khz() * 1000;
    if (tsc() - seen < second) confirmed_ = true;
}

void ClockPage::refresh() {
    if (!confirmed_) return;
    const u64 age = tsc() - written_.load(std::memory_order_relaxed);
    if (PV_LIKELY(age < valid_ / 2)) return;
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) write();
}

void ClockPage::show_calls(bool wanted) {
    if (PV_LIKELY((__atomic_load_n(&page_.shown, __ATOMIC_RELAXED) != 0) == wanted)) return;
    __atomic_store_n(&page_.shown, u32{wanted}, __ATOMIC_RELAXED);
}

// From here on, as the host's clock is now and has been running.
void ClockPage::advance(Line& line) const {
    u64 now = 0, time = 0, least = ~u64{0};
    for (int tries = 0; tries < 4 && least > clock_.tsc_khz() / 1000; ++tries) {
        const u64 before = tsc(), there = read_clock(line.clock), took = tsc() - before;
        if (took < least) {
            least = took;
            now = before + took / 2;
            time = there;
        }
    }
    // Its rate, over long enough a while to be worth more than the nominal one.
    const u64 ticks = now - line.anchor_tsc;
    const bool anchored = line.anchor_tsc != 0;
    if (anchored && ticks >= 2 * valid_) {
        const u64 measured =
            static_cast<u64>((static_cast<u128>(time - line.anchor_time) << 32) / ticks);
        const u64 off = measured > nominal_ ? measured - nominal_ : nominal_ - measured;
        line.rate = off < nominal_ / 1000 ? measured : nominal_;  // else: the host has slept
    }
    if (!anchored || ticks > 80 * valid_) {
        line.anchor_tsc = now;
        line.anchor_time = time;
    }
    // What has been seen is not taken back, but made up for during the next round.
    pv_clock_line next{now, time, line.rate};
    if (line.line.multiplier != 0) {
        const u64 elapsed = std::min(now - line.line.reference, valid_);
        const u64 seen = line.line.base + (elapsed * line.line.multiplier >> 32);
        if (seen > time && seen - time < kMillisecond) {
            next.base = seen;
            next.multiplier -= std::min(next.multiplier / 2000, ((seen - time) << 32) / valid_);
        }
    }
    line.line = next;
}

void ClockPage::write() {
    advance(monotonic_);
    advance(raw_);
    measure_offset(CLOCK_REALTIME, realtime_);
    measure_offset(CLOCK_BOOTTIME, boottime_);
    measure_offset(CLOCK_TAI, tai_);
    const u32 sequence = page_.sequence | 1;
    store(page_.sequence, sequence);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (const Line* line : {&monotonic_, &raw_}) {
        store(line->shown->reference, line->line.reference);
        store(line->shown->base, line->line.base);
        store(line->shown->multiplier, line->line.multiplier);
    }
    store(page_.realtime, realtime_);
    store(page_.boottime, boottime_);
    store(page_.tai, tai_);
    store(page_.valid, valid_);
    store(page_.sequence, sequence + 1);
    written_ = monotonic_.line.reference;
}

}  // namespace polyvisor::process
