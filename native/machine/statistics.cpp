#include "machine/statistics.hpp"

#include <set>

#include "machine/machine.hpp"

namespace polyvisor {

namespace {

Statistics::Counters returns_of(const ExitCounters& counters) {
    Statistics::Counters result;
    for (unsigned n = 0; n < ExitCounters::kReasons; ++n) {
        auto reason = static_cast<ExitReason>(n);
        if (u64 count = counters.of(reason); count != 0) {
            result.push_back({to_string(reason), count});
        }
    }
    return result;
}

}  // namespace

Statistics Machine::statistics() {
    Statistics result;
    result.engine = engine_->name();
    result.counters = engine_->counters();
    result.host = engine_->host_statistics();
    // A machine that is resumed meanwhile would run while its counters are read.
    std::unique_lock lifecycle(lifecycle_mutex_, std::try_to_lock);
    bool quiet = lifecycle.owns_lock() && control_.quiet();
    for (u32 cpu = 0; cpu < vcpus_.size(); ++cpu) {
        const Vcpu& vcpu = *vcpus_[cpu];
        Statistics::Cpu& out = result.cpus.emplace_back();
        out.exits = vcpu.exits();
        out.returns = returns_of(threads_[cpu]->counters());
        if (quiet) out.counters = vcpu.counters();
        out.host = vcpu.host_statistics();
    }
    std::set<const Device*> seen;
    for (const Bus* bus : {&pio_, &mmio_}) {
        for (const Bus::Range& range : bus->ranges()) {
            const Device& device = *range.device;
            if (!seen.insert(&device).second) continue;
            result.devices.push_back({std::string(device.name()), bus->name(), range.start,
                                      device.reads(), device.writes()});
        }
    }
    result.unclaimed_ports = pio_.unclaimed();
    result.unclaimed_memory = mmio_.unclaimed();
    result.log = log_.counts();
    return result;
}

}  // namespace polyvisor
