// What waits and in which order it is taken, what exceptions become, and alarms.
#include "process/signals.hpp"

#include <time.h>

#include <atomic>

#include "check.hpp"
#include "process/timers.hpp"
#include "random.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

namespace {

void queue_against_a_model() {
    pvtest::Random random(3);
    for (int round = 0; round < 200; ++round) {
        SignalQueue queue;
        std::vector<siginfo_t> model;
        for (int n = 0; n < 200; ++n) {
            const int number = 1 + static_cast<int>(random.below(64));
            if (random.one_in(20)) {
                const u64 set = random.next() & random.next();
                queue.drop(set);
                std::erase_if(model, [&](auto& one) { return set & signal_bit(one.si_signo); });
            } else if (random.one_in(3)) {
                const u64 of = random.next();
                const siginfo_t* want = nullptr;
                auto rank = [](const siginfo_t& one) {  // exceptions, then by number
                    constexpr int kFirst[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGSYS};
                    for (int first : kFirst) {
                        if (one.si_signo == first) return one.si_signo;
                    }
                    return 100 + one.si_signo;
                };
                for (const siginfo_t& one : model) {
                    if (!(of & signal_bit(one.si_signo))) continue;
                    if (want == nullptr || rank(one) < rank(*want)) want = &one;
                }
                const auto got = queue.take(of);
                CHECK_EQ(got.has_value(), want != nullptr);
                if (got && want != nullptr) {
                    CHECK_EQ(got->si_signo, want->si_signo);
                    CHECK_EQ(got->si_value.sival_int, want->si_value.sival_int);
                    model.erase(model.begin() + (want - model.data()));
                }
            } else {
                siginfo_t info = signal_info(number, SI_QUEUE);
                info.si_value.sival_int = n;
                CHECK(queue.add(info));
                const bool there = std::any_of(model.begin(), model.end(),
                                               [&](auto& one) { return one.si_signo == number; });
                if (number >= 32 || !there) model.push_back(info);
            }
            u64 set = 0;
            for (const siginfo_t& one : model) set |= signal_bit(one.si_signo);
            CHECK_EQ(queue.set(), set);
        }
    }
    SignalQueue full;
    for (std::size_t n = 0; n < SignalQueue::kMost; ++n) CHECK(full.add(signal_info(40, 0)));
    CHECK(!full.add(signal_info(40, 0)));
}

void alarms() {
    std::mutex mutex;
    std::vector<int> rung;
    std::atomic<int> late{0};
    {
        Alarms alarms(mutex);
        {
            std::lock_guard lock(mutex);
            const s64 start = now(CLOCK_MONOTONIC);
            auto set = [&](int number, s64 milliseconds) {
                const s64 moment = start + milliseconds * 1'000'000;
                return alarms.set(moment, [&, number, moment] {
                    late += now(CLOCK_MONOTONIC) < moment;
                    rung.push_back(number);
                });
            };
            set(3, 30);
            set(1, 10);
            const u64 cancelled = set(2, 20);
            set(0, -5);
            set(9, 1'000'000);
            alarms.cancel(cancelled);
            alarms.set(start + 40'000'000, [&, start] {  // one that sets another
                alarms.set(start + 45'000'000, [&] { rung.push_back(5); });
                rung.push_back(4);
            });
        }
        for (int n = 0; n < 500; ++n) {
            const timespec step{0, 10'000'000};
            ::nanosleep(&step, nullptr);
            std::lock_guard lock(mutex);
            if (rung.size() >= 5) break;
        }
    }
    CHECK(rung == (std::vector<int>{0, 1, 3, 4, 5}));
    CHECK_EQ(late.load(), 0);
}

}  // namespace

int main() {
    queue_against_a_model();
    alarms();
    return pvtest::finish("signals");
}
