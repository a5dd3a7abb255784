// Every device against a driver that does anything: chains of random descriptors with contents that
// are nearly right, rings whose indices and descriptors change under the device, configuration
// writes, resets at any moment, pauses, and a host that is busy meanwhile. Nothing may crash, hang
// or touch what is not its own (make asan, make ubsan); after each reset the device works anew.
//
//     PV_FUZZ=1000000 test_virtio_fuzz [DEVICE]       operations for each device; PV_SEED
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "base/error.hpp"
#include "block/file_store.hpp"
#include "check.hpp"
#include "net/user.hpp"
#include "random.hpp"
#include "virtio/blk.hpp"
#include "virtio/console.hpp"
#include "virtio/fake_guest.hpp"
#include "virtio/net.hpp"
#include "virtio/vsock.hpp"
#include "virtio/vsock_packet.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;
using namespace pvtest;

namespace {

constexpr u64 kMemory = 4 << 20, kHigh = u64{1} << 32, kRom = 0x800000;
constexpr u64 kBuffers = 0x200000, kBufferBytes = 0x100000;

// One device to be fuzzed.
struct Target {
    virtual ~Target() = default;
    virtual std::shared_ptr<virtio::Device> make(const Environment& environment) = 0;
    /// Fills the first readable bytes of a request with something that the device will look at.
    virtual void fill(Random& random, unsigned queue, std::span<u8> bytes) = 0;
    /// Bytes to write to without which a chain is a mistake that the device has to be reset for.
    virtual u32 least_writable(unsigned) { return 0; }
    /// Whatever the host may do meanwhile.
    virtual void host(Random&) {}
};

template <class T>
void put(std::span<u8> bytes, std::size_t at, T value) {
    if (at + sizeof value <= bytes.size()) std::memcpy(bytes.data() + at, &value, sizeof value);
}

struct BlkTarget final : Target {
    Blk* device = nullptr;  // the Fuzzer's
    std::shared_ptr<virtio::Device> make(const Environment& environment) override {
        OwnedFd file(::memfd_create("fuzz", MFD_CLOEXEC));
        if (::ftruncate(file.get(), 64 << 10) != 0) throw_errno("ftruncate");
        Blk::Config config;
        config.store =
            std::make_shared<block::FileStore>(std::move(file), "fuzz", block::Cache::kWriteback);
        config.queues = 2;
        config.serial = "fuzz";
        auto made = std::make_shared<Blk>(environment, config);
        device = made.get();
        return made;
    }
    void fill(Random& random, unsigned, std::span<u8> bytes) override {
        put(bytes, 0, random.pick<u32>({0, 0, 1, 1, 4, 8, 11, 13, 2, 99}));
        put(bytes, 8, random.one_in(8) ? random.next() : u64{random.below(2100)});
        put(bytes, 16, u64{random.below(2100)});  // a discard's segment
        put(bytes, 24, random.below(64));
        put(bytes, 28, random.below(4));
    }
    u32 least_writable(unsigned) override { return 1; }
    void host(Random& random) override {
        // Only to more: a write that is under way when a file becomes shorter makes it longer
        // again.
        device->resize(std::min<u64>(device->capacity() + 512 * u64{random.below(9)}, 1 << 20));
        device->statistics();
    }
};

struct NetTarget final : Target {
    Net* device = nullptr;  // the Fuzzer's
    std::shared_ptr<virtio::Device> make(const Environment& environment) override {
        net::UserConfig user;
        user.restricted = true;
        NetConfig config;
        config.mac = {0x52, 0x54, 0, 1, 2, 3};
        config.pairs = 2;
        auto made = std::make_shared<Net>(
            environment, std::make_unique<net::User>(environment.loop, nullptr, user), config);
        device = made.get();
        return made;
    }
    void fill(Random& random, unsigned queue, std::span<u8> bytes) override {
        if (queue == device->queues() - 1) {  // control: class, command, data
            put(bytes, 0, static_cast<u8>(random.below(6)));
            put(bytes, 1, static_cast<u8>(random.below(4)));
            put(bytes, 2, random.pick<u32>({0, 1, 2, 0xffff, 0xffffffff}));
            return;
        }
        put(bytes, 0, static_cast<u8>(random.below(4)));
        put(bytes, 1, random.pick<u8>({0, 0, 1, 3, 4, 5, 0x81}));
        put(bytes, 2, static_cast<u16>(random.below(80)));
        put(bytes, 4, static_cast<u16>(random.one_in(4) ? random.next() : random.below(1500)));
        put(bytes, 6, static_cast<u16>(random.one_in(8) ? random.next() : 34));
        put(bytes, 8, static_cast<u16>(random.one_in(8) ? random.next() : 16));
        const u8 frame[] = {0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 1, 2, 3};
        for (std::size_t i = 0; i < sizeof frame; ++i) put(bytes, 12 + i, frame[i]);
        put(bytes, 24, random.pick<u16>({0x0008, 0x0608, 0xdd86, 0x0081}));
        put(bytes, 26, random.pick<u8>({0x45, 0x46, 0x60, 0x4f}));
        put(bytes, 35, random.pick<u8>({6, 17, 1}));
        put(bytes, 38, u32{0x0f02000a});
        put(bytes, 42, random.pick<u32>({0x0202000a, 0x0302000a, 0x0100007f}));
    }
    u32 least_writable(unsigned queue) override {
        if (queue == device->queues() - 1) return 1;
        return queue % 2 == 0 ? 12 : 0;
    }
    void host(Random& random) override {
        std::vector<u8> frame(random.below(2000));
        for (std::size_t i = 0; i < std::min<std::size_t>(frame.size(), 64); ++i) {
            frame[i] = static_cast<u8>(random.next());
        }
        if (random.one_in(2) && frame.size() > 6) std::memset(frame.data(), 0xff, 6);
        device->inject(frame);
        if (random.one_in(16)) device->set_link(random.one_in(2));
    }
};

struct ConsoleTarget final : Target {
    Console* device = nullptr;  // the Fuzzer's
    std::shared_ptr<virtio::Device> make(const Environment& environment) override {
        Console::Config config;
        config.ports = {{"", true}, {"data", false}};
        config.max_ports = 4;
        auto made = std::make_shared<Console>(environment, config);
        device = made.get();
        device->console(0)->set_flow_control(true);
        return made;
    }
    void fill(Random& random, unsigned queue, std::span<u8> bytes) override {
        if (queue != 3) return;
        put(bytes, 0, random.one_in(8) ? static_cast<u32>(random.next()) : random.below(5));
        put(bytes, 4, static_cast<u16>(random.below(9)));
        put(bytes, 6, static_cast<u16>(random.below(3)));
    }
    void host(Random& random) override {
        std::vector<u8> typed(random.below(300));
        device->console(random.below(4))->send(typed);
        device->resize({static_cast<u16>(random.next()), 80});
        device->set_host_open(random.below(2), random.one_in(2));
        std::string said;
        if (random.one_in(2))
            device->console(0)->read(device->console(0)->size() / 2, 1 << 20, said);
        try {
            if (random.one_in(2)) {
                device->add_port({"more" + std::to_string(random.below(3)), false});
            } else {
                device->remove_port(2 + random.below(2));
            }
        } catch (const Error&) {  // there is none, or no more
        }
    }
};

struct VsockTarget final : Target {
    Vsock* device = nullptr;  // the Fuzzer's
    std::vector<OwnedFd> sockets;
    std::shared_ptr<virtio::Device> make(const Environment& environment) override {
        auto made = std::make_shared<Vsock>(environment, Vsock::Config{3, ""});
        device = made.get();
        int pair[2];
        if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) {
            throw_errno("socketpair");
        }
        device->listen(5, OwnedFd(pair[0]));
        acceptor_ = OwnedFd(pair[1]);
        return made;
    }
    void fill(Random& random, unsigned, std::span<u8> bytes) override {
        VsockHeader header;
        header.src_cid = random.one_in(16) ? random.next() : 3;
        header.dst_cid = random.one_in(16) ? random.next() : 2;
        header.src_port = random.below(4);
        header.dst_port = random.one_in(2) ? 5 : (1u << 30) + random.below(8);
        header.len = random.one_in(8) ? static_cast<u32>(random.next())
                                      : static_cast<u32>(bytes.size() > 44 ? bytes.size() - 44 : 0);
        header.type = random.one_in(16) ? static_cast<u16>(random.next()) : 1;
        header.op = static_cast<u16>(random.below(9));
        header.flags = random.below(4);
        header.buf_alloc = random.one_in(4) ? static_cast<u32>(random.next()) : 65536;
        header.fwd_cnt = random.one_in(4) ? static_cast<u32>(random.next()) : 0;
        put(bytes, 0, header);
    }
    u32 least_writable(unsigned queue) override { return queue == 0 ? 64 : queue == 2 ? 4 : 0; }
    void host(Random& random) override {
        if (sockets.size() < 20) sockets.push_back(device->connect(random.below(4)));
        const std::size_t i = random.below(static_cast<u32>(sockets.size()));
        u8 bytes[4096];
        if (random.one_in(2)) {
            ::send(sockets[i].get(), bytes, random.below(sizeof bytes),
                   MSG_DONTWAIT | MSG_NOSIGNAL);
        } else if (random.one_in(2)) {
            [[maybe_unused]] auto got = ::recv(sockets[i].get(), bytes, sizeof bytes, MSG_DONTWAIT);
        } else {
            sockets.erase(sockets.begin() + static_cast<std::ptrdiff_t>(i));
        }
        take_one();
    }

  private:
    // A connection of the guest's: kept for a while, or closed at once.
    void take_one() {
        char data[4], control[CMSG_SPACE(sizeof(int))];
        iovec part{data, sizeof data};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        if (::recvmsg(acceptor_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0) return;
        if (cmsghdr* header = CMSG_FIRSTHDR(&message)) {
            int fd;
            std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
            sockets.emplace_back(fd);
        }
    }
    OwnedFd acceptor_;
};

class Fuzzer {
  public:
    Fuzzer(Target& target, u64 seed) : target_(target), random_(seed) {
        memory_.add(Gpa(0), kMemory, "ram");
        memory_.add(Gpa(kRom), kPageSize, "rom", true);
        memory_.add(Gpa(kHigh), kMemory, "ram-high");
        loop_.start();
        device_ = target.make({memory_, loop_, nullptr});
        device_->offer_packed(true);
    }

    void run(u64 operations) {
        for (u64 done = 0; done < operations;) {
            begin();
            // Long lives reach deep states; short ones, resets with everything in flight.
            u64 left = random_.one_in(4) ? 4000 : 200;
            for (; left != 0 && done < operations; --left, ++done) {
                operation();
                // A device that wants a reset has little more to show.
                if (poked_ || device_->status() & kNeedsReset) left = std::min<u64>(left, 4);
            }
        }
        guest_.reset();
        CHECK_EQ(device_->status(), 0);
    }

    /// What ended the lives of the device, for those who tune the fuzzer.
    void report() const {
        std::fprintf(stderr, "  %8llu chains came back\n",
                     static_cast<unsigned long long>(answers_));
        for (const auto& [failure, count] : lives_) {
            std::fprintf(stderr, "  %8llu %s\n", static_cast<unsigned long long>(count),
                         failure.empty() ? "(a reset)" : failure.c_str());
        }
    }

  private:
    void begin() {
        ++lives_[device_->failure()];
        guest_.reset();
        FakeGuest::Options options;
        options.features = random_.one_in(4) ? random_.next() : ~u64{0};
        if (random_.one_in(2)) options.features &= ~u64{kRingPacked};
        options.queue_size = u32{1} << random_.below(9);
        while (!guest_) {
            try {
                guest_ = std::make_unique<FakeGuest>(*device_, memory_, options);
            } catch (const StateMismatch&) {  // features that do not go together
                options.features = ~u64{0};
            }
        }
        CHECK_EQ(device_->failure(), std::string());
        poked_ = false;
    }

    void operation() {
        const unsigned queue = random_.below(device_->queues());
        switch (random_.below(100)) {
            case 0:
                return poke(queue);
            case 1:
                return configure();
            case 2:
                if (random_.one_in(8)) device_->reset_queue(queue), poked_ = true;
                return;
            case 3:
                if (random_.one_in(8)) pause();
                return;
            case 4:
            case 5:
            case 6:
                return target_.host(random_);
            default:
                break;
        }
        if (poked_) {  // the fake driver's own view of its rings is gone
            device_->kick(queue);
            return;
        }
        FakeDriver& driver = guest_->driver(queue);
        while (driver.get()) ++answers_;
        offer(driver, queue);
        if (!random_.one_in(4)) guest_->kick(queue);
        if (random_.one_in(8)) device_->kick(queue);
    }

    void offer(FakeDriver& driver, unsigned queue) {
        FakeDriver::Segment segments[12];
        const u32 least = random_.one_in(2000) ? 0 : target_.least_writable(queue);
        const u32 readable = random_.below(5);
        const u32 writable = least != 0 ? 1 + random_.below(3) : random_.below(4);
        const u32 count = readable + writable;
        if (count == 0 || count > driver.free()) return;
        u8 bytes[256];
        for (u8& byte : bytes) byte = static_cast<u8>(random_.next());
        const u32 filled = 1 + random_.below(sizeof bytes);
        target_.fill(random_, queue, std::span(bytes).first(filled));
        u32 at = 0;
        for (u32 i = 0; i < count; ++i) {
            const bool write = i >= readable;
            u32 size = random_.one_in(4)   ? random_.below(70000)
                       : random_.one_in(2) ? random_.below(64)
                                           : 512 * random_.below(4);
            // Requests that are as they should be: header, data, status.
            if (!write && i == 0 && random_.one_in(2)) size = random_.pick<u32>({8, 12, 16, 44});
            if (write && i + 1 == count && random_.one_in(2)) size = 1;
            if (write && i + 1 == count) size = std::max(size, least);
            u64 gpa = kBuffers + random_.below(kBufferBytes);
            if (random_.one_in(5000)) gpa = wild();
            if (random_.one_in(50)) gpa = kHigh + random_.below(kMemory);
            segments[i] = {gpa, size, random_.one_in(5000) ? !write : write};
            if (!write && at < filled) {
                const u32 here = std::min(size, filled - at);
                if (auto span = memory_.span(Gpa(gpa), std::max(here, 1u)); !span.empty()) {
                    std::memcpy(span.data(), bytes + at, here);
                }
                at += here;
            }
        }
        const u64 table = random_.one_in(2) && (guest_->features() & kIndirectDesc)
                              ? kBuffers + 16 * u64{random_.below(kBufferBytes / 16 - 16)}
                              : 0;
        driver.add({segments, count}, table);
    }

    u64 wild() {
        switch (random_.below(5)) {
            case 0:
                return random_.next();
            case 1:
                return kMemory - random_.below(5000);
            case 2:
                return kRom + random_.below(5000);
            case 3:
                return ~u64{0} - random_.below(70000);
            default:
                return kHigh + kMemory - random_.below(70000);
        }
    }

    // Anything, anywhere in the queues' memory; then the device looks.
    void poke(unsigned queue) {
        if (!random_.one_in(4)) return;
        const QueueConfig config = device_->queue_config(queue);
        for (u32 n = 1 + random_.below(8); n != 0; --n) {
            const u64 start = random_.pick<u64>({config.descriptors, config.driver, config.device});
            const u64 at = start + random_.below(random_.one_in(2) ? 8 : 16 * config.size);
            if (at + 8 > kMemory) continue;
            if (random_.one_in(2)) {
                memory_.store(Gpa(at & ~u64{1}), static_cast<u16>(random_.below(300)));
            } else {
                memory_.store(Gpa(at), random_.next());
            }
        }
        poked_ = true;
        for (unsigned i = 0; i < device_->queues(); ++i) device_->kick(i);
    }

    void configure() {
        const u64 value = random_.next();
        const u32 size = random_.pick<u32>({1, 2, 4, 8});
        const u32 offset = random_.one_in(16)
                               ? static_cast<u32>(random_.next())
                               : random_.below(device_->description().config_size + 8);
        device_->write_config(offset, {reinterpret_cast<const u8*>(&value), size});
        u8 read[8];
        device_->read_config(offset, std::span(read).first(size));
    }

    void pause() {
        device_->pause();
        const auto state = device_->save();
        if (random_.one_in(2)) {
            device_->restore(state);
            if (random_.one_in(2)) {  // and one that is damaged is refused, or works
                auto damaged = state;
                damaged[random_.below(static_cast<u32>(damaged.size()))] ^=
                    static_cast<u8>(1 + random_.below(255));
                poked_ = true;
                try {
                    device_->restore(damaged);
                } catch (const StateError&) {
                }
            }
        }
        device_->resume();
    }

    Target& target_;
    Random random_;
    GuestMemory memory_;
    Clock clock_{Clock::Mode::kFreeRunning};
    EventLoop loop_{clock_};
    std::shared_ptr<virtio::Device> device_;
    std::unique_ptr<FakeGuest> guest_;
    bool poked_ = false;
    std::map<std::string, u64> lives_;
    u64 answers_ = 0;
};

template <class T>
void fuzz(const char* name, const char* only, u64 seed, u64 operations) {
    if (only != nullptr && std::string(only) != name) return;
    T target;
    Fuzzer fuzzer(target, seed);
    fuzzer.run(operations);
    if (only != nullptr) fuzzer.report();
    std::fprintf(stderr, "%s: %llu operations\n", name,
                 static_cast<unsigned long long>(operations));
}

}  // namespace

int main(int argc, char** argv) {
    const char* only = argc > 1 ? argv[1] : nullptr;
    const u64 operations = environment_number("PV_FUZZ", 60'000);
    const u64 seed = environment_number("PV_SEED", 1);
    fuzz<BlkTarget>("blk", only, seed, operations);
    fuzz<NetTarget>("net", only, seed, operations);
    fuzz<ConsoleTarget>("console", only, seed, operations);
    fuzz<VsockTarget>("vsock", only, seed, operations);
    return pvtest::finish("virtio fuzz");
}
