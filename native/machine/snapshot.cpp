#include "machine/snapshot.hpp"

#include <algorithm>
#include <cstdio>
#include <set>

#include "base/error.hpp"
#include "cpu/feature_bits.hpp"

namespace polyvisor {

namespace {

using Phase = RunControl::Phase;

// The chips of the board, then whatever else sits on the buses, named by its first address.
std::vector<Pc::Part> all_parts(Machine& machine) {
    std::vector<Pc::Part> parts = machine.pc().parts();
    std::set<const Device*> seen;
    for (const Pc::Part& part : parts) seen.insert(part.device);
    for (Bus* bus : {&machine.pio(), &machine.mmio()}) {
        for (const Bus::Range& range : bus->ranges()) {
            if (!seen.insert(range.device.get()).second) continue;
            char at[32];
            std::snprintf(at, sizeof at, "@%llx", static_cast<unsigned long long>(range.start));
            auto device = range.device;
            parts.push_back({bus->name() + at + " " + std::string(device->name()), device.get(),
                             [device] { return device->save(); },
                             [device](std::span<const u8> state) { device->restore(state); }});
        }
    }
    return parts;
}

// The touched pieces of a region, without pages of zeros.
void gather_region(const GuestMemory::Region& region, std::vector<Snapshot::Extent>& into) {
    static constexpr u8 kZeros[kPageSize] = {};
    for (const GuestMemory::Extent& extent : GuestMemory::touched(region)) {
        bool open = false;
        for (u64 page = extent.offset; page < extent.offset + extent.size; page += kPageSize) {
            const u8* data = region.mapping.data() + page;
            bool zero = std::equal(data, data + kPageSize, kZeros);
            if (!zero && !open) into.push_back({region.start.value + page, {}});
            if (!zero) into.back().bytes.insert(into.back().bytes.end(), data, data + kPageSize);
            open = !zero;
        }
    }
}

void scatter_memory(GuestMemory& memory, const Snapshot& snapshot) {
    for (const auto& region : memory.regions()) memory.discard(*region);
    for (const auto& extent : snapshot.memory) memory.write(Gpa(extent.gpa), extent.bytes);
}

std::vector<u64> region_sizes(Machine& machine) {
    std::vector<u64> sizes;
    for (const auto& region : machine.memory()->regions()) sizes.push_back(region->size);
    return sizes;
}

std::string describe(const FeatureBit& row) {
    if (row.feature == Feature::kHypercall) return "KVM's hypercalls";
    if (row.feature == Feature::kKvmClock) return "KVM's clock";
    if (row.feature == Feature::kNotVulnerable) return "immunity to speculation attacks";
    if (!row.name.empty()) return std::string(row.name);
    char text[48];
    std::snprintf(text, sizeof text, "bit %u of CPUID leaf 0x%x", row.bit, row.leaf);
    return text;
}

// A guest uses what CPUID told it when it booted: of instructions that would be a fault, of a
// hypervisor's services (interrupts between CPUs by hypercall) a silence in which it waits for
// ever.
void check_features(const Machine& machine, const FeatureSet& wanted) {
    std::string missing;
    for (const FeatureBit& row : feature_bits()) {
        if (!wanted.has(row.feature) || machine.cpu_features().has(row.feature)) continue;
        missing += (missing.empty() ? "" : ", ") + describe(row);
    }
    if (missing.empty()) return;
    throw StateError("cpu_features",
                     "the snapshot's CPUs have " + missing + ", those of machine '" +
                         machine.config().name +
                         "' do not; make both machines with portable=True, or with cpu_features "
                         "that both can have");
}

void check_shape(Machine& machine, const Snapshot& snapshot, const std::vector<Pc::Part>& parts) {
    if (snapshot.region_sizes != region_sizes(machine)) {
        throw StateError("memory", "the snapshot is of a machine with other memory");
    }
    if (snapshot.cpus.size() != machine.config().cpus) {
        throw StateError("cpus", "the snapshot has " + std::to_string(snapshot.cpus.size()) +
                                     " CPUs, machine '" + machine.config().name + "' has " +
                                     std::to_string(machine.config().cpus));
    }
    if (snapshot.tsc_khz != machine.clock().tsc_khz()) {
        throw StateError("tsc_khz", "the snapshot is of a machine with another TSC frequency");
    }
    check_features(machine, snapshot.cpu_features);
    for (const auto& extent : snapshot.memory) {
        if (machine.memory()->span(Gpa(extent.gpa), extent.bytes.size()).empty()) {
            throw StateError("memory", "the snapshot has memory where the machine has none");
        }
    }
    for (const CpuState& cpu : snapshot.cpus) validate(cpu);
    bool same = parts.size() == snapshot.parts.size() &&
                std::equal(parts.begin(), parts.end(), snapshot.parts.begin(),
                           [](const auto& a, const auto& b) { return a.name == b.name; });
    if (!same) throw StateError("devices", "the snapshot is of a machine with other devices");
}

// Applies the CPUs' and then the parts' states; when one refuses, undoes what was done. A CPU comes
// before its local APIC: an engine's may share registers with it (CR8, IA32_APIC_BASE), compares
// its TSC deadline with the CPU's TSC, and raises its interrupts at once.
void restore_parts(Machine& machine, const std::vector<Pc::Part>& parts, const Snapshot& snapshot) {
    std::vector<CpuState> cpus_before;
    std::vector<std::vector<u8>> parts_before;
    const u32 cpus = static_cast<u32>(snapshot.cpus.size());
    for (u32 cpu = 0; cpu < cpus; ++cpu) cpus_before.push_back(machine.vcpu(cpu).save());
    for (const Pc::Part& part : parts) parts_before.push_back(part.save());
    u32 cpus_done = 0;
    std::size_t parts_done = 0;
    try {
        for (; cpus_done < cpus; ++cpus_done) {
            machine.vcpu(cpus_done).restore(snapshot.cpus[cpus_done]);
        }
        for (; parts_done < parts.size(); ++parts_done) {
            parts[parts_done].restore(snapshot.parts[parts_done].state);
        }
    } catch (const Error&) {  // in the same order, and for the same reasons
        for (u32 cpu = 0; cpu < cpus_done; ++cpu) machine.vcpu(cpu).restore(cpus_before[cpu]);
        for (std::size_t i = 0; i < parts_done; ++i) parts[i].restore(parts_before[i]);
        throw;
    }
}

}  // namespace

u64 Snapshot::memory_bytes() const {
    u64 total = 0;
    for (const Extent& extent : memory) total += extent.bytes.size();
    return total;
}

Snapshot take_snapshot(Machine& machine) {
    Snapshot snapshot;
    for (u32 cpu = 0; cpu < machine.config().cpus; ++cpu) {
        snapshot.cpus.push_back(machine.vcpu(cpu).save());  // throws unless it stands still
    }
    machine.pc().finish_wiring();
    snapshot.now = machine.clock().now();
    snapshot.tsc_khz = machine.clock().tsc_khz();
    snapshot.cpu_features = machine.cpu_features();
    snapshot.region_sizes = region_sizes(machine);
    for (const Pc::Part& part : all_parts(machine)) {
        snapshot.parts.push_back({part.name, part.save()});
    }
    for (const auto& region : machine.memory()->regions()) gather_region(*region, snapshot.memory);
    return snapshot;
}

void restore_snapshot(Machine& machine, const Snapshot& snapshot) {
    machine.vcpu(0);  // throws unless it stands still
    Phase phase = machine.phase();
    if (phase != Phase::kCreated && phase != Phase::kPaused) {
        throw StateMismatch("machine '" + machine.config().name +
                            "' has ended; restore the snapshot into a new one");
    }
    machine.pc().finish_wiring();
    std::vector<Pc::Part> parts = all_parts(machine);
    check_shape(machine, snapshot, parts);
    u64 before = machine.clock().now();
    machine.clock().set(snapshot.now);  // timers are armed against it
    try {
        restore_parts(machine, parts, snapshot);
    } catch (const Error&) {
        machine.clock().set(before);
        throw;
    }
    machine.pc().irqs().refresh();
    scatter_memory(*machine.memory(), snapshot);
    machine.note_registers();  // in PAE mode some of them come from memory
}

}  // namespace polyvisor
