// What goes wrong with a disk: drivers that lie, hosts that are full, images that shrink. The guest
// gets an answer, the host a line, and the next request works.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <atomic>
#include <csignal>
#include <thread>

#include "block/open.hpp"
#include "block/qemu_nbd.hpp"
#include "check.hpp"
#include "disk_guest.hpp"
#include "random.hpp"
#include "rings.hpp"

using namespace pvtest;
using namespace std::chrono_literals;

namespace {

constexpr u64 kSize = 1 << 20;
constexpr u64 kSectors = kSize / 512;
const std::vector<u8> kSector(512, 0x5a);

// Answers as it is told to.
class FakeStore final : public block::Store {
  public:
    Info info() const override { return {.size = size, .read_only = read_only, .threads = 2}; }
    std::string name() const override { return "fake"; }
    int perform(block::Request& request) override {
        ++performed;
        while (blocked) std::this_thread::sleep_for(1ms);
        last_durable = request.durable;
        return error;
    }
    void resize(u64 bytes) override { size = bytes; }

    std::atomic<u64> size{kSize};
    bool read_only = false;
    std::atomic<int> error{0};
    std::atomic<bool> blocked{false};
    std::atomic<unsigned> performed{0};
    std::atomic<bool> last_durable{false};
};

struct Segment {
    u64 sector;
    u32 sectors, flags;
};

void requests_without_sense() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    Blk device(host.environment(), {.store = store, .serial = "number 1"});
    FakeGuest guest(device, host.memory);
    const std::vector<u8> odd(100);
    const Segment range{8, 8, 0}, unmap{8, 8, 1}, unknown{8, 8, 2}, outside{kSectors, 1, 0};
    const Segment wraps{~u64{0}, 8, 0}, huge{0, ~0u, 0}, nothing{8, 0, 0};
    const std::vector<u8> two(32);
    const struct {
        const char* what;
        u32 type;
        u64 sector;
        std::span<const u8> out;
        u32 in;
        u8 answer;
        bool performed;
    } table[] = {
        {"read", Blk::kIn, 0, {}, 512, Blk::kOk, true},
        {"read the end", Blk::kIn, kSectors - 1, {}, 512, Blk::kOk, true},
        {"read beyond", Blk::kIn, kSectors, {}, 512, Blk::kIoError, false},
        {"read across the end", Blk::kIn, kSectors - 1, {}, 1024, Blk::kIoError, false},
        {"read far beyond", Blk::kIn, ~u64{0}, {}, 512, Blk::kIoError, false},
        {"wrap around", Blk::kIn, ~u64{0} / 512 + 1, {}, 512, Blk::kIoError, false},
        {"read nothing", Blk::kIn, 0, {}, 0, Blk::kIoError, false},
        {"read half a sector", Blk::kIn, 0, {}, 100, Blk::kIoError, false},
        {"write", Blk::kOut, 0, kSector, 0, Blk::kOk, true},
        {"write nothing", Blk::kOut, 0, {}, 0, Blk::kIoError, false},
        {"write beyond", Blk::kOut, kSectors, kSector, 0, Blk::kIoError, false},
        {"write half a sector", Blk::kOut, 0, odd, 0, Blk::kIoError, false},
        {"flush", Blk::kFlush, 0, {}, 0, Blk::kOk, true},
        {"flush somewhere", Blk::kFlush, ~u64{0}, {}, 0, Blk::kOk, true},
        {"discard", Blk::kDiscard, 0, bytes_of(range), 0, Blk::kOk, true},
        {"discard with unmap", Blk::kDiscard, 0, bytes_of(unmap), 0, Blk::kUnsupported, false},
        {"discard, unknown flag", Blk::kDiscard, 0, bytes_of(unknown), 0, Blk::kUnsupported, false},
        {"discard outside", Blk::kDiscard, 0, bytes_of(outside), 0, Blk::kIoError, false},
        {"discard that wraps", Blk::kDiscard, 0, bytes_of(wraps), 0, Blk::kIoError, false},
        {"discard too much", Blk::kDiscard, 0, bytes_of(huge), 0, Blk::kIoError, false},
        {"discard nothing", Blk::kDiscard, 0, bytes_of(nothing), 0, Blk::kOk, false},
        {"discard two ranges", Blk::kDiscard, 0, two, 0, Blk::kIoError, false},
        {"discard no range", Blk::kDiscard, 0, {}, 0, Blk::kIoError, false},
        {"zeroes", Blk::kWriteZeroes, 0, bytes_of(range), 0, Blk::kOk, true},
        {"zeroes with unmap", Blk::kWriteZeroes, 0, bytes_of(unmap), 0, Blk::kOk, true},
        {"zeroes, unknown flag", Blk::kWriteZeroes, 0, bytes_of(unknown), 0, Blk::kUnsupported,
         false},
        {"zeroes outside", Blk::kWriteZeroes, 0, bytes_of(outside), 0, Blk::kIoError, false},
        {"lifetime", 10, 0, {}, 40, Blk::kUnsupported, false},
        {"secure erase", 14, 0, bytes_of(range), 0, Blk::kUnsupported, false},
        {"no type", 0xffff'ffff, 0, {}, 512, Blk::kUnsupported, false},
    };
    for (const auto& row : table) {
        const unsigned before = store->performed;
        const u8 got = status_of(ask(guest, row.type, row.sector, row.out, row.in));
        if (got != row.answer || (store->performed != before) != row.performed) {
            fail(__FILE__, __LINE__, std::string(row.what) + ": status " + std::to_string(got));
        }
        ++pvtest::checks;
    }
    // The serial number, padded; and in less room than it needs.
    auto id = ask(guest, Blk::kGetId, 0, {}, 20);
    CHECK_EQ(std::string(reinterpret_cast<char*>(id.data()), 20),
             std::string("number 1") + std::string(12, '\0'));
    id = ask(guest, Blk::kGetId, 0, {}, 3);
    CHECK_EQ(std::string(reinterpret_cast<char*>(id.data()), 3), std::string("num"));
    CHECK_EQ(unsigned{status_of(id)}, 0u);
    // A header that is cut short, with a place for the status.
    const std::vector<u8> stub(15);
    guest.free_buffers();
    CHECK_EQ(unsigned{status_of(guest.request(0, {stub}, 1))}, 1u);
    CHECK(device.failure().empty());
    // Nothing at all that could be written: then there can be no answer.
    guest.free_buffers();
    const DiskHeader header{Blk::kFlush, 0, 0};
    guest.driver(0).add({{guest.buffer(bytes_of(header)), 16, false}});
    guest.kick(0);
    CHECK(device.failure().find("status") != std::string::npos);
    CHECK(device.status() & kNeedsReset);
    FakeGuest again(device, host.memory);
    CHECK_EQ(unsigned{status_of(ask(again, Blk::kFlush, 0, {}, 0))}, 0u);
}

void read_only_disk() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    store->read_only = true;
    Blk device(host.environment(), {.store = store});
    CHECK(device.offered_features() & Blk::kReadOnly);
    CHECK(!(device.offered_features() & (Blk::kFlushFeature | Blk::kDiscardFeature)));
    FakeGuest guest(device, host.memory);
    const Segment range{8, 8, 0};
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, 0, {}, 512))}, 0u);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, 0, kSector, 0))}, 1u);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kDiscard, 0, bytes_of(range), 0))}, 1u);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kWriteZeroes, 0, bytes_of(range), 0))}, 1u);
    CHECK_EQ(store->performed.load(), 1u);
}

void errors_of_the_host() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    Blk device(host.environment(), {.store = store});
    FakeGuest guest(device, host.memory);
    store->error = ENOSPC;
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, 8, kSector, 0))}, 1u);
    store->error = EIO;
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kFlush, 0, {}, 0))}, 1u);
    store->error = 0;
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, 8, kSector, 0))}, 0u);
    const Blk::Statistics counts = device.statistics();
    CHECK_EQ(counts.write.requests, 2u);
    CHECK_EQ(counts.write.errors, 1u);
    CHECK_EQ(counts.write.bytes, 512u);
    CHECK_EQ(counts.flush.errors, 1u);
    std::lock_guard lock(host.lines_mutex);
    CHECK_EQ(host.lines.size(), std::size_t{2});
    CHECK(host.lines[0].find("write of 512 bytes at 4096") != std::string::npos);
    CHECK(host.lines[0].find("No space left") != std::string::npos);
}

// The image becomes shorter, and the file system full, under io_uring and under threads.
void broken_images() {
    for (block::Io io : {block::Io::kAuto, block::Io::kThreads}) {
        Host host;
        Folder folder;
        const std::string path = folder.file("disk", std::vector<u8>(kSize, 7));
        Blk device(host.environment(), {.store = block::open_image(path, {}), .io = io});
        FakeGuest guest(device, host.memory);
        std::filesystem::resize_file(path, kSize / 2 + 512);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, 0, {}, 4096))}, 0u);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, kSectors / 2, {}, 4096))}, 1u);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, kSectors - 8, {}, 4096))}, 1u);
        // A limit on the size of files is how a disk can be full without being root.
        rlimit before{};
        ::getrlimit(RLIMIT_FSIZE, &before);
        const rlimit tight{kSize / 2, before.rlim_max};
        ::setrlimit(RLIMIT_FSIZE, &tight);
        const std::vector<u8> page(4096, 1);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, kSectors / 2 + 64, page, 0))}, 1u);
        ::setrlimit(RLIMIT_FSIZE, &before);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, kSectors / 2 + 64, page, 0))}, 0u);
        CHECK_EQ(device.statistics().write.errors, 1u);
        CHECK_EQ(device.statistics().read.errors, 2u);
    }
}

void full_host_disk() {
    Folder folder;
    if (::mount("none", folder.path().c_str(), "tmpfs", 0, "size=256k") != 0) {
        std::fprintf(stderr, "cannot mount a tmpfs here: no test of a full disk\n");
        return;
    }
    for (block::Io io : {block::Io::kAuto, block::Io::kThreads}) {
        Host host;
        const std::string path = folder.file("disk", {});
        std::filesystem::resize_file(path, kSize);
        {
            Blk device(host.environment(), {.store = block::open_image(path, {}), .io = io});
            FakeGuest guest(device, host.memory);
            const std::vector<u8> much(64 << 10, 1);
            unsigned errors = 0;
            for (u64 at = 0; at < kSectors; at += 128) {
                errors += status_of(ask(guest, Blk::kOut, at, much, 0)) == Blk::kIoError;
            }
            CHECK(errors >= 12 && errors < 16);
            CHECK_EQ(device.statistics().write.errors, u64{errors});
            // What is there can be read, and room be made.
            CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, 0, {}, 4096))}, 0u);
            const Segment range{0, 256, 0};
            CHECK_EQ(unsigned{status_of(ask(guest, Blk::kDiscard, 0, bytes_of(range), 0))}, 0u);
            CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, kSectors - 128, much, 0))}, 0u);
            std::lock_guard lock(host.lines_mutex);
            CHECK(host.lines.at(0).find("No space left") != std::string::npos);
        }
        std::filesystem::remove(path);
    }
    ::umount(folder.path().c_str());
}

void locks() {
    Folder folder;
    const std::string path = folder.file("disk", std::vector<u8>(kSize));
    auto refused = [&](const block::ImageOptions& options) {
        try {
            block::open_image(path, options);
        } catch (const HostError& error) {
            CHECK_EQ(error.code, EBUSY);
            CHECK_EQ(error.path, path);
            return true;
        }
        return false;
    };
    {
        auto writer = block::open_image(path, {});
        CHECK(refused({}));
        CHECK(refused({.read_only = true}));
        CHECK(refused({.snapshot = true}));
    }
    auto reader = block::open_image(path, {.read_only = true});
    CHECK(!refused({.read_only = true}));
    CHECK(!refused({.snapshot = true}));
    CHECK(refused({}));
    CHECK_THROWS(block::open_image("/nonexistent", {}), HostError);
    CHECK_THROWS(block::open_image("/dev/null", {}), HostError);
    CHECK_THROWS(block::open_image(folder.path(), {.read_only = true}), HostError);
}

// Reset, the reset of a queue, pause and the end while requests are in flight: each waits for them.
void stops_under_load() {
    for (int what = 0; what < 4; ++what) {
        Host host;
        auto store = std::make_shared<FakeStore>();
        auto device = std::make_unique<Blk>(host.environment(), Blk::Config{.store = store});
        FakeGuest guest(*device, host.memory);
        store->blocked = true;
        std::vector<u64> answers;
        const DiskHeader header{Blk::kIn, 0, 0};
        for (int i = 0; i < 6; ++i) {
            answers.push_back(guest.buffer(513));
            host.memory.store<u8>(Gpa(answers.back() + 512), 0xee);
            guest.driver(0).add(
                {{guest.buffer(bytes_of(header)), 16, false}, {answers.back(), 513, true}});
        }
        guest.kick(0);
        std::atomic<bool> done{false};
        std::thread stopper([&] {
            if (what == 0) device->reset();
            if (what == 1) device->reset_queue(0);
            if (what >= 2) device->pause();
            done = true;
        });
        std::this_thread::sleep_for(20ms);
        CHECK(!done);
        store->blocked = false;
        stopper.join();
        CHECK_EQ(store->performed.load(), 6u);
        // A reset forgets them; a pause gives them back.
        unsigned back = 0;
        while (guest.driver(0).get()) ++back;
        CHECK_EQ(back, what >= 2 ? 6u : 0u);
        if (what == 2) {
            // Nothing is begun until it goes on, and nothing is lost.
            guest.driver(0).add(
                {{guest.buffer(bytes_of(header)), 16, false}, {answers[0], 513, true}});
            guest.kick(0);
            std::this_thread::sleep_for(5ms);
            CHECK_EQ(store->performed.load(), 6u);
            device->resume();
            CHECK(guest.wait(0).has_value());
        }
        if (what == 3) {
            const std::vector<u8> state = device->save();
            auto other = std::make_shared<FakeStore>();
            Blk twin(host.environment(), {.store = other});
            twin.pause();
            twin.restore(state);
            twin.connect(&guest);
            twin.resume();
            guest.driver(0).add(
                {{guest.buffer(bytes_of(header)), 16, false}, {answers[0], 513, true}});
            if (guest.driver(0).publish()) twin.kick(0);
            CHECK(guest.wait(0).has_value());
            other->size = 2 * kSize;
            twin.pause();
            CHECK_THROWS(twin.restore(state), StateError);
        }
    }
}

// More in flight than there is room for: the rest waits in the ring.
void reused_heads() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    Blk device(host.environment(), {.store = store});
    FakeGuest guest(device, host.memory);
    store->blocked = true;
    const DiskHeader header{Blk::kIn, 0, 0};
    const u64 request = guest.buffer(bytes_of(header)), answer = guest.buffer(513);
    unsigned offered = 0;
    // (A driver with two descriptors per request has 128 of them in flight.)
    while (guest.driver(0).add({{request, 16, false}, {answer, 513, true}})) ++offered;
    guest.kick(0);
    store->blocked = false;
    for (unsigned i = 0; i < offered; ++i) CHECK(guest.wait(0).has_value());
    CHECK_EQ(store->performed.load(), offered);
}

void write_cache() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    Blk device(host.environment(), {.store = store});
    auto durable = [&](FakeGuest& guest) {
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, 0, kSector, 0))}, 0u);
        return store->last_durable.load();
    };
    {
        FakeGuest guest(device, host.memory);
        CHECK(!durable(guest));
        const u8 off = 0, on = 1;
        device.write_config(32, {&off, 1});
        CHECK(durable(guest));
        device.write_config(32, {&on, 1});
        CHECK(!durable(guest));
        const std::vector<u8> junk(8, 0xff);  // nothing else can be written
        device.write_config(0, junk);
        CHECK_EQ(device.capacity(), kSize);
    }
    {
        FakeGuest guest(device, host.memory, {.features = ~u64{Blk::kConfigWce}});
        CHECK(!durable(guest));
    }
    FakeGuest guest(device, host.memory, {.features = ~u64{Blk::kConfigWce | Blk::kFlushFeature}});
    CHECK(durable(guest));
}

void resizing() {
    Host host;
    Folder folder;
    const std::string path = folder.file("disk", std::vector<u8>(kSize));
    Blk device(host.environment(), {.store = block::open_image(path, {})});
    FakeGuest guest(device, host.memory);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, kSectors, {}, 512))}, 1u);
    const u32 generation = device.config_generation();
    device.resize(2 * kSize);
    CHECK_EQ(std::filesystem::file_size(path), 2 * kSize);
    CHECK_EQ(guest.config_interrupts(), 1u);
    CHECK(device.config_generation() != generation);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, kSectors, {}, 512))}, 0u);
    CHECK_THROWS(device.resize(1000), ConfigError);
    std::filesystem::resize_file(path, kSize);
    device.refresh_capacity();
    CHECK_EQ(guest.config_interrupts(), 2u);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, kSectors, {}, 512))}, 1u);
}

// A request that must wait stays in the ring; over time the rate holds, whatever the sizes.
void rates() {
    const struct {
        block::RateLimit::Rates rates;
        u32 size, count;
        double least, most;
    } table[] = {
        {{.operations_per_second = 200}, 512, 80, 0.28, 0.8},
        {{.bytes_per_second = 4 << 20}, 65536, 32, 0.38, 1.0},
    };
    for (const auto& row : table) {
        Host host;
        auto store = std::make_shared<FakeStore>();
        Blk device(host.environment(), {.store = store, .queues = 2, .rates = row.rates});
        FakeGuest guest(device, host.memory);
        const DiskHeader header{Blk::kIn, 0, 0};
        const u64 request = guest.buffer(bytes_of(header)), answer = guest.buffer(row.size + 1);
        const auto start = std::chrono::steady_clock::now();
        for (u32 i = 0; i < row.count; ++i) {
            CHECK(guest.driver(i % 2).add({{request, 16, false}, {answer, row.size + 1, true}}));
        }
        guest.kick(0);
        guest.kick(1);
        for (u32 i = 0; i < row.count; ++i) CHECK(guest.wait(i % 2).has_value());
        const double seconds =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (seconds < row.least || seconds > row.most) {
            fail(__FILE__, __LINE__, "the limit let it take " + std::to_string(seconds) + " s");
        }
        ++pvtest::checks;
    }
    // A pause while requests are held back does not wait for them.
    Host host;
    auto store = std::make_shared<FakeStore>();
    Blk device(host.environment(), {.store = store, .rates = {.operations_per_second = 1}});
    FakeGuest guest(device, host.memory);
    CHECK_EQ(unsigned{status_of(ask(guest, Blk::kIn, 0, {}, 512))}, 0u);
    const DiskHeader header{Blk::kIn, 0, 0};
    guest.driver(0).add(
        {{guest.buffer(bytes_of(header)), 16, false}, {guest.buffer(513), 513, true}});
    guest.kick(0);
    device.pause();
    CHECK_EQ(store->performed.load(), 1u);
    device.resume();
}

// The kernel gives back what a thread submitted when that thread ends: a vCPU's, for one. It is
// done all the same.
void submitters_that_end() {
    Host host;
    Folder folder(true);
    const std::string path = folder.file("disk", std::vector<u8>(kSize));
    Blk device(host.environment(), {.store = block::open_image(path, {})});
    FakeGuest guest(device, host.memory);
    const u8 off = 0;
    device.write_config(32, {&off, 1});  // each write waits for the disk
    for (unsigned round = 0; round < 3; ++round) {
        guest.free_buffers();
        std::vector<u64> answers;
        for (unsigned i = 0; i < 60; ++i) {
            const DiskHeader header{Blk::kOut, 0, i * 8};
            const std::vector<u8> data(4096, static_cast<u8>(round * 60 + i));
            answers.push_back(guest.buffer(1));
            host.memory.store<u8>(Gpa(answers.back()), 0xee);
            CHECK(guest.driver(0).add({{guest.buffer(bytes_of(header)), 16, false},
                                       {guest.buffer(data), 4096, false},
                                       {answers.back(), 1, true}}));
        }
        std::thread([&] { guest.kick(0); }).join();
        for (unsigned i = 0; i < 60; ++i) CHECK(guest.wait(0).has_value());
        const std::vector<u8> there = contents_of(path);
        for (unsigned i = 0; i < 60; ++i) {
            CHECK_EQ(unsigned{host.memory.load<u8>(Gpa(answers[i]))}, 0u);
            CHECK_EQ(unsigned{there[i * 4096]}, round * 60 + i);
        }
    }
}

// As in many containers. (A filter holds for the thread that asks for it, and those it starts.)
void io_uring_denied() {
    Folder folder;
    const std::string path = folder.file("disk", std::vector<u8>(kSize, 3));
    std::thread([&] {
        sock_filter code[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        const sock_fprog filter{4, code};
        ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        CHECK_EQ(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter), 0);
        Host host;
        auto store = block::open_image(path, {});
        CHECK_THROWS(Blk(host.environment(), {.store = store, .io = block::Io::kUring}), HostError);
        Blk device(host.environment(), {.store = store});
        CHECK_EQ(std::string(device.io()), std::string("threads"));
        FakeGuest guest(device, host.memory);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kOut, 8, kSector, 0))}, 0u);
        CHECK_EQ(unsigned{status_of(ask(guest, Blk::kFlush, 0, {}, 0))}, 0u);
    }).join();
    CHECK_EQ(unsigned{contents_of(path)[4096]}, 0x5au);
    Host host;
    Blk device(host.environment(), {.store = block::open_image(path, {})});
    std::fprintf(stderr, "disks are served by %s here\n", device.io());
}

// For runs that are to be repeatable: what a notification begins is done when it returns.
void synchronous() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    Blk device(host.environment(), {.store = store, .synchronous = true});
    FakeGuest guest(device, host.memory);
    const DiskHeader header{Blk::kIn, 0, 0};
    for (unsigned i = 0; i < 20; ++i) {
        guest.free_buffers();
        guest.driver(0).add(
            {{guest.buffer(bytes_of(header)), 16, false}, {guest.buffer(513), 513, true}});
        guest.kick(0);
        CHECK(guest.driver(0).get().has_value());
    }
}

void configurations() {
    Host host;
    auto store = std::make_shared<FakeStore>();
    CHECK_THROWS(Blk(host.environment(), {.store = store, .queues = 0}), ConfigError);
    CHECK_THROWS(Blk(host.environment(), {.store = store, .queues = 65}), ConfigError);
    CHECK_THROWS(Blk(host.environment(), {.store = store, .serial = std::string(21, 'x')}),
                 ConfigError);
    CHECK_THROWS(Blk(host.environment(), {.store = store, .io = block::Io::kUring}), HostError);
    store->size = 0;
    CHECK_THROWS(Blk(host.environment(), {.store = store}), ConfigError);
}

}  // namespace

int main() {
    ::signal(SIGXFSZ, SIG_IGN);
    requests_without_sense();
    read_only_disk();
    errors_of_the_host();
    broken_images();
    full_host_disk();
    locks();
    stops_under_load();
    reused_heads();
    write_cache();
    resizing();
    rates();
    submitters_that_end();
    io_uring_denied();
    synchronous();
    configurations();
    return finish("test_blk_mistakes");
}
