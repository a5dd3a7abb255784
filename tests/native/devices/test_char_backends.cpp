// Console backends on real descriptors: order, back-pressure, closed readers, full devices, files.
#include "devices/char_backends.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"

using namespace polyvisor;
using namespace polyvisor::devices;
using namespace std::chrono_literals;

namespace {

struct Pipe {
    Pipe() {
        int fds[2];
        if (::pipe2(fds, O_CLOEXEC) != 0) throw_errno("pipe");
        read = OwnedFd(fds[0]);
        write = OwnedFd(fds[1]);
    }
    OwnedFd read, write;
};

std::span<const u8> bytes(std::string_view text) {
    return {reinterpret_cast<const u8*>(text.data()), text.size()};
}

template <class Condition>
bool eventually(Condition condition) {
    for (int i = 0; i < 5000; ++i) {
        if (condition()) return true;
        std::this_thread::sleep_for(1ms);
    }
    return false;
}

std::string read_all(int fd, std::size_t size) {
    std::string text(size, '\0');
    std::size_t done = 0;
    while (done < size) {
        ssize_t count = ::read(fd, text.data() + done, size - done);
        if (count <= 0) break;
        done += static_cast<std::size_t>(count);
    }
    text.resize(done);
    return text;
}

void pipe_in_order() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Pipe pipe;
    FdSink sink(loop, pipe.write.get());
    std::string want;
    for (int i = 0; i < 1000; ++i) {
        std::string line = "line " + std::to_string(i) + "\n";
        want += line;
        sink.write(bytes(line));
    }
    CHECK(read_all(pipe.read.get(), want.size()) == want);
    CHECK_EQ(sink.dropped(), 0u);
    // The pipe's own flags, which others share, are as they were.
    CHECK_EQ(::fcntl(pipe.write.get(), F_GETFL) & O_NONBLOCK, 0);
}

void slow_reader_holds_back() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Pipe pipe;
    FdSink sink(loop, pipe.write.get());
    std::atomic<int> ready{0};
    sink.set_ready_callback([&] { ++ready; });
    std::string block(1024, 'x');
    std::size_t sent = 0;
    auto start = std::chrono::steady_clock::now();
    while (sink.ready() && sent < (8u << 20)) {
        sink.write(bytes(block));
        sent += block.size();
        if (sent % (64 * 1024) == 0) std::this_thread::sleep_for(1ms);
    }
    CHECK(std::chrono::steady_clock::now() - start < 5s);
    CHECK(!sink.ready());
    CHECK(sent < 1u << 20);
    CHECK_EQ(ready.load(), 0);
    CHECK(read_all(pipe.read.get(), sent) == std::string(sent, 'x'));
    CHECK(eventually([&] { return ready == 1; }));
    CHECK(sink.ready());
    sink.set_ready_callback({});
}

// A device that cannot wait may fill the buffer; beyond that bytes are dropped and counted.
void limit() {
    Clock clock;
    EventLoop loop(clock);
    Pipe pipe;
    FdSink sink(loop, pipe.write.get());
    std::string block(1 << 20, 'y');
    for (int i = 0; i < 6; ++i) sink.write(bytes(block));
    CHECK_EQ(sink.dropped(), 2u << 20);
    auto start = std::chrono::steady_clock::now();
    CHECK(!sink.drain(50));
    CHECK(std::chrono::steady_clock::now() - start < 2s);
}

void reader_gone() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Pipe pipe;
    std::atomic<int> error{0}, calls{0};
    FdSink sink(loop, pipe.write.get(), [&](int code) {
        error = code;
        ++calls;
    });
    pipe.read.reset();
    sink.write(bytes("nobody reads this\n"));
    CHECK(eventually([&] { return calls == 1; }));
    CHECK_EQ(error.load(), EPIPE);
    CHECK_EQ(sink.error(), EPIPE);
    sink.write(bytes("nor this\n"));
    CHECK(sink.ready());
    CHECK(sink.drain(100));
    CHECK_EQ(calls.load(), 1);
}

// drain() in a thread for which SIGPIPE is deadly: an error, no signal.
void no_sigpipe_in_drain() {
    Clock clock;
    EventLoop loop(clock);
    Pipe pipe;
    int error = 0;
    FdSink sink(loop, pipe.write.get(), [&](int code) { error = code; });
    pipe.read.reset();
    ::signal(SIGPIPE, SIG_DFL);
    sink.write(bytes("x"));
    CHECK(sink.drain(1000));
    CHECK_EQ(error, EPIPE);
}

void full_device_and_files() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    OwnedFd full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
    std::atomic<int> error{0};
    FdSink sink(loop, full.get(), [&](int code) { error = code; });
    sink.write(bytes("x"));
    CHECK(eventually([&] { return error == ENOSPC; }));

    char path[] = "/tmp/polyvisor-test-XXXXXX";
    OwnedFd file(::mkstemp(path));
    FdSink to_file(loop, file.get());
    to_file.write(bytes("one\n"));
    to_file.write(bytes("two\n"));
    CHECK(to_file.drain(2000));
    CHECK_EQ(::lseek(file.get(), 0, SEEK_SET), 0);
    CHECK_EQ(read_all(file.get(), 8), "one\ntwo\n");
    ::unlink(path);

    OwnedFd read_only(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    CHECK_THROWS(FdSink(loop, read_only.get()), HostError);
    CHECK_THROWS(FdSink(loop, -1), HostError);
}

void socket_pair() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    int fds[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    OwnedFd a(fds[0]), b(fds[1]);
    FdSink sink(loop, a.get());
    std::string big(512 * 1024, 's');
    sink.write(bytes(big));
    CHECK(read_all(b.get(), big.size()) == big);
}

void destroyed_with_output_left() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Pipe pipe;
    for (int i = 0; i < 50; ++i) {
        FdSink sink(loop, pipe.write.get(), [](int) {});
        sink.write(bytes(std::string(100'000, 'd')));
    }
    CHECK(true);
}

void buffer() {
    BufferSink sink(10);
    int calls = 0;
    sink.set_callback([&] { ++calls; });
    sink.write(bytes("0123456"));
    sink.write(bytes("789abc"));
    CHECK_EQ(sink.text(), "3456789abc");
    CHECK_EQ(sink.written(), 13u);
    CHECK_EQ(sink.take(), "3456789abc");
    CHECK_EQ(sink.text(), "");
    sink.write(bytes("0123456789abcdefghijk"));
    CHECK_EQ(sink.text(), "bcdefghijk");
    CHECK_EQ(calls, 3);
    BufferSink other;
    TeeSink tee({&sink, &other});
    tee.write(bytes("z"));
    CHECK_EQ(other.text(), "z");
    CHECK_EQ(sink.text(), "cdefghijkz");
    CHECK(tee.ready());
}

// A taker with little room: nothing is lost, nothing is read ahead for long.
void source_respects_room() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Pipe pipe;
    std::mutex mutex;
    std::string got;
    std::size_t room = 16;
    std::atomic<int> ended{-1};
    FdSource source(
        loop, pipe.read.get(),
        [&](std::span<const u8> data) {
            std::lock_guard lock(mutex);
            std::size_t count = std::min(room, data.size());
            got.append(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(count));
            room -= count;
            return count;
        },
        [&](int error) { ended = error; });
    auto size = [&] {
        std::lock_guard lock(mutex);
        return got.size();
    };
    std::string want;
    for (int i = 0; i < 1000; ++i) want += static_cast<char>('a' + i % 26);
    CHECK_EQ(::write(pipe.write.get(), want.data(), want.size()), 1000);
    CHECK(eventually([&] { return size() == 16; }));
    std::this_thread::sleep_for(5ms);
    CHECK_EQ(size(), 16u);
    for (int step = 0; step < 100 && size() < 1000; ++step) {
        std::size_t before = size();
        {
            std::lock_guard lock(mutex);
            room = 16;
        }
        source.resume();
        CHECK(eventually([&] { return size() >= std::min<std::size_t>(before + 16, 1000); }));
    }
    CHECK(got == want);
    {
        std::lock_guard lock(mutex);
        room = 100;
    }
    pipe.write.reset();
    source.resume();
    CHECK(eventually([&] { return ended == 0; }));
}

void source_reads_files() {
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    char path[] = "/tmp/polyvisor-test-XXXXXX";
    OwnedFd file(::mkstemp(path));
    ::unlink(path);
    std::string want(5000, 'f');
    CHECK_EQ(::write(file.get(), want.data(), want.size()), 5000);
    ::lseek(file.get(), 0, SEEK_SET);
    std::atomic<std::size_t> got{0};
    std::atomic<int> ended{-1};
    FdSource source(
        loop, file.get(),
        [&](std::span<const u8> data) {
            got += data.size();
            return data.size();
        },
        [&](int error) { ended = error; });
    CHECK(eventually([&] { return ended == 0; }));
    CHECK_EQ(got.load(), 5000u);
    CHECK_THROWS(FdSource(loop, -1, {}), HostError);
}

}  // namespace

int main() {
    pipe_in_order();
    slow_reader_holds_back();
    limit();
    reader_gone();
    no_sigpipe_in_drain();
    full_device_and_files();
    socket_pair();
    destroyed_with_output_left();
    buffer();
    source_respects_room();
    source_reads_files();
    return pvtest::finish("test_char_backends");
}
