#include "virtio/net_filter.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace polyvisor::virtio {

namespace {

enum Mode { kPromiscuous, kAllMulticast, kAllUnicast, kNoMulticast, kNoUnicast, kNoBroadcast };
constexpr MacAddress kBroadcast{0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

// One table of struct virtio_net_ctrl_mac; takes it off `data`.
bool take_table(std::span<const u8>& data, std::vector<MacAddress>& table, bool& overflow) {
    u32 count;
    if (data.size() < sizeof count) return false;
    std::memcpy(&count, data.data(), sizeof count);
    data = data.subspan(sizeof count);
    if (count > data.size() / sizeof(MacAddress)) return false;
    overflow = count > NetFilter::kMostAddresses;
    table.resize(overflow ? 0 : count);
    std::memcpy(table.data(), data.data(), table.size() * sizeof(MacAddress));
    data = data.subspan(count * sizeof(MacAddress));
    return true;
}

}  // namespace

bool NetFilter::set_mode(u8 command, bool on) {
    if (command >= modes_.size()) return false;
    modes_[command] = on;
    return true;
}

bool NetFilter::set_table(std::span<const u8> data) {
    std::vector<MacAddress> unicast, multicast;
    bool unicast_overflow, multicast_overflow;
    if (!take_table(data, unicast, unicast_overflow) ||
        !take_table(data, multicast, multicast_overflow)) {
        return false;
    }
    unicast_ = std::move(unicast);
    multicast_ = std::move(multicast);
    unicast_overflow_ = unicast_overflow;
    multicast_overflow_ = multicast_overflow;
    return true;
}

bool NetFilter::set_vlan(u16 id, bool on) {
    if (id >= vlans_.size()) return false;
    vlans_[id] = on;
    return true;
}

bool NetFilter::wants(std::span<const u8> frame) const {
    if (frame.size() < 14) return false;
    if (vlan_filter_ && frame[12] == 0x81 && frame[13] == 0 && frame.size() >= 16 &&
        !vlans_[(frame[14] & 15u) << 8 | frame[15]]) {
        return false;
    }
    if (modes_[kPromiscuous]) return true;
    MacAddress to;
    std::memcpy(to.data(), frame.data(), to.size());
    if (to == kBroadcast) return !modes_[kNoBroadcast];
    if (to[0] & 1) {
        if (modes_[kNoMulticast]) return false;
        return modes_[kAllMulticast] || multicast_overflow_ ||
               std::ranges::find(multicast_, to) != multicast_.end();
    }
    if (modes_[kNoUnicast]) return false;
    return modes_[kAllUnicast] || unicast_overflow_ || to == mac_ ||
           std::ranges::find(unicast_, to) != unicast_.end();
}

// --- Saved: the small things, the VLANs, the two tables as the driver gave them ------------------

namespace {

struct SavedFilter {
    MacAddress mac;
    std::array<u8, 6> modes;
    u8 vlan_filter, unicast_overflow, multicast_overflow, zero;
    std::array<u8, 4096 / 8> vlans;
};
static_assert(std::has_unique_object_representations_v<SavedFilter>);

void append(std::vector<u8>& bytes, const void* from, std::size_t size) {
    const u8* first = static_cast<const u8*>(from);
    bytes.insert(bytes.end(), first, first + size);
}

}  // namespace

std::vector<u8> NetFilter::save() const {
    SavedFilter saved{mac_, {}, vlan_filter_, unicast_overflow_, multicast_overflow_, 0, {}};
    std::ranges::copy(modes_, saved.modes.begin());
    for (unsigned id = 0; id < vlans_.size(); ++id) {
        if (vlans_[id]) saved.vlans[id / 8] |= static_cast<u8>(1u << id % 8);
    }
    std::vector<u8> bytes;
    append(bytes, &saved, sizeof saved);
    for (const auto* table : {&unicast_, &multicast_}) {
        const u32 count = static_cast<u32>(table->size());
        append(bytes, &count, sizeof count);
        append(bytes, table->data(), count * sizeof(MacAddress));
    }
    return bytes;
}

bool NetFilter::restore(std::span<const u8> state) {
    SavedFilter saved;
    if (state.size() < sizeof saved) return false;
    std::memcpy(&saved, state.data(), sizeof saved);
    NetFilter filter;
    if (!filter.set_table(state.subspan(sizeof saved))) return false;
    filter.mac_ = saved.mac;
    for (std::size_t i = 0; i < saved.modes.size(); ++i) filter.modes_[i] = saved.modes[i] != 0;
    filter.vlan_filter_ = saved.vlan_filter != 0;
    filter.unicast_overflow_ = saved.unicast_overflow != 0;
    filter.multicast_overflow_ = saved.multicast_overflow != 0;
    for (unsigned id = 0; id < vlans_.size(); ++id) {
        filter.vlans_[id] = saved.vlans[id / 8] >> id % 8 & 1;
    }
    *this = std::move(filter);
    return true;
}

}  // namespace polyvisor::virtio
