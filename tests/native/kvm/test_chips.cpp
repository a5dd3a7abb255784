// KVM's interrupt chips behind InterruptChips, on a real KVM: States set and read back, the same
// States through a guest's eyes, timers across a pause, wires, messages and irqfds.
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstring>

#include "base/error.hpp"
#include "check.hpp"
#include "irqchip/random_chips.hpp"
#include "irqchip/show_chips.hpp"
#include "kvm/chips_guest.hpp"
#include "kvm/fake_ioctl.hpp"

using namespace polyvisor;
using namespace pvtest;

namespace {

std::shared_ptr<const kvm::System> kvm_system;
constexpr int kRounds = 100;

// --- State ---------------------------------------------------------------------------------------

// While the machine stands still, what was put in comes out, to the last bit.
void round_trips(IrqchipMode mode) {
    ChipsGuest guest(kvm_system, mode, 2);
    RandomChips chips(static_cast<u64>(mode));
    for (int round = 0; round < kRounds; ++round) {
        for (u32 cpu : {0u, 1u}) {
            Lapic::State state = chips.lapic(guest.lapic_config(cpu), guest.clock.now());
            if (state.tsc_deadline != 0) {
                state.timer_deadline = guest.clock.time_of_tsc(state.tsc_deadline);
            }
            store(guest, Kind::kLapic, state, cpu);
            CHECK_EQ(difference(state, load<Lapic::State>(guest, Kind::kLapic, cpu)), "");
        }
        if (mode != IrqchipMode::kKernel) continue;
        Ioapic::State ioapic = chips.ioapic();
        store(guest, Kind::kIoapic, ioapic);
        CHECK_EQ(difference(ioapic, load<Ioapic::State>(guest, Kind::kIoapic)), "");
        Pic::State pic = chips.pic();
        store(guest, Kind::kPic, pic);
        CHECK_EQ(difference(pic, load<Pic::State>(guest, Kind::kPic)), "");
        Pit::State pit = chips.pit(guest.clock.now());
        store(guest, Kind::kPit, pit);
        CHECK_EQ(difference(pit, load<Pit::State>(guest, Kind::kPit)), "");
        store(guest, Kind::kPit, Pit::State{});  // or it ticks into what the next round compares
    }
}

// Once time has gone on, everything comes from KVM: all but the counts is still the same.
void round_trips_through_kvm() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    RandomChips chips(77);
    for (int round = 0; round < kRounds; ++round) {
        Lapic::State state = chips.lapic(guest.lapic_config(0), guest.clock.now());
        store(guest, Kind::kLapic, state);
        Pit::State pit = chips.pit(guest.clock.now());
        store(guest, Kind::kPit, pit);
        guest.clock.resume();
        guest.clock.pause();
        Lapic::State now = load<Lapic::State>(guest, Kind::kLapic);
        Lapic::validate(now, guest.lapic_config(0));
        bool counting = state.timer_deadline != kNever && state.tsc_deadline == 0;
        s64 off = static_cast<s64>(now.timer_deadline - state.timer_deadline);
        if (counting && now.timer_deadline != kNever) {
            CHECK(off > -1'000'000'000 && off < 1'000'000'000);
        }
        CHECK_EQ(now.tsc_deadline, state.tsc_deadline);
        CHECK_EQ(now.esr_pending, 0u);
        for (Lapic::State* s : {&state, &now}) {
            s->timer_start = s->timer_deadline = 0;
            s->initial_count = s->esr_pending = s->ext_int = 0;
        }
        CHECK_EQ(difference(state, now), "");
        Pit::State pit_now = load<Pit::State>(guest, Kind::kPit);
        Pit::validate(pit_now);
        for (unsigned n = 0; n < 3; ++n) {
            const Pit::Channel &a = pit.channels[n], &b = pit_now.channels[n];
            CHECK_EQ(a.programmed, b.programmed);
            CHECK_EQ(a.gate, b.gate);
            if (!a.programmed) continue;
            CHECK_EQ(a.mode, b.mode);
            CHECK_EQ(a.access, b.access);
            CHECK_EQ(a.bcd, b.bcd);
            u32 count = a.next_reload != 0 ? a.next_reload : a.reload;
            CHECK_EQ(count, b.next_reload != 0 ? b.next_reload : b.reload);
        }
        CHECK_EQ(pit_now.port61 & 3, pit.port61 & 3);
    }
}

template <class State>
void refused(ChipsGuest& guest, Kind kind, State bad) {
    State before = load<State>(guest, kind);
    CHECK_THROWS(store(guest, kind, bad), StateError);
    CHECK_EQ(difference(before, load<State>(guest, kind)), "");
}

void bad_states() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    RandomChips chips(5);
    store(guest, Kind::kLapic, chips.lapic(guest.lapic_config(0), guest.clock.now()));
    store(guest, Kind::kIoapic, chips.ioapic());
    store(guest, Kind::kPic, chips.pic());
    store(guest, Kind::kPit, chips.pit(guest.clock.now()));
    Lapic::State lapic = idle_lapic(0);
    lapic.id = 1;
    refused(guest, Kind::kLapic, lapic);
    lapic = idle_lapic(0);
    lapic.apic_base |= bit(50);
    refused(guest, Kind::kLapic, lapic);
    lapic = idle_lapic(0);
    lapic.irr[0] = 2;
    refused(guest, Kind::kLapic, lapic);
    Ioapic::State ioapic{};
    ioapic.redirection[5] = bit(40);
    refused(guest, Kind::kIoapic, ioapic);
    Pic::State pic;
    pic.chips[1].lowest = 9;
    refused(guest, Kind::kPic, pic);
    pic = {};
    pic.chips[1].level_mode = 1;  // ours could
    refused(guest, Kind::kPic, pic);
    Pit::State pit;
    pit.channels[0].mode = 6;
    refused(guest, Kind::kPit, pit);
    CHECK_THROWS(guest.chips().restore(Kind::kPit, 0, {}), StateError);
    CHECK_THROWS(guest.chips().save(Kind::kLapic, 1), StateMismatch);
}

// --- Through the guest's eyes --------------------------------------------------------------------

// A guest reads from KVM's chip what it would read from ours in the same State.
void guest_reads_8259() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    RandomChips chips(11);
    Program program;
    for (u16 port : {0x20, 0xa0}) {
        program.in8(port + 1);
        program.out8(port, 0x0a);  // IRR
        program.in8(port);
        program.out8(port, 0x0b);  // ISR
        program.in8(port);
        program.out8(port, 0x20);  // EOI of the highest
        program.in8(port);
    }
    program.in8(0x4d0), program.in8(0x4d1);
    for (int round = 0; round < 40; ++round) {
        Pic::State state = chips.pic();
        for (Pic::Chip& chip : state.chips) {
            chip.init_step = chip.poll = 0;
            chip.special_mask = 0;  // KVM's does not heed it
        }
        Pic::settle(state);
        Pic ours;
        ours.restore(save_pod(state));
        std::vector<u32> want;
        auto in = [&](u64 offset) {
            u8 value = 0;
            ours.read(offset, {&value, 1});
            want.push_back(value);
        };
        auto out = [&](u64 offset, u8 value) { ours.write(offset, {&value, 1}); };
        for (u64 offset : {0, 2}) {
            in(offset + 1);
            out(offset, 0x0a), in(offset);
            out(offset, 0x0b), in(offset);
            out(offset, 0x20), in(offset);
        }
        in(4), in(5);
        guest.load(program);
        store(guest, Kind::kPic, state);
        CHECK(guest.run());
        for (u32 n = 0; n < program.results(); ++n) CHECK_EQ(guest.result(n), want[n]);
        CHECK_EQ(difference(ours.state(), load<Pic::State>(guest, Kind::kPic)), "");
    }
}

void guest_reads_ioapic() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    RandomChips chips(12);
    constexpr u32 kBase = 0xfec00000;
    Program program;
    program.read32(kBase);
    std::vector<u32> indices = {0, 1, 2};  // what is between reads ones from KVM's, zeros from ours
    for (u32 index = 0x10; index < 0x40; ++index) indices.push_back(index);
    for (u32 index : indices) {
        program.write32(kBase, index);
        program.read32(kBase + 0x10);
    }
    for (int round = 0; round < 20; ++round) {
        Ioapic::State state = chips.ioapic();
        for (u64& entry : state.redirection) entry |= Ioapic::kMask;
        irqchip::ApicBus bus;
        Ioapic ours(bus);
        ours.restore(save_pod(state));
        guest.load(program);
        store(guest, Kind::kIoapic, state);
        CHECK(guest.run());
        CHECK_EQ(guest.result(0), state.index);
        u32 n = 1;
        for (u32 index : indices) {
            u32 want = 0;
            ours.write(0, {reinterpret_cast<const u8*>(&index), 4});
            ours.read(0x10, {reinterpret_cast<u8*>(&want), 4});
            CHECK_EQ(guest.result(n++), want);
        }
    }
}

void guest_reads_lapic() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    RandomChips chips(13);
    // All but the version, which tells the chips apart, and the counts.
    constexpr u32 kRegisters[] = {0x02, 0x08, 0x0d, 0x0e, 0x0f, 0x10, 0x11, 0x17,
                                  0x18, 0x1f, 0x21, 0x22, 0x27, 0x28, 0x30, 0x31,
                                  0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x3e};
    Program program;
    for (u32 reg : kRegisters) program.read32(0xfee00000 + 16 * reg);
    for (int round = 0; round < 20; ++round) {
        Lapic::State state = chips.lapic(guest.lapic_config(0), guest.clock.now());
        state.apic_base = Lapic::kDefaultBase | bit(11) | bit(8);
        state.ldr = 0x12000000;
        state.initial_count = 0;
        state.timer_deadline = kNever;
        state.tsc_deadline = 0;
        irqchip::ApicBus bus;
        Lapic ours(guest.lapic_config(0), guest.clock, bus);
        ours.restore(save_pod(state));
        guest.load(program);
        store(guest, Kind::kLapic, state);
        CHECK(guest.run());
        u32 n = 0;
        for (u32 reg : kRegisters) {
            u32 want = 0;
            ours.mmio_read(16 * reg, {reinterpret_cast<u8*>(&want), 4});
            // On AMD, KVM passes the task priority through the VMCB, which has its upper half only.
            if (reg == 0x08) want &= guest.result(n) | 0xf0;
            if (guest.result(n) != want) std::fprintf(stderr, "register %x: ", reg);
            CHECK_EQ(guest.result(n++), want);
        }
    }
}

// --- Timers --------------------------------------------------------------------------------------

constexpr u32 kIrr3 = 0xfee00200 + 16 * 3, kVector = 0x65, kVectorBit = 1u << 5;

// One that is due when it is restored fires; one that has fired does not again.
void one_shot_timer() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    Program wait;
    wait.wait32(kIrr3, kVectorBit);
    Lapic::State state = idle_lapic(0);
    state.divide = 0xb;
    state.lvt[Lapic::kTimer] = kVector;
    state.initial_count = 20'000'000;
    for (u64 left : {u64{0}, u64{10'000'000}}) {
        guest.load(wait);
        state.timer_deadline = guest.clock.now() + left;
        state.timer_start = state.timer_deadline - state.initial_count;
        store(guest, Kind::kLapic, state);
        Nanoseconds before = guest.clock.now();
        CHECK(guest.run());
        CHECK(guest.clock.now() - before >= left * 9 / 10);
        CHECK(load<Lapic::State>(guest, Kind::kLapic).irr[3] & kVectorBit);
    }
    state.timer_deadline = kNever;
    Program look;
    look.read32(0xfee00020);
    guest.load(look);
    store(guest, Kind::kLapic, state);
    CHECK(guest.run());
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).irr[3] & kVectorBit, 0u);
}

// --- Wires, messages, irqfds ---------------------------------------------------------------------

void wires() {
    ChipsGuest guest(kvm_system, IrqchipMode::kKernel);
    store(guest, Kind::kLapic, idle_lapic(0));
    Ioapic::State ioapic{};
    for (u64& entry : ioapic.redirection) entry = Ioapic::kMask;
    ioapic.redirection[2] = 0x41;  // the timer's pin, edge
    ioapic.redirection[20] = Ioapic::kLevel | 0x42;
    store(guest, Kind::kIoapic, ioapic);
    Pic::State pic;
    pic.chips[0].elcr = 0x20;
    store(guest, Kind::kPic, pic);

    guest.chips().set_gsi(0, true);
    guest.chips().set_gsi(20, true);
    guest.chips().set_gsi(5, true);
    guest.chips().set_pic(11, true);
    Lapic::State lapic = load<Lapic::State>(guest, Kind::kLapic);
    CHECK_EQ(lapic.irr[2], 6u);
    CHECK_EQ(lapic.tmr[2], 4u);
    ioapic = load<Ioapic::State>(guest, Kind::kIoapic);
    CHECK_EQ(ioapic.lines, 1u << 2 | 1u << 20 | 1u << 5);
    CHECK(ioapic.redirection[20] & Ioapic::kRemoteIrr);
    pic = load<Pic::State>(guest, Kind::kPic);
    CHECK_EQ(pic.chips[0].lines, 0x21u);
    CHECK_EQ(pic.chips[1].lines, 0x08u);
    CHECK_EQ(pic.chips[0].irr, 0x25u);  // with the cascade
    // The edge of a wire that was up before is not a new one.
    lapic.irr[2] = 0;
    store(guest, Kind::kLapic, lapic);
    store(guest, Kind::kIoapic, ioapic);
    guest.chips().set_gsi(0, true);
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).irr[2], 0u);
    guest.chips().set_gsi(0, false);
    guest.chips().set_gsi(0, true);
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).irr[2], 2u);
    guest.chips().set_gsi(5, false);
    CHECK_EQ(load<Pic::State>(guest, Kind::kPic).chips[0].irr & 0x20, 0);
    guest.chips().set_gsi(24, true);  // no such wires
    guest.chips().set_pic(16, true);
}

void messages(IrqchipMode mode) {
    ChipsGuest guest(kvm_system, mode, 2);
    store(guest, Kind::kLapic, idle_lapic(0), 0);
    store(guest, Kind::kLapic, idle_lapic(1, true), 1);
    CHECK(guest.chips().send_msi(0xfee00000, 0x51));
    CHECK(guest.chips().send_msi(0xfee01000, 0x52));
    CHECK(!guest.chips().send_msi(0xfee77000, 0x53));  // nobody
    CHECK(!guest.chips().send_msi(0xfec00000, 0x54));  // nowhere
    CHECK(!guest.chips().send_msi(0x1'fee00000, 0x54));
    CHECK(!guest.chips().send_msi(0xfee00000, 0x300 | 0x54));  // a reserved mode
    CHECK(!guest.chips().send_msi(0xfee00000, 0x600 | 0x54));  // start-up
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic, 0).irr[2], 1u << 17);
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic, 1).irr[2], 1u << 18);
    CHECK(guest.chips().send_msi(0xfeeff000, 0x5f));  // all
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic, 0).irr[2], 1u << 17 | 1u << 31);
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic, 1).irr[2], 1u << 18 | 1u << 31);
}

bool arrives(ChipsGuest& guest, u32 vector) {
    for (int n = 0; n < 1000; ++n) {  // irqfds may go through a kernel thread
        Lapic::State state = load<Lapic::State>(guest, Kind::kLapic);
        if (state.irr[vector / 32] >> (vector % 32) & 1) return true;
        ::usleep(1000);
    }
    return false;
}

void ring(int fd) {
    u64 one = 1;
    CHECK(::write(fd, &one, sizeof one) == sizeof one);
}

void irqfds(IrqchipMode mode) {
    ChipsGuest guest(kvm_system, mode);
    store(guest, Kind::kLapic, idle_lapic(0));
    OwnedFd first(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    OwnedFd second(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    guest.chips().connect_msi(first.get(), 0xfee00000, 0x61);
    guest.chips().connect_msi(second.get(), 0xfee00000, 0x62);
    ring(first.get());
    CHECK(arrives(guest, 0x61));
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).irr[3], 2u);
    ring(second.get());
    CHECK(arrives(guest, 0x62));
    guest.chips().connect_msi(first.get(), 0xfee00000, 0x63);  // the guest moved it
    ring(first.get());
    CHECK(arrives(guest, 0x63));
    guest.chips().disconnect_msi(first.get());
    guest.chips().disconnect_msi(first.get());
    store(guest, Kind::kLapic, idle_lapic(0));
    ring(first.get());
    ring(second.get());
    CHECK(arrives(guest, 0x62));
    CHECK_EQ(load<Lapic::State>(guest, Kind::kLapic).irr[3], 4u);
    // What no APIC answers to: the guest's mistake.
    guest.chips().connect_msi(first.get(), 0x12'3456'789a, 0xffffffff);
    ring(first.get());
    guest.chips().connect_msi(first.get(), 0xfee00000, 0x64);
    ring(first.get());
    CHECK(arrives(guest, 0x64));
    CHECK_THROWS(guest.chips().connect_msi(-1, 0xfee00000, 0x65), HostError);
    CHECK_THROWS(guest.chips().connect_msi(0x7fff, 0xfee00000, 0x65), HostError);
    ring(second.get());
    CHECK(arrives(guest, 0x62));
}

// --- Split ---------------------------------------------------------------------------------------

// The table of routes is written when a pin's message is new, not when it is masked and unmasked.
void split_routes() {
    int written = 0;
    fake_answers[KVM_SET_GSI_ROUTING] = [&](int fd, void* argument) {
        ++written;
        return kernel_ioctl(fd, KVM_SET_GSI_ROUTING, argument);
    };
    ChipsGuest guest(kvm_system, IrqchipMode::kSplit);
    written = 0;
    constexpr u32 kData = 0xc071;  // level
    guest.chips().set_ioapic_pin(5, 0xfee00000, kData, true);
    CHECK_EQ(written, 1);
    for (int n = 0; n < 10; ++n) {
        guest.chips().set_ioapic_pin(5, 0xfee00000, kData, false);
        guest.chips().set_ioapic_pin(5, 0xfee00000, kData, true);
    }
    CHECK_EQ(written, 1);
    guest.chips().set_ioapic_pin(6, 0, 0, false);
    guest.chips().set_ioapic_pin(99, 0xfee00000, kData, true);
    CHECK_EQ(written, 1);
    guest.chips().set_ioapic_pin(5, 0xfee00000, kData + 1, true);
    CHECK_EQ(written, 2);
    fake_answers.erase(KVM_SET_GSI_ROUTING);
}

void missing_capabilities() {
    fake_answers[KVM_CHECK_EXTENSION] = [](int fd, void* argument) -> long {
        if (reinterpret_cast<long>(argument) == KVM_CAP_SPLIT_IRQCHIP) return 0;
        return kernel_ioctl(fd, KVM_CHECK_EXTENSION, argument);
    };
    CHECK_THROWS(ChipsGuest(kvm_system, IrqchipMode::kSplit), EngineUnavailable);
    ChipsGuest(kvm_system, IrqchipMode::kKernel);
    fake_answers.erase(KVM_CHECK_EXTENSION);
}

}  // namespace

int main() {
    try {
        kvm_system = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::printf("%s\n", error.what());
        return 77;
    }
    round_trips(IrqchipMode::kKernel);
    round_trips(IrqchipMode::kSplit);
    round_trips_through_kvm();
    bad_states();
    guest_reads_8259();
    guest_reads_ioapic();
    guest_reads_lapic();
    one_shot_timer();
    wires();
    messages(IrqchipMode::kKernel);
    messages(IrqchipMode::kSplit);
    irqfds(IrqchipMode::kKernel);
    irqfds(IrqchipMode::kSplit);
    split_routes();
    missing_capabilities();
    return finish("test_chips");
}
