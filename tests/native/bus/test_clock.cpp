// Virtual time and timers: order, deterministic advance, pause, TSC conversion, destruction.
#include "bus/clock.hpp"

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "check.hpp"

using namespace polyvisor;
using namespace std::chrono_literals;

namespace {

void deterministic_order() {
    Clock clock(Clock::Mode::kDeterministic);
    std::vector<int> order;
    Timer a(clock, [&] { order.push_back(1); });
    Timer b(clock, [&] { order.push_back(2); });
    Timer c(clock, [&] { order.push_back(3); });
    CHECK_EQ(clock.next_deadline(), kNever);
    a.arm(300);
    b.arm(100);
    c.arm(100);
    CHECK_EQ(clock.next_deadline(), 100u);
    clock.advance_to(99);
    CHECK_EQ(clock.run_expired(), 100u);
    CHECK(order.empty());
    clock.advance_to(100);
    CHECK_EQ(clock.run_expired(), 300u);
    CHECK(order == (std::vector<int>{2, 3}));
    CHECK_EQ(b.deadline(), kNever);
    clock.advance_to(50);  // time does not go back
    CHECK_EQ(clock.now(), 100u);
    b.arm(250);
    b.disarm();
    a.arm(200);
    clock.advance_to(1000);
    CHECK_EQ(clock.run_expired(), kNever);
    CHECK(order == (std::vector<int>{2, 3, 1}));
    clock.set(5);
    CHECK_EQ(clock.now(), 5u);
}

void callbacks_arm_and_destroy() {
    Clock clock(Clock::Mode::kDeterministic);
    int periodic = 0, always = 0, inner = 0;
    Timer period(clock, [&] {
        if (++periodic < 5) period.arm(clock.now() + 10);
    });
    Timer now(clock, [&] {
        ++always;
        clock.run_expired();  // re-entered: nothing
        now.arm(clock.now());
    });
    std::unique_ptr<Timer> suicide;
    suicide = std::make_unique<Timer>(clock, [&] {
        suicide.reset();
        ++inner;
    });
    period.arm(10);
    now.arm(10);
    suicide->arm(10);
    for (int i = 1; i <= 10; ++i) {
        clock.advance_to(i * 10);
        clock.run_expired();
    }
    CHECK_EQ(periodic, 5);
    CHECK_EQ(always, 10);  // once per call, though it is always due
    CHECK_EQ(inner, 1);
    CHECK(suicide == nullptr);
}

void rearm_is_told_of_earlier_deadlines() {
    Clock clock(Clock::Mode::kDeterministic);
    int calls = 0;
    clock.set_rearm([&] { ++calls; });
    Timer a(clock, [] {}), b(clock, [] {});
    a.arm(100);
    CHECK_EQ(calls, 1);
    b.arm(200);
    CHECK_EQ(calls, 1);
    b.arm(50);
    CHECK_EQ(calls, 2);
    b.disarm();
    CHECK_EQ(calls, 2);
}

void tsc() {
    Clock clock(Clock::Mode::kDeterministic);
    CHECK_EQ(clock.tsc_at(12345), 12345u);
    for (u64 khz : {u64{1'000'000}, u64{2'500'000}, u64{3'300'001}, u64{999}}) {
        clock.set_tsc_khz(khz);
        for (u64 ns : {u64{0}, u64{1}, u64{999'999}, u64{1'000'001}, u64{86'400'000'000'000},
                       u64{9'000'000'000'000'000}}) {
            u64 want = static_cast<u64>(static_cast<u128>(ns) * khz / 1'000'000);
            CHECK_EQ(clock.tsc_at(ns), want);
            u64 at = clock.time_of_tsc(want);
            CHECK(clock.tsc_at(at) >= want);
            CHECK(at == 0 || clock.tsc_at(at - 1) < want);
        }
    }
    CHECK_EQ(clock.time_of_tsc(~u64{0}), kNever);
}

void free_running_and_pause() {
    Clock clock;
    u64 first = clock.now();
    std::this_thread::sleep_for(2ms);
    u64 second = clock.now();
    CHECK(second - first >= 2'000'000);
    clock.advance_to(second + 1'000'000'000);  // not for a free-running clock
    CHECK(clock.now() < second + 1'000'000'000);
    clock.pause();
    u64 held = clock.now();
    std::this_thread::sleep_for(3ms);
    CHECK_EQ(clock.now(), held);
    clock.pause();
    clock.resume();
    CHECK(clock.now() - held < 2'000'000'000);
    clock.set(77'000'000'000);
    CHECK(clock.now() >= 77'000'000'000 && clock.now() < 79'000'000'000);
}

// Readers see time go forward while another thread pauses and resumes.
void monotonic_across_pauses() {
    Clock clock;
    std::atomic<bool> stop{false};
    std::atomic<u64> backwards{0};
    std::thread reader([&] {
        for (u64 last = 0; !stop;) {
            u64 now = clock.now();
            if (now < last) ++backwards;
            last = now;
        }
    });
    for (int i = 0; i < 2000; ++i) {
        clock.pause();
        clock.resume();
    }
    stop = true;
    reader.join();
    CHECK_EQ(backwards.load(), 0u);
}

void destruction_waits_for_the_callback() {
    Clock clock;
    std::atomic<bool> entered{false}, left{false}, stop{false};
    std::thread runner([&] {
        while (!stop) clock.run_expired();
    });
    {
        Timer timer(clock, [&] {
            entered = true;
            std::this_thread::sleep_for(5ms);
            left = true;
        });
        timer.arm(0);
        while (!entered) std::this_thread::yield();
    }
    CHECK(left.load());
    stop = true;
    runner.join();
}

void many_threads_arm() {
    Clock clock;
    std::atomic<bool> stop{false};
    std::atomic<u64> fired{0};
    std::thread runner([&] {
        while (!stop) clock.run_expired();
    });
    auto work = [&] {
        for (int i = 0; i < 300; ++i) {
            std::atomic<bool> mine{false};
            Timer timer(clock, [&] {
                ++fired;
                mine = true;
            });
            timer.arm(clock.now() + 1000);
            timer.arm(clock.now());
            if (i % 3 == 0) {
                while (!mine) std::this_thread::yield();
            }
        }
    };
    std::thread one(work), two(work);
    one.join();
    two.join();
    stop = true;
    runner.join();
    CHECK(fired.load() >= 200);
    CHECK_EQ(clock.next_deadline(), kNever);
}

}  // namespace

int main() {
    deterministic_order();
    callbacks_arm_and_destroy();
    rearm_is_told_of_earlier_deadlines();
    tsc();
    free_running_and_pause();
    monotonic_across_pauses();
    destruction_waits_for_the_callback();
    many_threads_arm();
    return pvtest::finish("test_clock");
}
