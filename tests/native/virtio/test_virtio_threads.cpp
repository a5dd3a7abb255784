// Driver and device on two threads, each asleep whenever the other gave it nothing to do: a
// notification or an interrupt that is suppressed wrongly leaves both asleep for ever.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <thread>

#include "check.hpp"
#include "random.hpp"
#include "rings.hpp"

using namespace pvtest;
using namespace std::chrono_literals;

namespace {

const u64 kChains = environment_number("PV_CHAINS", 40'000);
constexpr auto kPatience = 20s;  // for a host with much else to do

// A wire with memory: a signal is not lost, many are one.
class Wire {
  public:
    void signal() {
        ++signals;
        std::lock_guard lock(mutex_);
        signalled_ = true;
        changed_.notify_one();
    }
    bool wait() {
        std::unique_lock lock(mutex_);
        bool there = changed_.wait_for(lock, kPatience, [this] { return signalled_; });
        signalled_ = false;
        return there;
    }
    std::atomic<u64> signals{0};

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool signalled_ = false;
};

void run(const Kind& kind, u32 size) {
    Rings rings(kind.features, size);
    FakeDriver driver(rings.memory, rings.config);
    Queue queue(rings.memory);
    CHECK(queue.configure(rings.config));
    Wire doorbell, interrupt;
    std::atomic<bool> lost{false};
    u64 sum_seen = 0, sum_sent = 0;

    std::thread device([&] {
        Chain chain;
        u64 served = 0;
        while (served < kChains && !lost) {
            queue.disable_notify();
            while (queue.pop(chain)) {
                u64 value = 0;
                chain.read(0, {reinterpret_cast<u8*>(&value), sizeof value});
                sum_seen += value;
                value = ~value;
                chain.write(0, {reinterpret_cast<const u8*>(&value), sizeof value});
                queue.push(chain, sizeof value);
                ++served;
                if (served % 3 == 0 && queue.publish()) interrupt.signal();
            }
            if (queue.publish()) interrupt.signal();
            if (served == kChains || queue.enable_notify()) continue;
            if (!doorbell.wait()) lost = true;
        }
        CHECK_EQ(served, kChains);
    });

    Random random(size);
    u64 added = 0, got = 0;
    auto slot = [&](u64 number) { return Rings::kData + number % (2 * size) * 64; };
    bool right = true;
    while (got < kChains && !lost) {
        const u64 burst = random.below(size) + 1;
        for (u64 n = 0; n < burst && added < kChains; ++n) {
            // A slot of data is free again when all before it are back.
            if (added - got >= size) break;
            rings.memory.store<u64>(Gpa(slot(added)), added);
            const bool indirect = (kind.features & kIndirectDesc) && random.below(2);
            if (!driver.add({{slot(added), 8, false}, {slot(added) + 8, 8, true}},
                            indirect ? Rings::kTables + added % (2 * size) * 64 : 0)) {
                break;
            }
            sum_sent += added++;
        }
        if (driver.publish()) doorbell.signal();
        driver.disable_interrupts();
        bool some = false;
        while (auto used = driver.get()) {  // the device keeps the order
            right &= used->written == 8 && rings.memory.load<u64>(Gpa(slot(got) + 8)) == ~got;
            ++got;
            some = true;
        }
        if (some || got == kChains || driver.enable_interrupts()) continue;
        if (!interrupt.wait()) lost = true;
    }
    device.join();
    CHECK(!lost);
    CHECK(right);
    CHECK_EQ(got, kChains);
    CHECK_EQ(sum_seen, sum_sent);
    std::printf("%s, %u: %llu notifications and %llu interrupts for %llu chains\n", kind.name, size,
                static_cast<unsigned long long>(doorbell.signals.load()),
                static_cast<unsigned long long>(interrupt.signals.load()),
                static_cast<unsigned long long>(kChains));
}

}  // namespace

int main() {
    for (const Kind& kind : kKinds) {
        for (u32 size : {2u, 64u}) run(kind, size);
    }
    return finish("test_virtio_threads");
}
