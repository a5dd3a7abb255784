// The event loop: descriptors, timers, tasks, bounded stop.
#include "bus/event_loop.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "check.hpp"

using namespace polyvisor;
using namespace std::chrono_literals;

namespace {

// A flag to wait for, with a limit so that a lost event fails the test instead of hanging it.
class Latch {
  public:
    void hit() {
        std::lock_guard lock(mutex_);
        ++count_;
        changed_.notify_all();
    }
    bool wait(int count = 1) {
        std::unique_lock lock(mutex_);
        return changed_.wait_for(lock, 5s, [&] { return count_ >= count; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int count_ = 0;
};

struct Pipe {
    Pipe() {
        int fds[2];
        if (::pipe(fds) != 0) throw_errno("pipe");
        read = OwnedFd(fds[0]);
        write = OwnedFd(fds[1]);
    }
    OwnedFd read, write;
};

void descriptors() {
    Clock clock;
    EventLoop loop(clock);
    Pipe pipe;
    Latch got;
    std::atomic<int> bytes{0};
    std::atomic<bool> in_loop{false};  // CHECK is for the main thread
    loop.watch(pipe.read.get(), EPOLLIN, [&](u32 events) {
        in_loop = loop.in_loop_thread() && (events & EPOLLIN);
        char data[16];
        bytes += static_cast<int>(::read(pipe.read.get(), data, sizeof data));
        got.hit();
    });
    CHECK_THROWS(loop.watch(pipe.read.get(), EPOLLIN, [](u32) {}), HostError);
    CHECK_THROWS(loop.watch(-1, EPOLLIN, [](u32) {}), HostError);
    CHECK_THROWS(loop.modify(pipe.write.get(), EPOLLIN), HostError);
    loop.start();
    CHECK(!loop.in_loop_thread());
    CHECK(::write(pipe.write.get(), "abc", 3) == 3);
    CHECK(got.wait());
    CHECK_EQ(bytes.load(), 3);
    CHECK(in_loop.load());
    loop.modify(pipe.read.get(), 0);
    CHECK(::write(pipe.write.get(), "d", 1) == 1);
    Latch passed;
    loop.post([&] { passed.hit(); });
    CHECK(passed.wait());
    CHECK_EQ(bytes.load(), 3);
    loop.unwatch(pipe.read.get());
    loop.unwatch(pipe.read.get());  // twice is harmless
    // The same descriptor again, and unwatched from inside its own callback.
    Latch again;
    loop.watch(pipe.read.get(), EPOLLIN, [&](u32) {
        loop.unwatch(pipe.read.get());
        again.hit();
    });
    CHECK(again.wait());
    Latch after;
    loop.post([&] { after.hit(); });
    CHECK(after.wait());
}

void unwatch_waits() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Pipe pipe;
    Latch entered;
    std::atomic<bool> left{false};
    loop.watch(pipe.read.get(), EPOLLIN, [&](u32) {
        if (left) return;
        entered.hit();
        std::this_thread::sleep_for(20ms);
        left = true;
    });
    CHECK(::write(pipe.write.get(), "x", 1) == 1);
    CHECK(entered.wait());
    loop.unwatch(pipe.read.get());
    CHECK(left.load());
}

void timers() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Latch ticks, late;
    std::atomic<u64> fired_at{0};
    u64 start = clock.now();
    Timer timer(clock, [&] {
        fired_at = clock.now();
        late.hit();
    });
    timer.arm(start + 20'000'000);
    Timer periodic(clock, [&] {
        ticks.hit();
        periodic.arm(clock.now() + 1'000'000);
    });
    periodic.arm(clock.now() + 1'000'000);
    CHECK(late.wait());
    CHECK(fired_at - start >= 20'000'000);
    CHECK(fired_at - start < 1'000'000'000);
    CHECK(ticks.wait(5));

    // Nothing fires while paused; what was due comes after.
    periodic.disarm();
    clock.pause();
    Latch resumed;
    Timer held(clock, [&] { resumed.hit(); });
    held.arm(clock.now() + 1'000'000);
    std::this_thread::sleep_for(20ms);
    CHECK(held.deadline() != kNever);
    clock.resume();
    CHECK(resumed.wait());
}

void tasks_and_stop() {
    Clock clock;
    EventLoop loop(clock);
    std::vector<int> order;
    Latch done;
    for (int i = 0; i < 100; ++i) loop.post([&, i] { order.push_back(i); });
    loop.post([&] { done.hit(); });
    loop.start();
    loop.start();  // twice is harmless
    CHECK(done.wait());
    CHECK_EQ(order.size(), 100u);
    for (int i = 0; i < 100; ++i) CHECK_EQ(order[i], i);

    auto start = std::chrono::steady_clock::now();
    loop.stop();
    loop.stop();
    CHECK(std::chrono::steady_clock::now() - start < 1s);
    Latch again;
    loop.post([&] { again.hit(); });
    loop.start();
    CHECK(again.wait());
    Latch asked;
    loop.post([&] {
        loop.stop();  // from its own thread: no deadlock
        asked.hit();
    });
    CHECK(asked.wait());
}

void regular_files_cannot_be_watched() {
    Clock clock;
    EventLoop loop(clock);
    char path[] = "/tmp/polyvisor-test-XXXXXX";
    OwnedFd file(::mkstemp(path));
    ::unlink(path);
    try {
        loop.watch(file.get(), EPOLLIN, [](u32) {});
        CHECK(false);
    } catch (const HostError& error) {
        CHECK_EQ(error.code, EPERM);
    }
}

}  // namespace

int main() {
    descriptors();
    unwatch_waits();
    timers();
    tasks_and_stop();
    regular_files_cannot_be_watched();
    return pvtest::finish("test_event_loop");
}
