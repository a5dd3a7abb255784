// virtio-vsock against a driver that does as it likes, and real sockets at the host's end: streams
// and credit both ways, who connects to whom, half-close, refusals, garbage, reset, saved state.
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "random.hpp"
#include "virtio/fake_guest.hpp"
#include "virtio/vsock.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;
using pvtest::Random;

namespace {

using Bytes = std::vector<u8>;
using Op = VsockPacket;
constexpr u64 kMemory = 16 << 20;
constexpr u64 kCid = 52;
constexpr u32 kHeader = sizeof(VsockHeader);

std::string folder() {
    static const std::string made = [] {
        std::string name = "/tmp/pv-vsock-XXXXXX";
        CHECK(::mkdtemp(name.data()) != nullptr);
        return name;
    }();
    return made;
}

sockaddr_un address_of(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    return address;
}

unsigned open_files() {
    unsigned count = 0;
    DIR* list = ::opendir("/proc/self/fd");
    while (::readdir(list) != nullptr) ++count;
    ::closedir(list);
    return count;
}

/// Waits for `condition`, for two seconds at most.
template <class Condition>
bool soon(Condition condition) {
    for (int i = 0; i < 20'000; ++i) {
        if (condition()) return true;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return condition();
}

struct Packet {
    VsockHeader header;
    Bytes data;
};

struct World {
    explicit World(const std::string& name = "s", bool packed = false)
        : path(folder() + "/" + name), clock(Clock::Mode::kFreeRunning), loop(clock) {
        memory.add(Gpa(0), kMemory, "ram");
        device = std::make_unique<Vsock>(Environment{memory, loop}, Vsock::Config{kCid, path});
        device->offer_packed(packed);
        loop.start();
    }
    ~World() {
        guest.reset();
        device.reset();
        loop.stop();
    }
    void boot(unsigned buffers = 64) {
        guest.reset();
        guest = std::make_unique<FakeGuest>(*device, memory);
        posted.clear();
        for (unsigned i = 0; i < buffers; ++i) post(guest->buffer(kHeader), guest->buffer(4096));
        guest->kick(0);
        out = guest->buffer(1 << 20);
    }
    // As Linux does it: the header and the data have a buffer each.
    void post(u64 header, u64 data) {
        auto id = guest->driver(0).add({{header, kHeader, true}, {data, 4096, true}});
        posted[*id] = {header, data};
    }
    void send(const VsockHeader& header, std::span<const u8> data = {}) {
        memory.write(Gpa(out), {reinterpret_cast<const u8*>(&header), kHeader});
        memory.write(Gpa(out + kHeader), data);
        std::vector<FakeDriver::Segment> segments{{out, kHeader, false}};
        if (!data.empty()) {
            segments.push_back({out + kHeader, static_cast<u32>(data.size()), false});
        }
        guest->driver(1).add(segments);
        guest->kick(1);
        CHECK(guest->driver(1).get().has_value());
    }
    static VsockHeader header(u16 op, u32 guest_port, u32 host_port) {
        VsockHeader header;
        header.src_cid = kCid;
        header.dst_cid = 2;
        header.src_port = guest_port;
        header.dst_port = host_port;
        header.type = 1;
        header.op = op;
        header.buf_alloc = 1 << 20;
        return header;
    }
    // The next packet to the guest, whose buffers go back at once.
    std::optional<Packet> receive(bool wait = true) {
        auto used = wait ? guest->wait(0) : guest->driver(0).get();
        if (!used) return std::nullopt;
        const auto [head, data] = posted[used->id];
        Packet packet;
        const Bytes bytes = guest->bytes(head, kHeader);
        std::memcpy(&packet.header, bytes.data(), kHeader);
        CHECK_EQ(used->written, kHeader + packet.header.len);
        CHECK_EQ(packet.header.dst_cid, kCid);
        packet.data = guest->bytes(data, packet.header.len);
        post(head, data);
        guest->kick(0);
        return packet;
    }
    Packet expect(u16 op) {
        auto packet = receive();
        CHECK(packet.has_value());
        if (!packet) return {};
        CHECK_EQ(packet->header.op, op);
        return *packet;
    }
    OwnedFd dial() {
        OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        const sockaddr_un address = address_of(path);
        CHECK_EQ(
            ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address),
            0);
        return socket;
    }

    std::string path;
    GuestMemory memory;
    Clock clock;
    EventLoop loop;
    std::unique_ptr<Vsock> device;
    std::unique_ptr<FakeGuest> guest;
    std::map<u16, std::pair<u64, u64>> posted;
    u64 out = 0;
};

OwnedFd listen_at(const std::string& path) {
    OwnedFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const sockaddr_un address = address_of(path);
    CHECK_EQ(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    CHECK_EQ(::listen(socket.get(), 64), 0);
    return socket;
}

std::string read_some(const OwnedFd& socket) {
    char bytes[4096];
    pollfd look{socket.get(), POLLIN, 0};
    if (::poll(&look, 1, 5000) <= 0) return "nothing";
    const ssize_t got = ::recv(socket.get(), bytes, sizeof bytes, 0);
    return got > 0 ? std::string(bytes, static_cast<std::size_t>(got)) : "";
}

void write_all(const OwnedFd& socket, const std::string& text) {
    CHECK_EQ(::send(socket.get(), text.data(), text.size(), MSG_NOSIGNAL),
             static_cast<ssize_t>(text.size()));
}

void host_connects() {
    World world;
    world.boot();
    OwnedFd socket = world.dial();
    write_all(socket, "CONN");
    write_all(socket, "ECT 99\nearly");  // in pieces, and with the stream right behind it
    const VsockHeader request = world.expect(Op::kRequest).header;
    CHECK_EQ(request.dst_port, 99u);
    CHECK_EQ(request.src_cid, 2u);
    CHECK(request.buf_alloc >= 4096);
    world.send(World::header(Op::kResponse, 99, request.src_port));
    CHECK_EQ(read_some(socket), "OK " + std::to_string(request.src_port) + "\n");
    const Packet early = world.expect(Op::kRw);
    CHECK_EQ(std::string(early.data.begin(), early.data.end()), "early");
    VsockHeader data = World::header(Op::kRw, 99, request.src_port);
    data.len = 2;
    world.send(data, Bytes{'h', 'i'});
    CHECK_EQ(read_some(socket), "hi");
    // The host's half-close, then all.
    ::shutdown(socket.get(), SHUT_WR);
    CHECK_EQ(world.expect(Op::kShutdown).header.flags, u32{Op::kNoSend});
    world.send(data, Bytes{'y', 'o'});
    CHECK_EQ(read_some(socket), "yo");
    socket.reset();
    CHECK_EQ(world.expect(Op::kShutdown).header.flags, u32{Op::kNeither});
    world.send(World::header(Op::kRst, 99, request.src_port));
    CHECK_EQ(world.device->connections(), 0u);
}

void refused() {
    World world;
    world.boot();
    const VsockHeader request = World::header(Op::kRequest, 7, 1234);
    world.send(request);
    Packet answer = world.expect(Op::kRst);
    CHECK_EQ(answer.header.src_port, 1234u);
    CHECK_EQ(answer.header.dst_port, 7u);
    for (u16 op : {Op::kRw, Op::kResponse, Op::kShutdown, Op::kCreditUpdate}) {
        world.send(World::header(op, 7, 1234));
        world.expect(Op::kRst);
    }
    VsockHeader other = request;
    other.dst_cid = 77;
    world.send(other);
    CHECK_EQ(world.expect(Op::kRst).header.src_cid, 77u);
    other = request;
    other.type = 2;
    world.send(other);
    CHECK_EQ(world.expect(Op::kRst).header.type, 2);
    other = request;
    other.src_cid = 9;  // somebody else's
    world.send(other);
    world.send(World::header(Op::kRst, 7, 1234));  // is not answered
    CHECK(!world.receive(false).has_value());
    // Programs of the host that say something else, nothing, or ask for nobody.
    for (const char* text : {"HELLO\n", "CONNECT x\n", "CONNECT 1", "CONNECT 99999999999\n",
                             "CONNECT 12 \n", "CONNECT 1 and a line that does not end"}) {
        OwnedFd socket = world.dial();
        write_all(socket, text);
        ::shutdown(socket.get(), SHUT_WR);
        CHECK_EQ(read_some(socket), "");
    }
    OwnedFd socket = world.dial();
    write_all(socket, "CONNECT 5\n");
    const u32 port = world.expect(Op::kRequest).header.src_port;
    world.send(World::header(Op::kRst, 5, port));
    CHECK_EQ(read_some(socket), "");
    world.device->reset();  // no driver
    socket = world.dial();
    write_all(socket, "CONNECT 5\n");
    CHECK_EQ(read_some(socket), "");
    CHECK(soon([&] { return world.device->connections() == 0; }));
}

void floods() {
    World world;
    world.boot(2);
    // Packets of no connection, faster than the answers are taken: the driver has to wait.
    u32 sent = 0;
    const VsockHeader request = World::header(Op::kRw, 7, 1234);
    world.memory.write(Gpa(world.out), {reinterpret_cast<const u8*>(&request), kHeader});
    for (; sent < 3000; ++sent) {
        FakeDriver& driver = world.guest->driver(1);
        while (driver.get()) {
        }
        if (!driver.add({{world.out, kHeader, false}})) break;
        world.guest->kick(1);
    }
    CHECK(sent >= Vsock::kMostResets && sent < 1000);
    for (u32 i = 0; i < sent; ++i) world.expect(Op::kRst);
    while (world.guest->driver(1).get()) {
    }
    CHECK_EQ(world.guest->driver(1).outstanding(), 0u);
}

// More than there was credit for, and more than there is in the packet.
void overdraws(bool beyond) {
    World world;
    world.boot();
    OwnedFd listener = listen_at(world.path + "_80");
    world.send(World::header(Op::kRequest, 7, 80));
    const u32 credit = world.expect(Op::kResponse).header.buf_alloc;
    OwnedFd host(::accept(listener.get(), nullptr, nullptr));
    ::unlink((world.path + "_80").c_str());
    VsockHeader data = World::header(Op::kRw, 7, 80);
    data.len = 32 << 10;
    bool reset = false;
    auto look = [&] {
        while (auto packet = world.receive(false)) reset |= packet->header.op == Op::kRst;
        return reset;
    };
    for (u32 total = 0; total < 2 * credit + (4 << 20) && !look(); total += data.len) {
        world.send(data, Bytes(beyond ? 1000 : data.len));
    }
    CHECK(soon(look));
    CHECK(soon([&] { return world.device->connections() == 0; }));
}

// What a guest sent and closed behind reaches a host that reads late, RST or not.
void closes_with_data_left() {
    World world;
    world.boot();
    OwnedFd listener = listen_at(world.path + "_80");
    world.send(World::header(Op::kRequest, 7, 80));
    world.expect(Op::kResponse);
    OwnedFd host(::accept(listener.get(), nullptr, nullptr));
    ::unlink((world.path + "_80").c_str());
    VsockHeader data = World::header(Op::kRw, 7, 80);
    data.len = 64 << 10;
    std::size_t total = 0;
    for (int i = 0; i < 6; ++i, total += data.len) world.send(data, Bytes(data.len, 'x'));
    VsockHeader end = World::header(Op::kShutdown, 7, 80);
    end.flags = Op::kNeither;
    world.send(end);
    world.send(World::header(Op::kRst, 7, 80));
    world.send(World::header(Op::kRw, 7, 80));  // there is no such connection any more
    u16 op = 0;
    CHECK(soon([&] {
        auto packet = world.receive(false);
        if (packet) op = packet->header.op;
        return op == Op::kRst;
    }));
    std::size_t got = 0;
    for (std::string some; !(some = read_some(host)).empty();) got += some.size();
    CHECK_EQ(got, total);
    CHECK(soon([&] { return world.device->connections() == 0; }));
}

// More than there may be are turned away, and those that there are do not mind.
void thousands() {
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    constexpr std::size_t kExtra = 20;
    const std::size_t most = std::min<std::size_t>(limit.rlim_max / 2 - 100, 100'000);
    CHECK(most > 100);
    limit.rlim_cur = limit.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &limit);
    World world;
    world.boot();
    const std::size_t count = std::min(most, Vsock::kMostConnections + kExtra);
    std::vector<OwnedFd> sockets;
    for (std::size_t i = 0; i < count; ++i) {
        sockets.push_back(world.dial());
        // (One that is turned away may be closed by now.)
        (void)!::send(sockets.back().get(), "CONNECT 5\n", 10, MSG_NOSIGNAL);
        if (i < Vsock::kMostConnections) world.expect(Op::kRequest);
    }
    CHECK(world.device->connections() <= Vsock::kMostConnections);
    if (count > Vsock::kMostConnections) {
        CHECK_EQ(world.device->connections(), Vsock::kMostConnections);
        CHECK_EQ(read_some(sockets.back()), "");
    }
    sockets.resize(10);
    std::size_t resets = 0;
    const std::size_t wanted = std::min(count, Vsock::kMostConnections) - 10;
    CHECK(soon([&] {
        while (auto packet = world.receive(false)) resets += packet->header.op == Op::kRst;
        return world.device->connections() == 10 && resets >= wanted;
    }));
    CHECK_EQ(resets, wanted);
}

void in_process() {
    World world;
    world.boot();
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    OwnedFd channel(ends[0]);
    world.device->listen(80, OwnedFd(ends[1]));
    CHECK_THROWS(world.device->listen(80, OwnedFd()), ConfigError);
    world.send(World::header(Op::kRequest, 4321, 80));
    world.expect(Op::kResponse);
    u32 port = 0;
    iovec bytes{&port, sizeof port};
    alignas(cmsghdr) char control[64];
    msghdr message{};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    CHECK_EQ(::recvmsg(channel.get(), &message, 0), 4);
    CHECK_EQ(port, 4321u);
    int fd;
    std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    OwnedFd host(fd);
    write_all(host, "hello");
    CHECK_EQ(world.expect(Op::kRw).data.size(), 5u);
    channel.reset();
    world.send(World::header(Op::kRequest, 4322, 80));
    world.expect(Op::kRst);
    OwnedFd dialled = world.device->connect(22);
    const VsockHeader request = world.expect(Op::kRequest).header;
    CHECK_EQ(request.dst_port, 22u);
    world.send(World::header(Op::kResponse, 22, request.src_port));
    CHECK_EQ(read_some(dialled), "OK " + std::to_string(request.src_port) + "\n");
    world.device->machine_ended();
    CHECK_EQ(read_some(dialled), "");
    CHECK(::access(world.path.c_str(), F_OK) != 0);
}

// --- Streams, with a model of credit -------------------------------------------------------------

struct Stream {
    OwnedFd host;
    u32 guest_port = 0, host_port = 0;
    std::string to_host, at_host, to_guest, at_guest;
    u32 device_alloc = 0, device_forwarded = 0;  // as the device told last
    u32 sent = 0;
    u32 alloc = 0, got = 0, forwarded = 0;  // what the guest tells
    bool host_done = false, guest_done = false;
};

void streams(u64 seed, bool packed) {
    Random random(seed);
    World world("s", packed);
    world.boot();
    OwnedFd listener = listen_at(world.path + "_80");
    std::vector<Stream> list(1 + random.below(6));
    u8 next = 0;
    auto from_guest = [&](Stream& stream, u16 op, std::span<const u8> data = {}) {
        VsockHeader header = World::header(op, stream.guest_port, stream.host_port);
        header.len = static_cast<u32>(data.size());
        header.buf_alloc = stream.alloc;
        header.fwd_cnt = stream.forwarded;
        world.send(header, data);
    };
    auto take = [&](const Packet& packet) {
        auto at = std::find_if(list.begin(), list.end(), [&](const Stream& stream) {
            return stream.guest_port == packet.header.dst_port;
        });
        CHECK(at != list.end());
        if (at == list.end()) return;
        at->device_alloc = packet.header.buf_alloc;
        at->device_forwarded = packet.header.fwd_cnt;
        switch (packet.header.op) {
            case Op::kRw:
                CHECK(packet.header.len != 0);
                at->got += packet.header.len;
                CHECK(at->got - at->forwarded <= at->alloc);  // never more than its credit
                at->at_guest.append(packet.data.begin(), packet.data.end());
                break;
            case Op::kCreditRequest:
                from_guest(*at, Op::kCreditUpdate);
                break;
            case Op::kShutdown:
                at->guest_done |= (packet.header.flags & Op::kNoSend) != 0;
                break;
            default:
                CHECK(packet.header.op == Op::kCreditUpdate || packet.header.op == Op::kResponse);
        }
    };
    for (u32 i = 0; i < list.size(); ++i) {
        Stream& stream = list[i];
        stream.alloc = random.one_in(2) ? 1 + random.below(3000) : 100'000;
        if (i % 2 != 0) {
            stream.guest_port = 1000 + i;
            stream.host_port = 80;
            from_guest(stream, Op::kRequest);
            take(world.expect(Op::kResponse));
            stream.host = OwnedFd(::accept(listener.get(), nullptr, nullptr));
        } else {
            stream.guest_port = 2000 + i;
            stream.host = world.dial();
            write_all(stream.host, "CONNECT " + std::to_string(stream.guest_port) + "\n");
            stream.host_port = world.expect(Op::kRequest).header.src_port;
            from_guest(stream, Op::kResponse);
            CHECK_EQ(read_some(stream.host).substr(0, 3), "OK ");
        }
        int small = 4096;  // so that the host's side blocks soon
        ::setsockopt(stream.host.get(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
        ::setsockopt(stream.host.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        ::fcntl(stream.host.get(), F_SETFL, O_NONBLOCK);
    }
    auto host_reads = [&](Stream& stream, std::size_t most) {
        Bytes bytes(most);
        const ssize_t got = ::recv(stream.host.get(), bytes.data(), most, 0);
        if (got > 0) stream.at_host.append(bytes.begin(), bytes.begin() + got);
        if (got == 0) stream.host_done = true;
        return got > 0;
    };
    auto guest_reads = [&](Stream& stream, u32 most) {
        const u32 held = stream.got - stream.forwarded;
        if (held == 0) return;
        stream.forwarded += std::min(held, 1 + random.below(most));
        from_guest(stream, Op::kCreditUpdate);
    };
    for (int step = 0; step < 600; ++step) {
        Stream& stream = list[random.below(static_cast<u32>(list.size()))];
        switch (random.below(5)) {
            case 0: {  // the guest sends, up to its credit
                const u32 most = stream.device_alloc - (stream.sent - stream.device_forwarded);
                const u32 size = std::min(most, random.below(20'000));
                if (stream.device_alloc == 0 || size == 0) break;
                Bytes bytes(size);
                for (u8& byte : bytes) byte = next++;
                stream.sent += size;
                stream.to_host.append(bytes.begin(), bytes.end());
                from_guest(stream, Op::kRw, bytes);
                break;
            }
            case 1: {  // the host sends what its socket takes
                Bytes bytes(1 + random.below(5000));
                for (u8& byte : bytes) byte = next++;
                const ssize_t sent = ::send(stream.host.get(), bytes.data(), bytes.size(), 0);
                if (sent > 0) stream.to_guest.append(bytes.begin(), bytes.begin() + sent);
                break;
            }
            case 2:
                host_reads(stream, 1 + random.below(9000));
                break;
            case 3:
                guest_reads(stream, 3000);
                break;
            default:
                while (auto packet = world.receive(false)) take(*packet);
                break;
        }
    }
    // Both ends say that they are done, and all of it arrives.
    for (Stream& stream : list) {
        ::shutdown(stream.host.get(), SHUT_WR);
        VsockHeader end = World::header(Op::kShutdown, stream.guest_port, stream.host_port);
        end.flags = Op::kNoSend;
        end.buf_alloc = stream.alloc;
        end.fwd_cnt = stream.forwarded;
        world.send(end);
    }
    CHECK(soon([&] {
        while (auto packet = world.receive(false)) take(*packet);
        bool done = true;
        for (Stream& stream : list) {
            while (host_reads(stream, 9000)) {
            }
            guest_reads(stream, 100'000);
            done &= stream.host_done && stream.guest_done;
        }
        return done;
    }));
    for (Stream& stream : list) {
        CHECK_EQ(stream.at_host.size(), stream.to_host.size());
        CHECK(stream.at_host == stream.to_host);
        CHECK_EQ(stream.at_guest.size(), stream.to_guest.size());
        CHECK(stream.at_guest == stream.to_guest);
    }
    ::unlink((world.path + "_80").c_str());
}

void reset_and_restore() {
    World world;
    const unsigned before = open_files();
    for (int round = 0; round < 3; ++round) {
        world.boot();
        std::vector<OwnedFd> sockets;
        for (int i = 0; i < 50; ++i) {
            sockets.push_back(world.dial());
            if (i % 2 != 0) write_all(sockets.back(), "CONNECT 5\n");
        }
        for (int i = 0; i < 25; ++i) world.expect(Op::kRequest);
        CHECK(soon([&] { return world.device->connections() == 50; }));
        world.device->reset();
        CHECK_EQ(world.device->connections(), 0u);
        for (auto& socket : sockets) CHECK_EQ(read_some(socket), "");
        sockets.clear();
        world.guest.reset();
        CHECK_EQ(open_files(), before);
    }
    world.boot();
    OwnedFd socket = world.dial();
    write_all(socket, "CONNECT 5\n");
    world.expect(Op::kRequest);
    const u64 at = world.guest->buffer(8);
    world.guest->driver(2).add({{at, 8, true}});
    world.guest->kick(2);
    world.device->pause();
    const Bytes state = world.device->save();
    world.device->restore(state);
    CHECK_EQ(read_some(socket), "");
    world.device->resume();
    auto used = world.guest->wait(2);
    CHECK(used && used->written == 4);
    CHECK(world.guest->bytes(at, 4) == Bytes(4));
    World other("o");
    other.device->restore(state);
    CHECK_THROWS(other.device->restore(Bytes(state.begin(), state.end() - 1)), StateError);
}

void paths() {
    GuestMemory memory;
    memory.add(Gpa(0), kMemory, "ram");
    Clock clock(Clock::Mode::kFreeRunning);
    EventLoop loop(clock);
    Environment environment{memory, loop};
    const std::string path = folder() + "/p";
    CHECK_THROWS(Vsock(environment, {2, path}), ConfigError);
    CHECK_THROWS(Vsock(environment, {3, folder() + "/" + std::string(100, 'x')}), ConfigError);
    CHECK_THROWS(Vsock(environment, {3, "/nowhere/p"}), HostError);
    {
        Vsock one(environment, {3, path});
        CHECK_THROWS(Vsock(environment, {3, path}), ConfigError);
        CHECK(::access(path.c_str(), F_OK) == 0);
    }
    CHECK(::access(path.c_str(), F_OK) != 0);
    (void)listen_at(path);  // left behind
    {
        Vsock again(environment, {3, path});
    }
    OwnedFd file(::open(path.c_str(), O_CREAT | O_RDWR, 0600));
    CHECK_THROWS(Vsock(environment, {3, path}), ConfigError);
    ::unlink(path.c_str());
}

void garbage(u64 seed, bool packed) {
    Random random(seed);
    World world("s", packed);
    OwnedFd listener = listen_at(world.path + "_80");
    for (int round = 0; round < 4; ++round) {
        world.boot(20);
        std::vector<OwnedFd> sockets;
        std::vector<u32> ports{80, 81};
        for (int step = 0; step < 400; ++step) {
            VsockHeader header =
                World::header(static_cast<u16>(random.below(9)), 1 + random.below(3),
                              ports[random.below(static_cast<u32>(ports.size()))]);
            header.flags = random.below(5);
            header.len = random.one_in(8) ? static_cast<u32>(random.next()) : random.below(600);
            header.buf_alloc = random.one_in(4) ? static_cast<u32>(random.next()) : 4096;
            header.fwd_cnt = static_cast<u32>(random.next());
            if (random.one_in(20)) header.dst_cid = random.below(4);
            if (random.one_in(20)) header.type = static_cast<u16>(random.below(3));
            Bytes bytes(kHeader + std::min(header.len, 600u));
            std::memcpy(bytes.data(), &header, kHeader);
            if (random.one_in(10)) bytes.resize(1 + random.below(kHeader));
            std::vector<FakeDriver::Segment> segments;
            const u64 at = world.guest->buffer(bytes);
            for (u32 done = 0; done < bytes.size();) {
                const u32 size = std::min<u32>(static_cast<u32>(bytes.size()) - done,
                                               1 + random.below(random.one_in(2) ? 20 : 4000));
                segments.push_back({at + done, size, random.one_in(200)});
                done += size;
            }
            (void)world.guest->driver(1).add(segments);
            world.guest->kick(1);
            while (world.guest->driver(1).get()) {
            }
            if (random.one_in(3)) {
                while (auto packet = world.receive(false)) {
                    if (packet->header.op == Op::kRequest) ports.push_back(packet->header.src_port);
                }
            }
            if (random.one_in(10)) {
                sockets.push_back(world.dial());
                write_all(sockets.back(),
                          "CONNECT " + std::to_string(1 + random.below(3)) + "\nabc");
            }
            if (!sockets.empty() && random.one_in(10)) {
                sockets.erase(sockets.begin() + random.below(static_cast<u32>(sockets.size())));
            }
            if (random.one_in(300)) world.device->reset_queue(random.below(3));
        }
    }
    ::unlink((world.path + "_80").c_str());
}

}  // namespace

int main() {
    host_connects();
    refused();
    floods();
    overdraws(false);
    overdraws(true);
    closes_with_data_left();
    thousands();
    in_process();
    for (u64 seed = 0; seed < 30; ++seed) streams(seed, seed % 2 != 0);
    reset_and_restore();
    paths();
    for (u64 seed = 0; seed < 10; ++seed) garbage(seed, seed % 2 != 0);
    ::rmdir(folder().c_str());
    return pvtest::finish("test_virtio_vsock");
}
