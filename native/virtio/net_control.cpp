// The control queue of virtio-net (virtio 1.2, 5.1.6.5).
#include <algorithm>
#include <cstring>

#include "virtio/net.hpp"

namespace polyvisor::virtio {

namespace {

enum Class : u8 { kRx = 0, kMac = 1, kVlan = 2, kMq = 4, kGuestOffloads = 5 };
constexpr u8 kOk = 0, kError = 1;
constexpr u32 kLongestRequest = 65536;  // two tables of five thousand addresses

template <class T>
bool take(std::span<const u8> data, T& value) {
    if (data.size() != sizeof value) return false;
    std::memcpy(&value, data.data(), sizeof value);
    return true;
}

}  // namespace

void Net::control(Queue& queue) {
    drain(queue, control_chain_, [&] {
        if (control_chain_.writable_bytes() == 0) {
            fail("a request of the control queue has no room for the answer");
            return false;
        }
        std::vector<u8> request(std::min(control_chain_.readable_bytes(), kLongestRequest));
        control_chain_.read(0, request);
        const bool done = control_chain_.readable_bytes() <= kLongestRequest && control(request);
        const u8 answer = done ? kOk : kError;
        control_chain_.write(0, {&answer, 1});
        queue.push(control_chain_, 1);
        return true;
    });
}

bool Net::control(std::span<const u8> request) {
    if (request.size() < 2) return false;
    const u8 group = request[0], command = request[1];
    const auto data = request.subspan(2);
    if (group == kRx) {
        u8 on;
        if (!has(command < 2 ? kNetCtrlRx : kNetCtrlRxExtra) || !take(data, on)) return false;
        std::lock_guard lock(filter_mutex_);
        return filter_.set_mode(command, on != 0);
    }
    if (group == kMac && command == 0 && has(kNetCtrlRx)) {
        std::lock_guard lock(filter_mutex_);
        return filter_.set_table(data);
    }
    if (group == kMac && command == 1 && has(kNetCtrlMac)) {
        MacAddress mac;
        if (!take(data, mac)) return false;
        set_config(0, mac);
        std::lock_guard lock(filter_mutex_);
        filter_.set_mac(mac);
        return true;
    }
    if (group == kVlan && command < 2 && has(kNetCtrlVlan)) {
        u16 id;
        if (!take(data, id)) return false;
        std::lock_guard lock(filter_mutex_);
        return filter_.set_vlan(id, command == 0);
    }
    if (group == kMq && command == 0 && has(kNetMq)) {
        u16 pairs;
        if (!take(data, pairs) || pairs == 0 || pairs > config_pairs_) return false;
        active_pairs_.store(pairs);
        return true;
    }
    if (group == kGuestOffloads && command == 0 && has(kNetCtrlGuestOffloads)) {
        u64 features;
        if (!take(data, features) || (features & ~driver_features())) return false;
        allowed_offloads_.store(u32{(features & kNetGuestCsum) != 0} * net::kChecksum |
                                u32{(features & kNetGuestTso4) != 0} * net::kTso4 |
                                u32{(features & kNetGuestTso6) != 0} * net::kTso6 |
                                u32{(features & kNetGuestEcn) != 0} * net::kEcnTso);
        start_end(driver_features());
        return true;
    }
    return false;
}

}  // namespace polyvisor::virtio
