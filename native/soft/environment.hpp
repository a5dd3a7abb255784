// What a soft vCPU's operations may reach outside the frame.
#pragma once

#include "base/log.hpp"
#include "bus/bus.hpp"
#include "bus/clock.hpp"
#include "bus/interrupts.hpp"
#include "cpu/cpuid.hpp"
#include "cpu/exit.hpp"
#include "memory/guest_memory.hpp"
#include "soft/frame.hpp"

namespace polyvisor::soft {

struct Environment {
    GuestMemory& memory;
    Bus& pio;
    Bus& mmio;
    Clock& clock;
    const CpuidPolicy& cpuid;
    LocalInterrupts* lapic;  ///< may be nullptr
    Log* log;                ///< may be nullptr
    u32 id;
    bool deterministic;
    bool hypercall_exits;
    Exit exit;  ///< set before fault.pending = kExit
};

/// The environment of the vCPU that owns this frame.
Environment& environment(VcpuFrame& f);
const Environment& environment(const VcpuFrame& f);

/// The guest's TSC now (deterministic mode: counted up to the current instruction).
u64 read_tsc(VcpuFrame& f);

}  // namespace polyvisor::soft
