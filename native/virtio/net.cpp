#include "virtio/net.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/error.hpp"
#include "net/packet.hpp"

namespace polyvisor::virtio {

namespace {

using net::FrameHeader;

constexpr u32 kHeader = sizeof(NetHeader);
constexpr u32 kEthernetHeader = 14;
/// Buffers of one received frame, at most: 64 KiB in halves of a kilobyte.
constexpr std::size_t kMostBuffers = 160;

// The configuration space (5.1.4).
constexpr u32 kMacOffset = 0, kStatusOffset = 6, kPairsOffset = 8, kMtuOffset = 10;
constexpr u32 kConfigSize = 12;
constexpr u16 kLinkUp = 1;

u32 offloads_of(u64 features) {
    return (features & kNetGuestCsum ? net::kChecksum : 0u) |
           (features & kNetGuestTso4 ? net::kTso4 : 0u) |
           (features & kNetGuestTso6 ? net::kTso6 : 0u) |
           (features & kNetGuestEcn ? net::kEcnTso : 0u);
}

// Of a packet's addresses and ports, the same for both directions.
u8 flow_of(std::span<const u8> frame) {
    const auto layout = net::locate(frame);
    if (!layout) return 0;
    u32 mixed = 0;
    const u32 addresses = layout->ip + (layout->ipv6 ? 8 : 12);
    for (u32 i = 0; i < (layout->ipv6 ? 32u : 8u); i += 4) {
        mixed ^= net::load_be32(frame.data() + addresses + i);
    }
    if (layout->payload != 0) {
        const u8* ports = frame.data() + layout->transport;
        mixed ^= u32{net::load_be16(ports)} ^ net::load_be16(ports + 2);
    }
    return static_cast<u8>((mixed * 0x9e3779b1u) >> 24);
}

template <class Counter>
void add(Counter& counter, u64 value = 1) {
    counter.fetch_add(value, std::memory_order_relaxed);
}

}  // namespace

Description Net::describe(const net::End& end, const NetConfig& config) {
    if (config.pairs == 0 || config.pairs > kMostPairs) {
        throw ConfigError("queues", "a network card has 1 to " + std::to_string(kMostPairs) +
                                        " pairs of queues, not " + std::to_string(config.pairs));
    }
    if (config.mtu != 0 && config.mtu < 68) {  // 5.1.4.1
        throw ConfigError("mtu", "the MTU " + std::to_string(config.mtu) +
                                     " is smaller than 68, the least for IPv4");
    }
    if (config.mac[0] & 1) {
        throw ConfigError("mac",
                          "a MAC address with an odd first byte belongs to a group; a "
                          "network card's own begins with an even one, such as 52:54:00");
    }
    Description result;
    result.type = kNet;
    result.name = "virtio-net";
    result.pci_class = 0x020000;
    result.config_size = kConfigSize;
    result.queue_sizes.assign(2 * config.pairs, config.queue_size);
    result.queue_sizes.push_back(64);
    result.features = kNetMac | kNetStatus | kNetMergeable | kNetCsum | kNetHostTso4 |
                      kNetHostTso6 | kNetHostEcn | kNetGuestCsum | kNetCtrlVq | kNetCtrlRx |
                      kNetCtrlRxExtra | kNetCtrlVlan | kNetCtrlMac;
    if (config.mtu != 0) result.features |= kNetMtu;
    if (config.pairs > 1) result.features |= kNetMq;
    const u32 gives = end.gives();
    if (gives != 0) result.features |= kNetCtrlGuestOffloads;
    if (gives & net::kTso4) result.features |= kNetGuestTso4;
    if (gives & net::kTso6) result.features |= kNetGuestTso6;
    if (gives & net::kEcnTso) result.features |= kNetGuestEcn;
    return result;
}

Net::Net(const Environment& environment, std::unique_ptr<net::End> end, const NetConfig& config)
    : Device(environment, describe(*end, config)),
      end_(std::move(end)),
      config_pairs_(config.pairs),
      mac_(config.mac),
      capture_(environment.log) {
    for (unsigned i = 0; i < config.pairs; ++i) {
        pairs_.push_back(std::make_unique<Pair>());
        pairs_.back()->frame.resize(kHeader + net::kLongestFrame);
    }
    filter_.reset(mac_);
    set_config(kMacOffset, mac_);
    set_config(kPairsOffset, static_cast<u16>(config.pairs));
    set_config(kMtuOffset, config.mtu);
    show_link();
    go_on_ = std::make_unique<net::Wakeup>(loop(), [this] {
        for (u32 pairs = unfinished_.exchange(0); pairs != 0; pairs &= pairs - 1) {
            kick(2 * static_cast<unsigned>(std::countr_zero(pairs)) + 1);
        }
    });
    end_->attach(this);
}

Net::~Net() {
    go_on_.reset();
    end_->attach(nullptr);
}

// What depends on what (5.1.3.1).
bool Net::accept(u64 features) {
    auto needs = [features](u64 these, u64 others) {
        return !(features & these) || (features & others);
    };
    return needs(kNetGuestTso4 | kNetGuestTso6, kNetGuestCsum) &&
           needs(kNetGuestEcn, kNetGuestTso4 | kNetGuestTso6) &&
           needs(kNetHostTso4 | kNetHostTso6, kNetCsum) &&
           needs(kNetHostEcn, kNetHostTso4 | kNetHostTso6) &&
           needs(kNetCtrlRx | kNetCtrlRxExtra | kNetCtrlVlan | kNetMq | kNetCtrlMac |
                     kNetCtrlGuestOffloads,
                 kNetCtrlVq);
}

void Net::start(u64 features) {
    {
        std::lock_guard lock(filter_mutex_);
        if (features & kNetCtrlVlan) filter_.enable_vlans();
    }
    start_end(features);
}

void Net::start_end(u64 features) {
    const u32 offloads = offloads_of(features) & end_->gives() & allowed_offloads_.load();
    guest_offloads_.store(offloads);
    end_->start(offloads);
}

void Net::stop() {
    end_->stop();
    {
        std::lock_guard lock(filter_mutex_);
        filter_.reset(mac_);
    }
    set_config(kMacOffset, mac_);
    active_pairs_.store(1);
    allowed_offloads_.store(~u32{0});
    for (auto& flow : flows_) flow.store(0, std::memory_order_relaxed);
}

void Net::serve(unsigned index, Queue& queue) {
    if (index == control_queue() && has(kNetCtrlVq)) {
        control(queue);
    } else if (index / 2 >= config_pairs_) {
        return;  // the control queue's place, in a device without one
    } else if (index % 2 == 0) {
        for (u32 starved = pairs_[index / 2]->starved.exchange(0); starved != 0;
             starved &= starved - 1) {
            end_->wake(static_cast<unsigned>(std::countr_zero(starved)));
        }
    } else {
        transmit(index / 2, queue);
    }
}

// --- Transmission --------------------------------------------------------------------------------

void Net::transmit(unsigned pair, Queue& queue) {
    Chain& chain = pairs_[pair]->tx;
    int left = kBurst;
    drain(queue, chain, [&] {
        if (!transmit_one(pair, chain)) add(counters_.tx_dropped);
        queue.push(chain, 0);
        return --left != 0;
    });
    end_->flush(std::min(pair, end_->queues() - 1));
    if (left == 0) {
        unfinished_ |= 1u << pair;
        go_on_->raise();
    }
}

// Copies the frame: what is looked at must not change any more, and must be in one piece.
bool Net::transmit_one(unsigned pair, const Chain& chain) {
    Pair& own = *pairs_[pair];
    const u32 size = chain.readable_bytes();
    if (size < kHeader + kEthernetHeader || size > own.frame.size() || !link()) return false;
    chain.read(0, std::span(own.frame).first(size));
    NetHeader header;
    std::memcpy(&header, own.frame.data(), sizeof header);
    const auto frame = std::span(own.frame).subspan(kHeader, size - kHeader);
    add(counters_.tx_frames);
    add(counters_.tx_bytes, frame.size());
    if (active_pairs() > 1) {
        flows_[flow_of(frame)].store(static_cast<u8>(pair), std::memory_order_relaxed);
    }
    return send(pair, header.frame, frame);
}

// Leaves to the end what it does by itself, and does the rest.
bool Net::send(unsigned pair, FrameHeader header, std::span<u8> frame) {
    header.flags &= FrameHeader::kNeedsChecksum;
    if (header.flags != 0 && !has(kNetCsum)) return false;
    const u32 takes = end_->takes();
    if (header.gso != FrameHeader::kNone) {
        const bool tcp4 = header.gso_type() == FrameHeader::kTcp4;
        if (!tcp4 && header.gso_type() != FrameHeader::kTcp6) return false;
        if (!has(tcp4 ? kNetHostTso4 : kNetHostTso6)) return false;
        if ((header.gso & FrameHeader::kEcn) && !has(kNetHostEcn)) return false;
        u32 wanted = tcp4 ? net::kTso4 : net::kTso6;
        if (header.gso & FrameHeader::kEcn) wanted |= net::kEcnTso;
        if ((takes & wanted) == wanted) return pass(pair, header, frame);
        if (takes & net::kAnySize) return net::finish_tcp(frame) && pass(pair, {}, frame);
        bool sent = true;
        const bool cut = net::segment_tcp(
            header, frame, [&](std::span<u8> segment) { sent = pass(pair, {}, segment) && sent; });
        return cut && sent;
    }
    if (header.flags == 0) return pass(pair, {}, frame);
    if (takes & net::kChecksum) return pass(pair, header, frame);
    return net::finish_checksum(header, frame) && pass(pair, {}, frame);
}

bool Net::pass(unsigned pair, const FrameHeader& header, std::span<u8> frame) {
    if (capture_.active()) capture_.add(frame);
    return end_->send(std::min(pair, end_->queues() - 1), header, frame);
}

// --- Reception -----------------------------------------------------------------------------------

unsigned Net::choose_pair(unsigned end_queue, std::span<const u8> frame) const {
    const unsigned active = active_pairs();
    if (active == 1) return 0;
    const unsigned chosen =
        end_->queues() > 1 ? end_queue : flows_[flow_of(frame)].load(std::memory_order_relaxed);
    return chosen % active;
}

net::Port::Outcome Net::receive(unsigned end_queue, const FrameHeader& header,
                                std::span<const u8> frame) {
    if (!link() || frame.size() < kEthernetHeader || frame.size() > net::kLongestFrame) {
        add(counters_.rx_dropped);
        return Outcome::kDropped;
    }
    {
        std::lock_guard lock(filter_mutex_);
        if (!filter_.wants(frame)) {
            add(counters_.rx_filtered);
            return Outcome::kDropped;
        }
    }
    const unsigned index = choose_pair(end_queue, frame);
    Pair& pair = *pairs_[index];
    const u32 waits = 1u << end_queue;
    Outcome outcome = Outcome::kDropped;
    if (auto held = hold(2 * index)) {
        outcome = put(pair, held.queue(), header, frame);
        if (outcome == Outcome::kNoRoom) pair.starved |= waits;
    } else if (paused()) {
        pair.starved |= waits;
        if (!paused()) return receive(end_queue, header, frame);  // resume() has been and gone
        outcome = Outcome::kNoRoom;
    }
    if (outcome == Outcome::kDropped) add(counters_.rx_dropped);
    if (outcome == Outcome::kNoRoom) add(counters_.rx_waits);
    if (outcome != Outcome::kTaken) return outcome;
    if (capture_.active()) capture_.add(frame);
    add(counters_.rx_frames);
    add(counters_.rx_bytes, frame.size());
    return outcome;
}

net::Port::Outcome Net::put(Pair& own, Queue& queue, FrameHeader header,
                            std::span<const u8> frame) {
    if (!has(kNetGuestCsum)) {
        if (header.flags & FrameHeader::kNeedsChecksum) return Outcome::kDropped;
        header.flags = 0;
    }
    const bool merge = has(kNetMergeable);
    const u64 need = kHeader + frame.size();
    std::size_t used = 0;
    auto give_back = [&] {
        while (used != 0) queue.unpop(own.rx[--used]);
    };
    queue.disable_notify();
    for (u64 room = 0; room < need;) {
        if (used != 0 && (!merge || used == kMostBuffers)) {
            give_back();
            return Outcome::kDropped;
        }
        if (used == own.rx.size()) own.rx.emplace_back();
        Chain& chain = own.rx[used];
        if (!queue.pop(chain)) {
            if (queue.enable_notify()) {
                queue.disable_notify();
                continue;
            }
            give_back();
            return queue.error().empty() ? Outcome::kNoRoom : Outcome::kDropped;
        }
        if (chain.writable_bytes() < (used == 0 ? kHeader : 1)) {
            fail("a receive buffer has " + std::to_string(chain.writable_bytes()) +
                 " bytes to write to; the header alone takes " + std::to_string(kHeader));
            return Outcome::kDropped;
        }
        room += chain.writable_bytes();
        ++used;
    }
    const NetHeader first{header, static_cast<u16>(used)};
    own.rx[0].write(0, {reinterpret_cast<const u8*>(&first), sizeof first});
    std::size_t done = 0;
    for (std::size_t i = 0; i < used; ++i) {
        const u32 offset = i == 0 ? kHeader : 0;
        const u32 put = own.rx[i].write(offset, frame.subspan(done));
        done += put;
        queue.push(own.rx[i], offset + put);
    }
    return Outcome::kTaken;
}

// --- The link ------------------------------------------------------------------------------------

void Net::carrier(bool up) {
    carrier_ = up;
    show_link();
}

void Net::set_link(bool up) {
    plugged_ = up;
    show_link();
}

void Net::show_link() {
    set_config(kStatusOffset, static_cast<u16>(link() ? kLinkUp : 0));
}

NetCounters Net::counters() const {
    auto get = [](const std::atomic<u64>& counter) {
        return counter.load(std::memory_order_relaxed);
    };
    return {get(counters_.rx_frames),   get(counters_.rx_bytes),  get(counters_.rx_dropped),
            get(counters_.rx_filtered), get(counters_.rx_waits),  get(counters_.tx_frames),
            get(counters_.tx_bytes),    get(counters_.tx_dropped)};
}

// --- State ---------------------------------------------------------------------------------------

namespace {

struct SavedNet {
    u32 active_pairs, allowed_offloads;
};

}  // namespace

// The connections of an end are the host's, and are not in a snapshot.
std::vector<u8> Net::save_device() const {
    const SavedNet saved{active_pairs(), allowed_offloads_.load()};
    std::vector<u8> bytes(sizeof saved);
    std::memcpy(bytes.data(), &saved, sizeof saved);
    std::lock_guard lock(filter_mutex_);
    const auto filter = filter_.save();
    bytes.insert(bytes.end(), filter.begin(), filter.end());
    return bytes;
}

void Net::restore_device(std::span<const u8> state) {
    SavedNet saved;
    NetFilter filter;
    const bool whole = state.size() >= sizeof saved;
    if (whole) std::memcpy(&saved, state.data(), sizeof saved);
    if (!whole || saved.active_pairs == 0 || saved.active_pairs > config_pairs_ ||
        !filter.restore(state.subspan(sizeof saved))) {
        throw StateError("net", "the saved state of 'virtio-net' is none of this network card");
    }
    active_pairs_.store(saved.active_pairs);
    allowed_offloads_.store(saved.allowed_offloads);
    std::lock_guard lock(filter_mutex_);
    filter_ = std::move(filter);
}

}  // namespace polyvisor::virtio
