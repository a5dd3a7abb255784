// The local APIC's timer (SDM 3A 11.5.4): a count at kBusFrequency / divider, or an absolute TSC
// value.
#include <algorithm>

#include "irqchip/lapic_detail.hpp"

namespace polyvisor::irqchip {

namespace {

constexpr u32 kPeriodic = 1, kTscDeadline = 2;  // LVT timer mode

static_assert(Lapic::kBusFrequency == 1'000'000'000,
              "a count of the timer is taken as a nanosecond");

}  // namespace

u32 Lapic::divider() const {
    u32 code = (state_.divide & 3) | (state_.divide >> 1 & 4);
    return code == 7 ? 1 : 2u << code;
}

void Lapic::stop_timer() {
    state_.initial_count = 0;
    state_.tsc_deadline = 0;
    state_.timer_deadline = kNever;
    timer_.disarm();
}

void Lapic::start_timer(u32 count) {
    if (timer_mode() == kTscDeadline) return;  // ignored then
    state_.initial_count = count;
    state_.timer_start = clock_.now();
    state_.timer_deadline =
        count == 0 ? kNever : state_.timer_start + static_cast<u64>(count) * divider();
    timer_.arm(state_.timer_deadline);
}

u32 Lapic::current_count() const {
    if (state_.timer_deadline == kNever || timer_mode() == kTscDeadline) return 0;
    Nanoseconds now = clock_.now();
    // After a change of the divider the start may lie before time 0, so it is taken modulo 2^64.
    s64 since = static_cast<s64>(now - state_.timer_start);
    u64 elapsed = since > 0 ? static_cast<u64>(since) / divider() : 0;
    if (timer_mode() == kPeriodic) {
        return static_cast<u32>(state_.initial_count - elapsed % state_.initial_count);
    }
    return elapsed >= state_.initial_count ? 0 : static_cast<u32>(state_.initial_count - elapsed);
}

// What has been counted stays counted; the rest goes on at the new rate.
void Lapic::rescale_timer(u32 divide) {
    u32 left = current_count();
    state_.divide = divide;
    if (state_.timer_deadline == kNever || timer_mode() == kTscDeadline) return;
    Nanoseconds now = clock_.now();
    u64 rate = divider();
    u64 counted = static_cast<u64>(state_.initial_count - left) * rate;
    state_.timer_start = now - counted;
    state_.timer_deadline = now + left * rate;
    timer_.arm(state_.timer_deadline);
}

void Lapic::write_tsc_deadline(u64 value, Outcome& out) {
    if (timer_mode() != kTscDeadline) return;  // SDM 3A 11.5.4.1: ignored, reads zero
    state_.tsc_deadline = value;
    state_.timer_deadline = kNever;
    if (value != 0 && value <= clock_.tsc() + tsc_offset_) {
        state_.tsc_deadline = 0;  // already past: at once, without a detour by the timer thread
        timer_.disarm();
        fire_lvt(kTimer, out);
        return;
    }
    arm_deadline();
}

void Lapic::arm_deadline() {
    if (state_.tsc_deadline != 0) {
        u64 guest_now = clock_.tsc() + tsc_offset_;
        state_.timer_deadline = state_.tsc_deadline <= guest_now
                                    ? clock_.now()
                                    : clock_.time_of_tsc(state_.tsc_deadline - tsc_offset_);
    }
    timer_.arm(state_.timer_deadline);
}

void Lapic::set_tsc_offset(u64 offset) {
    std::lock_guard lock(mutex_);
    tsc_offset_ = offset;
    if (state_.tsc_deadline != 0) arm_deadline();
}

void Lapic::timer_expired() {
    Outcome out;
    {
        std::lock_guard lock(mutex_);
        Nanoseconds now = clock_.now();
        if (now < state_.timer_deadline) return;  // re-armed while this call was on its way
        fire_lvt(kTimer, out);
        if (timer_mode() == kPeriodic) {
            u64 period = static_cast<u64>(state_.initial_count) * divider();
            u64 passed = (now - state_.timer_start) / period;
            state_.timer_start += passed * period;
            state_.timer_deadline = state_.timer_start + period;
            timer_.arm(std::max(state_.timer_deadline, now + kMinPeriod));
        } else {
            state_.tsc_deadline = 0;
            state_.timer_deadline = kNever;
        }
    }
    finish(out);
}

}  // namespace polyvisor::irqchip
