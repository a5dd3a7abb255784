// The States of our own interrupt chips to and from KVM's structs: nothing but conversion. States
// are valid (each chip's validate()); what comes from KVM becomes valid.
//
// What KVM has no place for, or does its own way:
//  LAPIC   errors that ESR does not show yet and a waiting ExtINT message are dropped; LINT levels
//          read 0, for they are wires. KVM starts its timer anew whenever the page is set, and a
//          one-shot timer that has expired would expire again: its initial count is given as 0.
//          Seen from outside, one that has expired and one whose interrupt still has to be raised
//          are alike; unless the vector is already requested or in service, it is taken as due.
//  IOAPIC  the levels of edge-triggered pins: giving them would raise the edge again.
//  8259    no level mode (ICW1.LTIM) and no single mode: StateError.
//  8254    counts are binary even in BCD mode, and every channel starts a new period when it is
//  set.
//          Channel 0's phase cannot be read: its period starts at the time of the save. A new count
//          that waits for the end of the period, or for a trigger, counts at once. Port 0x61 has
//          bits 0 and 1 only.
#pragma once

#include "kvm/abi.hpp"

#include "irqchip/ioapic.hpp"
#include "irqchip/lapic.hpp"
#include "irqchip/pic.hpp"
#include "irqchip/pit.hpp"

namespace polyvisor::kvm {

/// `now`: virtual time at which the timer's count was, or will be, valid. IA32_APIC_BASE and the
/// TSC deadline are MSRs and not in the page; from_kvm() leaves the timer stopped in TSC-deadline
/// mode.
irqchip::Lapic::State from_kvm(const kvm_lapic_state& page, u64 apic_base,
                               const irqchip::Lapic::Config& config, Nanoseconds now);
kvm_lapic_state to_kvm(const irqchip::Lapic::State& state, Nanoseconds now);
bool in_tsc_deadline_mode(const irqchip::Lapic::State& state);

/// A Lapic::State has the deadline on the machine clock's TSC, the MSR on the guest's, which is
/// `offset` ahead. 0 is "none" for both.
u64 deadline_to_guest(u64 clock_deadline, u64 offset);
u64 deadline_to_clock(u64 guest_deadline, u64 offset);

/// `lines`: the levels of the wires.
irqchip::Ioapic::State from_kvm(const kvm_ioapic_state& chip, u32 lines);
kvm_ioapic_state to_kvm(const irqchip::Ioapic::State& state);

/// Master and slave.
irqchip::Pic::State from_kvm(const kvm_pic_state (&chips)[2]);
void to_kvm(const irqchip::Pic::State& state, kvm_pic_state (&chips)[2]);

/// `host_offset`: host monotonic time minus virtual time.
irqchip::Pit::State from_kvm(const kvm_pit_state2& pit, Nanoseconds now, u64 host_offset);
kvm_pit_state2 to_kvm(const irqchip::Pit::State& state);

}  // namespace polyvisor::kvm
