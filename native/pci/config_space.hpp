// The 256 bytes of configuration space of a type 0 function: a value, which bits a guest may write,
// and which it clears by writing ones (PCI Local Bus 3.0, chapter 6).
#pragma once

#include <array>
#include <span>

#include "base/types.hpp"

namespace polyvisor::pci {

/// Offsets of the type 0 header.
enum Register : u16 {
    kVendorId = 0x00,
    kDeviceId = 0x02,
    kCommand = 0x04,
    kStatus = 0x06,
    kRevision = 0x08,
    kClassCode = 0x09,
    kHeaderType = 0x0e,
    kBar0 = 0x10,
    kSubsystemVendorId = 0x2c,
    kSubsystemId = 0x2e,
    kExpansionRom = 0x30,
    kCapabilities = 0x34,
    kInterruptLine = 0x3c,
    kInterruptPin = 0x3d,
};

/// Bits of the command and status registers.
inline constexpr u16 kCommandIo = 0x1, kCommandMemory = 0x2, kCommandMaster = 0x4,
                     kCommandIntxDisable = 0x400;
inline constexpr u16 kStatusInterrupt = 0x8, kStatusCapabilities = 0x10;

class ConfigSpace {
  public:
    static constexpr std::size_t kSize = 256;

    struct State {
        std::array<u8, kSize> value{};
    };

    /// size 1, 2 or 4; an access never crosses a dword (the ports and ECAM cannot make one).
    u32 read(u16 offset, unsigned size) const;
    void write(u16 offset, u32 value, unsigned size);

    /// The device's own stores: not masked.
    void set8(u16 offset, u8 value) { value_[offset] = value; }
    void set16(u16 offset, u16 value);
    void set32(u16 offset, u32 value);
    u8 get8(u16 offset) const { return value_[offset]; }
    u16 get16(u16 offset) const { return static_cast<u16>(read(offset, 2)); }
    u32 get32(u16 offset) const { return read(offset, 4); }
    /// Which bits a guest may change, and which it clears by writing one.
    void set_writable(u16 offset, u32 mask, unsigned size);
    void set_clear_on_one(u16 offset, u32 mask, unsigned size);

    /// Appends a capability: `body` follows the id and next bytes, `writable` (as long, or empty)
    /// is its write mask. Returns its offset. Throws ConfigError when the space is full.
    u16 add_capability(u8 id, std::span<const u8> body, std::span<const u8> writable = {});
    /// Offset of the first capability with `id`, 0 when there is none.
    u16 find_capability(u8 id) const;

    State state() const { return {value_}; }
    /// Throws StateError when a bit differs that no guest could have changed (another device).
    void restore(const State& state);

  private:
    std::array<u8, kSize> value_{};
    std::array<u8, kSize> writable_{};
    std::array<u8, kSize> clear_on_one_{};
    u16 next_capability_ = 0x40;
};

}  // namespace polyvisor::pci
