// The State of KVM's interrupt chips: ioctls around the conversions of chip_state.hpp.
//
// Orders that matter. A CPU's own state comes before its local APIC: KVM_SET_SREGS sets the task
// priority (CR8) and IA32_APIC_BASE too, and the TSC deadline needs the CPU's TSC offset. Within a
// local APIC: IA32_APIC_BASE before the page, whose format depends on its mode; the page before
// IA32_TSC_DEADLINE, which KVM ignores unless the timer is in that mode. Local APICs come before
// the IOAPIC and the 8259s, which deliver what is asserted as soon as they are set.
//
// Time: KVM's timers run on the host's monotonic clock, also while the machine is paused. A TSC
// deadline is armed when the vCPU next enters the guest, with its TSC in place (time_moved()), so
// it is exact. The one-shot and periodic modes count from restore() on and go on counting in a
// pause: their next interrupt may come early, which guests take as spurious.
#include <time.h>
#include "kvm/abi.hpp"

#include "bus/pod_state.hpp"
#include "kvm/chip_state.hpp"
#include "kvm/chips.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/vcpu.hpp"

namespace polyvisor::kvm {

using irqchip::Ioapic;
using irqchip::Lapic;
using irqchip::Pic;
using irqchip::Pit;

namespace {

constexpr u32 kApicBaseMsr = 0x1b, kTscDeadlineMsr = 0x6e0;

u64 host_now() {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<u64>(now.tv_sec) * 1'000'000'000 + static_cast<u64>(now.tv_nsec);
}

// False: the vCPU has no such MSR, or not this value of it.
bool get_msr(int fd, u32 index, u64& value) {
    WithEntries<kvm_msrs> msrs(1);
    msrs->nmsrs = 1;
    msrs->entries[0].index = index;
    if (call_ioctl(fd, KVM_GET_MSRS, msrs.head()) != 1) return false;
    value = msrs->entries[0].data;
    return true;
}

bool set_msr(int fd, u32 index, u64 value) {
    WithEntries<kvm_msrs> msrs(1);
    msrs->nmsrs = 1;
    msrs->entries[0].index = index;
    msrs->entries[0].data = value;
    return call_ioctl(fd, KVM_SET_MSRS, msrs.head()) == 1;
}

kvm_irqchip get_chip(int fd, u32 id) {
    kvm_irqchip chip{};
    chip.chip_id = id;
    call_ioctl(fd, KVM_GET_IRQCHIP, &chip);
    return chip;
}

}  // namespace

std::vector<u8> Chips::save(Kind kind, u32 index) const {
    switch (kind) {
        case Kind::kLapic:
            return save_lapic(index);
        case Kind::kIoapic:
            return save_ioapic();
        case Kind::kPic:
            return save_pic();
        case Kind::kPit:
            return save_pit();
    }
    return {};
}

void Chips::restore(Kind kind, u32 index, std::span<const u8> state) {
    switch (kind) {
        case Kind::kLapic:
            return restore_lapic(index, state);
        case Kind::kIoapic:
            return restore_ioapic(state);
        case Kind::kPic:
            return restore_pic(state);
        case Kind::kPit:
            return restore_pit(state);
    }
}

// The machine's time stands where it stood then, so no vCPU has run.
bool Chips::untouched_since(u64 at) const {
    const Clock& clock = vm_.config().clock;
    return clock.paused() && clock.now() == at;
}

// --- Local APICs ---------------------------------------------------------------------------------

Lapic::Config Chips::lapic_config(u32 cpu) const {
    const CpuidPolicy& cpuid = vm_.config().cpuid;
    Lapic::Config config;
    config.id = cpu;
    config.bsp = cpu == 0;
    config.x2apic = cpuid.features.has(Feature::kX2apic);
    config.tsc_deadline = cpuid.features.has(Feature::kTscDeadline);
    config.physical_bits = cpuid.physical_bits;
    return config;
}

const KvmVcpu& Chips::vcpu(u32 cpu) const {
    const KvmVcpu* vcpu = vm_.vcpu(cpu);
    if (vcpu == nullptr) {
        throw StateMismatch("CPU " + std::to_string(cpu) +
                            " does not exist (yet), and so has no local APIC");
    }
    return *vcpu;
}

std::vector<u8> Chips::save_lapic(u32 cpu) const {
    int fd = vcpu(cpu).fd();
    const Clock& clock = vm_.config().clock;
    Lapic::Config config = lapic_config(cpu);
    kvm_lapic_state page;
    call_ioctl(fd, KVM_GET_LAPIC, &page);
    // KVM's count went on in a pause, so it is that of a virtual time that never was.
    u64 counted_at = host_now() - clock.host_offset();
    u64 base = 0;
    get_msr(fd, kApicBaseMsr, base);
    Lapic::State state = from_kvm(page, base, config, counted_at);

    const Kept& kept = kept_lapics_[cpu];
    if (in_tsc_deadline_mode(state)) {
        u64 deadline = kept.deadline;
        if (deadline == 0 && config.tsc_deadline) get_msr(fd, kTscDeadlineMsr, deadline);
        state.tsc_deadline = deadline_to_clock(deadline, vcpu(cpu).tsc_offset());
        if (state.tsc_deadline != 0) {
            bool passed = state.tsc_deadline <= clock.tsc();
            state.timer_deadline = passed ? clock.now() : clock.time_of_tsc(state.tsc_deadline);
        }
    }
    if (kept.valid && untouched_since(kept.at)) {
        state.esr_pending = kept.state.esr_pending;
        state.ext_int = kept.state.ext_int;
        state.initial_count = kept.state.initial_count;
        state.timer_start = kept.state.timer_start;
        state.timer_deadline = kept.state.timer_deadline;
        state.tsc_deadline = kept.state.tsc_deadline;
    }
    return save_pod(state);
}

void Chips::restore_lapic(u32 cpu, std::span<const u8> bytes) {
    Lapic::State state = load_pod<Lapic::State>(bytes, "lapic");
    Lapic::Config config = lapic_config(cpu);
    Lapic::validate(state, config);
    int fd = vcpu(cpu).fd();
    const Clock& clock = vm_.config().clock;
    check_state(set_msr(fd, kApicBaseMsr, state.apic_base), "lapic", "apic_base");
    // A deadline of before would go on otherwise, in the new page's vector.
    if (config.tsc_deadline) set_msr(fd, kTscDeadlineMsr, 0);
    kvm_lapic_state page = to_kvm(state, clock.now());
    call_ioctl(fd, KVM_SET_LAPIC, &page);

    Kept& kept = kept_lapics_[cpu];
    kept.at = clock.now();
    kept.valid = true;
    kept.deadline = 0;
    kept.state = state;
    if (in_tsc_deadline_mode(state)) {
        kept.deadline = deadline_to_guest(state.tsc_deadline, vcpu(cpu).tsc_offset());
    }
}

void Chips::time_moved(u32 cpu) {
    if (cpu == 0 && mode() == IrqchipMode::kKernel) forget_missed_ticks();
    if (!lapic_config(cpu).tsc_deadline) return;
    int fd = vcpu(cpu).fd();
    u64 deadline = kept_lapics_[cpu].deadline;
    kept_lapics_[cpu].deadline = 0;
    if (deadline == 0) get_msr(fd, kTscDeadlineMsr, deadline);
    if (deadline != 0) set_msr(fd, kTscDeadlineMsr, deadline);
}

// --- IOAPIC and 8259s ----------------------------------------------------------------------------

std::vector<u8> Chips::save_ioapic() const {
    kvm_irqchip chip = get_chip(vm_.fd(), KVM_IRQCHIP_IOAPIC);
    std::lock_guard lock(mutex_);
    return save_pod(from_kvm(chip.chip.ioapic, pin_wires_));
}

void Chips::restore_ioapic(std::span<const u8> bytes) {
    Ioapic::State state = load_pod<Ioapic::State>(bytes, "ioapic");
    Ioapic::validate(state);
    kvm_irqchip chip{};
    chip.chip_id = KVM_IRQCHIP_IOAPIC;
    chip.chip.ioapic = to_kvm(state);
    std::lock_guard lock(mutex_);
    call_ioctl(vm_.fd(), KVM_SET_IRQCHIP, &chip);
    pin_wires_ = state.lines;
}

std::vector<u8> Chips::save_pic() const {
    kvm_pic_state chips[2] = {get_chip(vm_.fd(), KVM_IRQCHIP_PIC_MASTER).chip.pic,
                              get_chip(vm_.fd(), KVM_IRQCHIP_PIC_SLAVE).chip.pic};
    return save_pod(from_kvm(chips));
}

void Chips::restore_pic(std::span<const u8> bytes) {
    Pic::State state = load_pod<Pic::State>(bytes, "pic");
    Pic::validate(state);
    kvm_pic_state chips[2];
    to_kvm(state, chips);
    std::lock_guard lock(mutex_);
    for (u32 id : {KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_PIC_MASTER}) {
        kvm_irqchip chip{};
        chip.chip_id = id;
        chip.chip.pic = chips[id];
        call_ioctl(vm_.fd(), KVM_SET_IRQCHIP, &chip);
    }
    pic_wires_ = state.chips[0].lines | static_cast<u32>(state.chips[1].lines) << 8;
}

// --- 8254 ----------------------------------------------------------------------------------------

std::vector<u8> Chips::save_pit() const {
    const Clock& clock = vm_.config().clock;
    if (kept_pit_.valid && untouched_since(kept_pit_.at)) return save_pod(kept_pit_.state);
    kvm_pit_state2 pit{};
    call_ioctl(vm_.fd(), KVM_GET_PIT2, &pit);
    return save_pod(from_kvm(pit, clock.now(), clock.host_offset()));
}

void Chips::restore_pit(std::span<const u8> bytes) {
    Pit::State state = load_pod<Pit::State>(bytes, "pit");
    Pit::validate(state);
    kvm_pit_state2 pit = to_kvm(state);
    call_ioctl(vm_.fd(), KVM_SET_PIT2, &pit);
    kept_pit_.at = vm_.config().clock.now();
    kept_pit_.valid = true;
    kept_pit_.state = state;
}

// KVM makes up for every tick that the guest could not take, those of a pause too. Setting the PIT
// starts a new period without them.
void Chips::forget_missed_ticks() {
    kvm_pit_state2 pit{};
    call_ioctl(vm_.fd(), KVM_GET_PIT2, &pit);
    u8 mode = pit.channels[0].mode;
    if (mode == 2 || mode == 3) call_ioctl(vm_.fd(), KVM_SET_PIT2, &pit);
}

}  // namespace polyvisor::kvm
