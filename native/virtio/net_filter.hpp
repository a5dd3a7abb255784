// Which frames a network driver wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).
#pragma once

#include <array>
#include <bitset>
#include <span>
#include <vector>

#include "base/types.hpp"

namespace polyvisor::virtio {

using MacAddress = std::array<u8, 6>;

class NetFilter {
  public:
    /// As after a reset: everything passes until the driver says otherwise.
    void reset(const MacAddress& mac) {
        *this = NetFilter();
        mac_ = mac;
    }

    /// VIRTIO_NET_CTRL_RX: commands 0 to 5. False: unknown.
    bool set_mode(u8 command, bool on);
    /// VIRTIO_NET_CTRL_MAC_TABLE_SET. False: the data are no two tables.
    bool set_table(std::span<const u8> data);
    /// More addresses than the tables hold are no mistake: everything of the kind passes then.
    static constexpr u32 kMostAddresses = 64;
    void set_mac(const MacAddress& mac) { mac_ = mac; }
    /// From then on only VLANs that were added pass (and frames of none).
    void enable_vlans() { vlan_filter_ = true; }
    bool set_vlan(u16 id, bool on);

    bool wants(std::span<const u8> frame) const;

    std::vector<u8> save() const;
    /// False: it is no saved filter; nothing is changed.
    bool restore(std::span<const u8> state);

  private:
    MacAddress mac_{};
    // Promiscuous until the driver has spoken: one without VIRTIO_NET_F_CTRL_RX never does.
    std::array<bool, 6> modes_{true};  // by command: promiscuous, all multicast, all unicast,
                                       // no multicast, no unicast, no broadcast
    bool vlan_filter_ = false;
    bool unicast_overflow_ = false, multicast_overflow_ = false;
    std::vector<MacAddress> unicast_, multicast_;
    std::bitset<4096> vlans_;
};

}  // namespace polyvisor::virtio
