// Byte and word accesses to a device, and a line that remembers.
#pragma once

#include <cstring>

#include "bus/device.hpp"

namespace polyvisor::devices {

struct Line final : IrqLine {
    void set(bool now) override {
        if (now && !level) ++edges;
        level = now;
    }
    bool level = false;
    int edges = 0;
};

template <class T = u8>
T in(Device& device, u64 offset) {
    T value = 0;
    device.read(offset, {reinterpret_cast<u8*>(&value), sizeof value});
    return value;
}
template <class T = u8>
void out(Device& device, u64 offset, T value) {
    device.write(offset, {reinterpret_cast<const u8*>(&value), sizeof value});
}

}  // namespace polyvisor::devices
