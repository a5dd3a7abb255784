#include "virtio/vsock.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <thread>

#include "base/error.hpp"

namespace polyvisor::virtio {

namespace {

constexpr u16 kRingSize = 256, kEventRingSize = 8;
constexpr u32 kHeader = sizeof(VsockHeader);
constexpr u64 kStreams = 1 << 0;  // VIRTIO_VSOCK_F_STREAM

Description describe() {
    Description description;
    description.type = kVsock;
    description.name = "virtio-vsock";
    description.features = kStreams;
    description.queue_sizes = {kRingSize, kRingSize, kEventRingSize};
    description.config_size = sizeof(u64);
    description.pci_class = 0x028000;  // a network controller of no kind in particular
    return description;
}

}  // namespace

Vsock::Vsock(const Environment& environment, Config config)
    : Device(environment, describe()), config_(std::move(config)) {
    if (config_.cid < 3 || config_.cid >= 0xffffffff) {
        throw ConfigError("cid", "a guest's CID is a number from 3 to 4294967294, not " +
                                     std::to_string(config_.cid));
    }
    set_config(0, config_.cid);
    open_listener();
}

Vsock::~Vsock() {
    machine_ended();
    // A callback of a socket that is gone may be under way.
    std::weak_ptr<void> used = alive_;
    alive_.reset();
    while (!used.expired()) std::this_thread::yield();
}

std::size_t Vsock::connections() const {
    std::lock_guard lock(mutex_);
    return connections_.size();
}

void Vsock::machine_ended() {
    close_listener();
    stop();
    std::lock_guard lock(mutex_);
    listeners_.clear();
}

// No queue is held, so that callbacks that are under way can end.
void Vsock::stop() {
    std::vector<OwnedFd> sockets;
    {
        std::lock_guard lock(mutex_);
        for (auto& [id, connection] : connections_) sockets.push_back(connection->take_socket());
        for (OwnedFd& grave : graves_) sockets.push_back(std::move(grave));
        graves_.clear();
        ready_.clear();
        ports_.clear();
        connections_.clear();
        resets_.clear();
        tx_waits_ = false;
    }
    for (OwnedFd& socket : sockets) {
        if (socket) loop().unwatch(socket.get());
    }
}

// The connections did not come along: the guest forgets them (5.10.6.6).
void Vsock::restore_device(std::span<const u8> state) {
    Device::restore_device(state);
    std::lock_guard lock(mutex_);
    say_reset_ = true;
}

// --- Queues --------------------------------------------------------------------------------------

void Vsock::serve(unsigned index, Queue& queue) {
    switch (index) {
        case kRx:
            return give_packets(queue);
        case kTx:
            return take_packets(queue);
        default:
            return give_events(queue);
    }
}

// On the loop's thread, with no queue held.
void Vsock::pump() {
    {
        std::lock_guard lock(mutex_);
        posted_ = false;
    }
    bury_all();
    auto held = hold(kRx);
    if (held) give_packets(held.queue());
}

void Vsock::give_packets(Queue& queue) {
    drain(queue, chain_in_, [&] {
        if (PV_UNLIKELY(chain_in_.writable_bytes() <= kHeader)) {
            fail("a receive buffer of " + std::to_string(chain_in_.writable_bytes()) +
                 " bytes holds no packet");
            return false;
        }
        VsockHeader header;
        header.src_cid = kHostCid;
        header.dst_cid = config_.cid;
        header.type = VsockPacket::kStream;
        std::lock_guard lock(mutex_);
        if (!next_packet(header)) {
            queue.unpop(chain_in_);
            return false;
        }
        chain_in_.write(0, {reinterpret_cast<const u8*>(&header), kHeader});
        queue.push(chain_in_, kHeader + header.len);
        return true;
    });
    bool go_on;
    {
        std::lock_guard lock(mutex_);
        go_on = tx_waits_ && resets_.size() < kMostResets;
        if (go_on) tx_waits_ = false;
    }
    if (go_on) kick(kTx);  // which is behind this queue in the order of locks
}

bool Vsock::next_packet(VsockHeader& header) {
    if (!resets_.empty()) {
        header = resets_.front();
        resets_.pop_front();
        return true;
    }
    while (!ready_.empty()) {
        VsockConnection& connection = *ready_.front();
        ready_.pop_front();
        connection.queued = false;
        header.src_port = connection.host_port;
        header.dst_port = connection.guest_port;
        if (!connection.next_packet(header, chain_in_)) continue;
        if (header.op == VsockPacket::kRst) {
            forget(connection);
        } else if (connection.has_something()) {
            ready(connection);  // behind all others
        }
        return true;
    }
    return false;
}

void Vsock::take_packets(Queue& queue) {
    bool pumping = false;
    drain(queue, chain_out_, [&] {
        std::lock_guard lock(mutex_);
        if (resets_.size() >= kMostResets) {  // until the guest takes those
            tx_waits_ = true;
            queue.unpop(chain_out_);
            return false;
        }
        VsockHeader header;
        if (chain_out_.read(0, {reinterpret_cast<u8*>(&header), kHeader}) == kHeader) {
            take_packet(chain_out_, header);
        }
        queue.push(chain_out_, 0);
        pumping |= !ready_.empty() || !resets_.empty() || !graves_.empty();
        return true;
    });
    if (!pumping) return;
    // The other queue comes before this one in the order of locks: the loop's thread goes on.
    {
        std::lock_guard lock(mutex_);
        if (posted_) return;
        posted_ = true;
    }
    loop().post([this, alive = std::weak_ptr(alive_)] {
        if (auto keep = alive.lock()) pump();
    });
}

void Vsock::give_events(Queue& queue) {
    drain(queue, chain_event_, [&] {
        std::lock_guard lock(mutex_);
        if (!say_reset_) {
            queue.unpop(chain_event_);
            return false;
        }
        say_reset_ = false;
        const u32 event = VsockPacket::kTransportReset;
        queue.push(chain_event_,
                   chain_event_.write(0, {reinterpret_cast<const u8*>(&event), sizeof event}));
        return true;
    });
}

// --- The guest's packets -------------------------------------------------------------------------

void Vsock::take_packet(const Chain& chain, const VsockHeader& header) {
    if (header.src_cid != config_.cid) return;
    const bool reset = header.op == VsockPacket::kRst;
    if (header.dst_cid != kHostCid || header.type != VsockPacket::kStream) {
        if (!reset) refuse(header);
        return;
    }
    auto at = ports_.find(key(header.src_port, header.dst_port));
    if (at != ports_.end()) {
        on_packet(*at->second, chain, header);
    } else if (header.op == VsockPacket::kRequest) {
        accept_guest(header);
    } else if (!reset) {
        refuse(header);
    }
}

void Vsock::on_packet(VsockConnection& connection, const Chain& chain, const VsockHeader& header) {
    const bool open = connection.state == State::kOpen;
    if (connection.state == State::kDead) {  // the RST is on its way
        if (header.op == VsockPacket::kRst) forget(connection);
        return;
    }
    if (connection.credit(header)) ready(connection);
    switch (header.op) {
        case VsockPacket::kRw:
            if (!open || header.len > chain.readable_bytes() - kHeader ||
                !connection.take(chain, kHeader, header.len)) {
                return reset_connection(connection);
            }
            break;
        case VsockPacket::kCreditUpdate:
            break;
        case VsockPacket::kCreditRequest:
            connection.say(VsockPacket::kCreditUpdate);
            break;
        case VsockPacket::kResponse: {
            if (connection.state != State::kRequested) return reset_connection(connection);
            connection.state = State::kOpen;
            const std::string text = "OK " + std::to_string(connection.host_port) + "\n";
            if (!connection.tell_host(text.data(), text.size())) {
                return reset_connection(connection);
            }
            connection.set_readable();
            break;
        }
        case VsockPacket::kShutdown:
            if (!open) return reset_connection(connection);
            connection.guest_shutdown(header.flags);
            if (connection.done()) return reset_connection(connection);
            break;
        case VsockPacket::kRst:
            if (open && connection.guest_sends_no_more() && !connection.flushed()) {
                // It has closed, and a slow reader of the host still gets all of it.
                ports_.erase(key(connection.guest_port, connection.host_port));
                connection.state = State::kOrphan;
                return;
            }
            return forget(connection);
        default:
            return reset_connection(connection);
    }
    if (connection.has_something()) ready(connection);
}

void Vsock::refuse(const VsockHeader& header) {
    VsockHeader answer;
    answer.src_cid = header.dst_cid;
    answer.dst_cid = header.src_cid;
    answer.src_port = header.dst_port;
    answer.dst_port = header.src_port;
    answer.type = header.type;
    answer.op = VsockPacket::kRst;
    resets_.push_back(answer);
}

void Vsock::accept_guest(const VsockHeader& header) {
    OwnedFd socket = reach_host(header.dst_port, header.src_port);
    VsockConnection* connection = socket ? add(std::move(socket), State::kOpen) : nullptr;
    if (connection == nullptr) return refuse(header);
    connection->credit(header);
    enter(*connection, header.src_port, header.dst_port);
    connection->say(VsockPacket::kResponse);
    ready(*connection);
}

// --- Connections ---------------------------------------------------------------------------------

VsockConnection* Vsock::add(OwnedFd socket, State state) {
    if (connections_.size() >= kMostConnections) return nullptr;
    const u64 id = next_id_++;
    const int fd = socket.get();
    const u32 buffer = connections_.size() < kMany ? kBuffer : kSmallBuffer;
    auto connection = std::make_unique<VsockConnection>(id, std::move(socket), state, buffer);
    VsockConnection* result = connection.get();
    connections_.emplace(id, std::move(connection));
    try {
        // Edges: what is ready is remembered, so epoll is never asked again.
        loop().watch(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                     [this, id, alive = std::weak_ptr(alive_)](u32 events) {
                         if (auto keep = alive.lock()) on_socket(id, events);
                     });
    } catch (const HostError&) {  // no memory for it, or too many watches
        connections_.erase(id);
        return nullptr;
    }
    return result;
}

void Vsock::enter(VsockConnection& connection, u32 guest_port, u32 host_port) {
    connection.guest_port = guest_port;
    connection.host_port = host_port;
    ports_[key(guest_port, host_port)] = &connection;
}

void Vsock::request(VsockConnection& connection, u32 guest_port) {
    if (!started()) return forget(connection);
    do {
        next_port_ = next_port_ == (1u << 31) - 1 ? 1u << 30 : next_port_ + 1;
    } while (ports_.contains(key(guest_port, next_port_)));
    enter(connection, guest_port, next_port_);
    connection.state = State::kRequested;
    connection.say(VsockPacket::kRequest);
    ready(connection);
}

void Vsock::ready(VsockConnection& connection) {
    if (connection.queued) return;
    connection.queued = true;
    ready_.push_back(&connection);
}

// The host's end is closed, and the guest hears it in its turn.
void Vsock::reset_connection(VsockConnection& connection) {
    bury(connection.take_socket());
    connection.state = State::kDead;
    connection.say(VsockPacket::kRst);
    ready(connection);
}

void Vsock::forget(VsockConnection& connection) {
    bury(connection.take_socket());
    if (connection.queued) std::erase(ready_, &connection);
    auto at = ports_.find(key(connection.guest_port, connection.host_port));
    if (at != ports_.end() && at->second == &connection) ports_.erase(at);
    connections_.erase(connection.id);
}

// Whoever has its other end hears of it now. It is closed by the loop's thread: unwatch() would
// wait here for a callback that may be waiting for the mutex.
void Vsock::bury(OwnedFd socket) {
    if (!socket) return;
    ::shutdown(socket.get(), SHUT_RDWR);
    graves_.push_back(std::move(socket));
}

void Vsock::bury_all() {
    std::vector<OwnedFd> graves;
    {
        std::lock_guard lock(mutex_);
        graves.swap(graves_);
    }
    for (OwnedFd& grave : graves) loop().unwatch(grave.get());
}

// On the loop's thread.
void Vsock::on_socket(u64 id, u32 events) {
    {
        std::lock_guard lock(mutex_);
        auto at = connections_.find(id);
        if (at == connections_.end()) return;
        VsockConnection& connection = *at->second;
        if (connection.fd() < 0) return;
        const bool ended = (events & (EPOLLHUP | EPOLLERR)) != 0;
        switch (connection.state) {
            case State::kGreeting:
                if (events & ~u32{EPOLLOUT}) {
                    read_greeting(connection, (events & EPOLLRDHUP) != 0 || ended);
                }
                break;
            case State::kRequested:
                if (ended) reset_connection(connection);
                break;
            case State::kOpen:
                if (events & EPOLLOUT) connection.flush();
                if (connection.done()) {
                    reset_connection(connection);
                    break;
                }
                if (events & ~u32{EPOLLOUT}) connection.set_readable();
                if (connection.has_something()) ready(connection);
                break;
            case State::kOrphan:
                connection.flush();
                if (connection.flushed() || ended) forget(connection);
                break;
            case State::kDead:
                break;
        }
    }
    pump();
}

}  // namespace polyvisor::virtio
