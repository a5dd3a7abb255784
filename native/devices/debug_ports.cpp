#include "devices/debug_ports.hpp"

#include <algorithm>
#include <cstring>

namespace polyvisor::devices {

void DebugConsole::read(u64, std::span<u8> data) {
    std::fill(data.begin(), data.end(), u8{0xe9});
}

void DebugConsole::write(u64, std::span<const u8> data) {
    for (u8 byte : data) batch_.put(byte);
}

void DebugExit::read(u64, std::span<u8> data) {
    std::fill(data.begin(), data.end(), u8{0});
}

void DebugExit::write(u64 offset, std::span<const u8> data) {
    if (offset != 0) return;
    u32 value = 0;
    std::memcpy(&value, data.data(), std::min<std::size_t>(data.size(), sizeof value));
    exit_(value << 1 | 1);
}

}  // namespace polyvisor::devices
