// Everything that a machine counts, in one value. Gathered from a machine in any phase, also while
// it runs; then the numbers are of slightly different moments.
#pragma once

#include <string>
#include <vector>

#include "base/log.hpp"
#include "cpu/engine.hpp"

namespace polyvisor {

struct Statistics {
    using Counters = std::vector<Vcpu::Counter>;

    struct Cpu {
        /// How often it left the guest, by the engine's reasons; only engines on hardware.
        Counters exits;
        /// How often its run() returned, by ExitReason: what the engine did not serve itself.
        Counters returns;
        /// The engine's own; empty while the machine runs if it cannot be asked then.
        Counters counters;
        std::vector<Statistic> host;
    };
    struct Device {
        std::string name;
        std::string bus;  ///< of its first range
        u64 start = 0;
        /// Accesses that reached it; not those that the kernel served (rung doorbells).
        u64 reads = 0, writes = 0;
    };

    std::string engine;
    Counters counters;  ///< the engine's, of the whole machine
    std::vector<Cpu> cpus;
    std::vector<Device> devices;  ///< attached now, in order of bus and address
    std::vector<Statistic> host;
    u64 unclaimed_ports = 0, unclaimed_memory = 0;
    std::vector<Log::Count> log;
};

}  // namespace polyvisor
