// The KVM clock: a page in guest memory from which the guest computes nanoseconds out of its TSC
// (Linux: Documentation/virt/kvm/x86/msr.rst). Private to this folder.
#pragma once

#include "soft/environment.hpp"

namespace polyvisor::soft {

/// The MSRs, as the KVM feature bits CLOCKSOURCE2 and CLOCKSOURCE number them.
enum KvmClockMsr : u32 {
    kMsrKvmWallClockOld = 0x11,
    kMsrKvmSystemTimeOld = 0x12,
    kMsrKvmWallClock = 0x4b564d00,
    kMsrKvmSystemTime = 0x4b564d01,
};

/// Writes the time page that msr.kvm_system_time names, if any: after a write of that MSR, a change
/// of the TSC's offset, or a restore.
void update_kvm_clock(VcpuFrame& f);
/// Writes the wall-clock time at which system time was 0.
void write_wall_clock(VcpuFrame& f, u64 gpa);

}  // namespace polyvisor::soft
