// A queue and its driver on 64 MiB of memory, for every kind of ring.
#pragma once

#include <string>
#include <vector>

#include "virtio/fake_driver.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::virtio;

struct Kind {
    const char* name;
    u64 features;
};
inline constexpr Kind kKinds[] = {
    {"split", kVersion1},
    {"split, indirect", kVersion1 | kIndirectDesc},
    {"split, event index", kVersion1 | kEventIdx},
    {"split, all", kVersion1 | kEventIdx | kIndirectDesc | kInOrder},
    {"packed", kVersion1 | kRingPacked},
    {"packed, indirect", kVersion1 | kRingPacked | kIndirectDesc},
    {"packed, event index", kVersion1 | kRingPacked | kEventIdx},
    {"packed, all", kVersion1 | kRingPacked | kEventIdx | kIndirectDesc | kInOrder},
};

struct Rings {
    static constexpr u64 kDescriptors = 0x10000, kDriver = 0xa0000, kDevice = 0xc0000;
    static constexpr u64 kTables = 0x100000, kData = 0x1000000, kEnd = 0x4000000;

    GuestMemory memory;
    QueueConfig config;

    Rings(u64 features, u32 size) {
        memory.add(Gpa(0), kEnd, "ram");
        config = {size, kDescriptors, kDriver, kDevice, features};
    }
};

}  // namespace pvtest
