#include "pci/config_space.hpp"

#include "base/error.hpp"

namespace polyvisor::pci {

u32 ConfigSpace::read(u16 offset, unsigned size) const {
    u32 value = 0;
    for (unsigned i = 0; i < size && offset + i < kSize; ++i) {
        value |= static_cast<u32>(value_[offset + i]) << (8 * i);
    }
    return value;
}

void ConfigSpace::write(u16 offset, u32 value, unsigned size) {
    for (unsigned i = 0; i < size && offset + i < kSize; ++i) {
        u8 byte = static_cast<u8>(value >> (8 * i));
        u8& at = value_[offset + i];
        u8 writable = writable_[offset + i];
        at = static_cast<u8>((at & ~writable) | (byte & writable));
        at &= static_cast<u8>(~(byte & clear_on_one_[offset + i]));
    }
}

void ConfigSpace::set16(u16 offset, u16 value) {
    set8(offset, static_cast<u8>(value));
    set8(static_cast<u16>(offset + 1), static_cast<u8>(value >> 8));
}

void ConfigSpace::set32(u16 offset, u32 value) {
    set16(offset, static_cast<u16>(value));
    set16(static_cast<u16>(offset + 2), static_cast<u16>(value >> 16));
}

void ConfigSpace::set_writable(u16 offset, u32 mask, unsigned size) {
    for (unsigned i = 0; i < size; ++i) writable_[offset + i] = static_cast<u8>(mask >> (8 * i));
}

void ConfigSpace::set_clear_on_one(u16 offset, u32 mask, unsigned size) {
    for (unsigned i = 0; i < size; ++i)
        clear_on_one_[offset + i] = static_cast<u8>(mask >> (8 * i));
}

u16 ConfigSpace::add_capability(u8 id, std::span<const u8> body, std::span<const u8> writable) {
    std::size_t size = 2 + body.size();
    if (next_capability_ + size > kSize) {
        throw ConfigError("capability", "PCI capability " + std::to_string(id) + " of " +
                                            std::to_string(size) +
                                            " bytes does not fit into the configuration space");
    }
    u16 offset = next_capability_;
    set8(offset, id);
    for (std::size_t i = 0; i < body.size(); ++i) {
        value_[offset + 2 + i] = body[i];
        if (i < writable.size()) writable_[offset + 2 + i] = writable[i];
    }
    // Appended to the list, so that capabilities are found in the order they were added.
    u16 link = kCapabilities;
    while (value_[link] != 0) link = static_cast<u16>(value_[link] + 1);
    value_[link] = static_cast<u8>(offset);
    set16(kStatus, get16(kStatus) | kStatusCapabilities);
    next_capability_ = static_cast<u16>(align_up(offset + size, 4));
    return offset;
}

u16 ConfigSpace::find_capability(u8 id) const {
    for (u16 at = value_[kCapabilities]; at != 0; at = value_[at + 1]) {
        if (value_[at] == id) return at;
    }
    return 0;
}

void ConfigSpace::restore(const State& state) {
    for (std::size_t i = 0; i < kSize; ++i) {
        u8 fixed = static_cast<u8>(~(writable_[i] | clear_on_one_[i]));
        if (i == kStatus) fixed &= static_cast<u8>(~kStatusInterrupt);  // the device's own doing
        if ((state.value[i] ^ value_[i]) & fixed) {
            throw StateError("config", "the saved PCI configuration differs at offset " +
                                           std::to_string(i) +
                                           " from the device's: it is another one");
        }
    }
    value_ = state.value;
}

}  // namespace polyvisor::pci
