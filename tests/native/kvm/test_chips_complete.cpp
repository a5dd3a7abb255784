// What only a complete KVM does of the interrupt chips: its TSC follows the machine's time, so that
// a TSC deadline waits for a machine that stands still; and in the split mode it reports the end of
// level-triggered interrupts.
#include <unistd.h>

#include "base/error.hpp"
#include "check.hpp"
#include "kvm/chips_guest.hpp"
#include "kvm/ioctl.hpp"

using namespace polyvisor;
using namespace pvtest;
using irqchip::Lapic;

namespace {

std::shared_ptr<const kvm::System> kvm_system;
constexpr u32 kIrr3 = 0xfee00200 + 16 * 3, kVector = 0x65, kVectorBit = 1u << 5;

// A KVM that emulates may take the offset of a TSC and forget it.
bool keeps_tsc_offset() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    s64 offset = -123'456'789;
    kvm_device_attr attribute{};
    attribute.group = KVM_VCPU_TSC_CTRL;
    attribute.attr = KVM_VCPU_TSC_OFFSET;
    attribute.addr = reinterpret_cast<u64>(&offset);
    int fd = guest.vcpus[0]->fd();
    if (kvm::try_ioctl(fd, KVM_SET_DEVICE_ATTR, &attribute) != 0) return false;
    offset = 0;
    return kvm::try_ioctl(fd, KVM_GET_DEVICE_ATTR, &attribute) == 0 && offset == -123'456'789;
}

// Stops the guest before its timer is due, lets the host's time go on, and looks when it fires.
void tsc_deadline_waits_for_the_machine() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    if (!guest.policy.features.has(Feature::kTscDeadline)) return;
    Program program;
    program.wait32(kIrr3, kVectorBit);
    guest.load(program);
    constexpr Nanoseconds kAhead = 50'000'000;
    Nanoseconds due = guest.clock.now() + kAhead;
    Lapic::State state = idle_lapic(0);
    state.lvt[Lapic::kTimer] = 2 << 17 | kVector;
    state.tsc_deadline = guest.clock.tsc_at(due);
    state.timer_deadline = guest.clock.time_of_tsc(state.tsc_deadline);
    store(guest, Kind::kLapic, state);
    ::usleep(70'000);
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).tsc_deadline, state.tsc_deadline);
    // Runs a while, stops; the deadline is as it was.
    guest.vcpus[0]->request_stop();
    guest.clock.resume();
    CHECK(guest.vcpus[0]->run().reason == ExitReason::kInterrupted);
    guest.clock.pause();
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).tsc_deadline, state.tsc_deadline);
    ::usleep(70'000);
    CHECK(guest.clock.now() < due);
    CHECK(guest.run());
    CHECK(guest.clock.now() + 1'000'000 >= due);  // the TSC's frequency is known to a kHz
    Lapic::State after = load<Lapic::State>(guest, Kind::kLapic);
    CHECK(after.irr[3] & kVectorBit);
    CHECK_EQ(after.tsc_deadline, 0u);
}

// The end of a level-triggered interrupt reaches our IOAPIC, and that of an edge does not.
void split_eoi() {
    ChipsGuest guest(kvm_system, IrqchipMode::kSplit);
    std::vector<u8> ended;
    guest.chips().set_eoi_handler([&](u8 vector) { ended.push_back(vector); });
    guest.chips().set_ioapic_pin(5, 0xfee00000, 0xc071, true);
    Program program;
    program.write32(0xfee000b0, 0);
    program.write32(0xfee000b0, 0);
    guest.load(program);
    Lapic::State state = idle_lapic(0);
    state.isr[3] = 1u << 0x11 | 1u << 0x12;  // 0x71 by level, 0x72 by edge
    state.tmr[3] = 1u << 0x11;
    store(guest, Kind::kLapic, state);
    CHECK(guest.run());
    CHECK_EQ(ended.size(), 1u);
    CHECK_EQ(ended.empty() ? 0 : ended[0], 0x71);
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).isr[3], 0u);
}

}  // namespace

int main() {
    try {
        kvm_system = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::printf("%s\n", error.what());
        return 77;
    }
    if (!keeps_tsc_offset()) {
        std::printf("this KVM keeps no TSC offset (it emulates, or is older than Linux 5.16)\n");
        return 77;
    }
    tsc_deadline_waits_for_the_machine();
    split_eoi();
    return finish("test_chips_complete");
}
