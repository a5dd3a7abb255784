// The whole state of a machine as a value: what every CPU, chip and device saves, virtual time, and
// the memory that was ever touched. Gathered from, and scattered into, a machine that stands still.
//
// A snapshot fits any machine of the same shape (memory, CPUs, devices at the same addresses), on
// either engine, whose CPUs have all the features that the guest was told of. Nothing in it is
// trusted: each part validates its own before it changes anything, and when one refuses, those
// before it are put back.
#pragma once

#include <string>
#include <vector>

#include "cpu/state.hpp"
#include "machine/machine.hpp"

namespace polyvisor {

struct Snapshot {
    struct Part {
        std::string name;
        std::vector<u8> state;
    };
    struct Extent {
        u64 gpa = 0;
        std::vector<u8> bytes;
    };
    u64 now = 0;  ///< virtual ns
    u64 tsc_khz = 0;
    FeatureSet cpu_features;
    std::vector<u64> region_sizes;
    std::vector<CpuState> cpus;
    std::vector<Part> parts;
    std::vector<Extent> memory;  ///< the rest is zero

    u64 memory_bytes() const;
};

/// Throws StateMismatch unless the machine stands still.
Snapshot take_snapshot(Machine& machine);
/// Throws StateMismatch unless the machine is created or paused, StateError when the snapshot is of
/// another shape or a part refuses its state; then the machine is as before.
void restore_snapshot(Machine& machine, const Snapshot& snapshot);

}  // namespace polyvisor
