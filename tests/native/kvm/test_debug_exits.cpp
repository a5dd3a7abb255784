// What a KVM_EXIT_DEBUG means and what KVM is told next, with exits that a host's own KVM may never
// give: KVM_RUN is played (fake_ioctl.hpp), the rest is real.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <deque>

#include "cpu/debug.hpp"
#include "kvm/debug_guest.hpp"
#include "kvm/fake_ioctl.hpp"
#include "kvm/ioctl.hpp"

using namespace polyvisor;
using namespace pvtest;

PV_GUEST(anything, R"(
    int3
    nop
    hlt
)")

namespace {

using Kind = GuestDebug::Breakpoint::Kind;

constexpr u64 kCode = DebugGuest::kCode;
constexpr u32 kDb = 1, kBp = 3;

struct Played {
    u32 exception;
    u64 pc;
    u64 dr6;
};

std::deque<Played> to_play;
std::vector<kvm_guest_debug> told;
std::vector<kvm_debugregs> registers_set;

// The next exit, or KVM_EXIT_SHUTDOWN when there is none.
long play(int fd, void*) {
    void* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) return -errno;
    auto& run = *static_cast<kvm_run*>(page);
    run.exit_reason = KVM_EXIT_SHUTDOWN;
    if (!to_play.empty()) {
        run.exit_reason = KVM_EXIT_DEBUG;
        run.debug.arch = {};
        run.debug.arch.exception = to_play.front().exception;
        run.debug.arch.pc = to_play.front().pc;
        run.debug.arch.dr6 = to_play.front().dr6;
        to_play.pop_front();
    }
    ::munmap(page, 4096);
    return 0;
}

void listen() {
    fake_answers[KVM_RUN] = play;
    fake_answers[KVM_SET_GUEST_DEBUG] = [](int, void* argument) {
        told.push_back(*static_cast<kvm_guest_debug*>(argument));
        return 0L;
    };
    fake_answers[KVM_SET_DEBUGREGS] = [](int, void* argument) {
        registers_set.push_back(*static_cast<kvm_debugregs*>(argument));
        return 0L;
    };
}

Exit run(DebugGuest& guest, std::deque<Played> exits) {
    to_play = std::move(exits);
    told.clear();
    registers_set.clear();
    return guest.vcpu->run();
}

void int3() {
    DebugGuest guest("kvm", anything());
    GuestDebug debug;
    debug.int3_exits = true;
    to_play = {{kBp, 0x800, 0}};  // for the probe
    guest.vcpu->set_debug(debug);

    Exit exit = run(guest, {{kBp, kCode, 0}});
    CHECK_EQ(exit.reason, ExitReason::kDebug);
    CHECK_EQ(exit.dr6, 0u);
    CHECK_EQ(exit.address, kCode);
    CHECK_EQ(told.size(), std::size_t{1});
    CHECK_EQ(told[0].control, u32{KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP});

    // Nothing new to tell when it just runs on.
    exit = run(guest, {{kBp, kCode, 0}});
    CHECK_EQ(exit.address, kCode);
    CHECK(told.empty());

    // The guest's own is put back, once.
    guest.vcpu->raise_int3();
    exit = run(guest, {{kBp, kCode + 8, 0}});
    CHECK_EQ(told.size(), std::size_t{1});
    CHECK(told[0].control & KVM_GUESTDBG_INJECT_BP);
    CHECK(told[0].control & KVM_GUESTDBG_USE_SW_BP);
    run(guest, {{kBp, kCode, 0}});
    CHECK(told.empty());

    // Turned off, KVM is told of nothing, and then not any more.
    guest.vcpu->set_debug({});
    exit = run(guest, {});
    CHECK_EQ(exit.reason, ExitReason::kShutdown);
    CHECK_EQ(told.size(), std::size_t{1});
    CHECK_EQ(told[0].control, 0u);
}

void watchpoints_and_the_guests_own_traps() {
    DebugGuest guest("kvm", anything());
    GuestDebug debug;
    debug.hardware = {{0x5000, Kind::kWrite, 4}, {kCode + 1, Kind::kExecute, 1}};
    guest.vcpu->set_debug(debug);

    // The first trap is the guest's own single step.
    Exit exit = run(guest, {{kDb, kCode + 1, kDr6Step}, {kDb, kCode + 2, 1}});
    CHECK_EQ(exit.reason, ExitReason::kDebug);
    CHECK_EQ(exit.dr6, 1u);
    CHECK_EQ(exit.address, kCode + 2);
    CHECK_EQ(told.size(), std::size_t{2});
    CHECK_EQ(told[0].control, u32{KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP});
    CHECK_EQ(told[0].arch.debugreg[0], 0x5000u);
    CHECK_EQ(told[0].arch.debugreg[1], kCode + 1);
    CHECK_EQ(told[0].arch.debugreg[7], 0x000d040au);  // write of 4 bytes; execute
    CHECK(told[1].control & KVM_GUESTDBG_INJECT_DB);
    CHECK_EQ(registers_set.size(), std::size_t{1});
    CHECK(registers_set[0].dr6 & kDr6Step);

    // A condition that is met for a breakpoint that is not there is no hit.
    exit = run(guest, {{kDb, kCode + 9, 8}, {kDb, kCode + 1, 2}});
    CHECK_EQ(exit.dr6, 2u);
    CHECK_EQ(exit.address, kCode + 1);
}

void on_from_a_code_breakpoint() {
    DebugGuest guest("kvm", anything());
    GuestDebug debug;
    debug.hardware = {{kCode, Kind::kExecute, 1}};
    guest.vcpu->set_debug(debug);
    Exit exit = run(guest, {{kDb, kCode, 1}});
    CHECK_EQ(exit.address, kCode);
    // One step without it, then on with it.
    exit = run(guest, {{kDb, kCode + 1, kDr6Step}});
    CHECK_EQ(exit.reason, ExitReason::kShutdown);
    CHECK_EQ(told.size(), std::size_t{3});
    CHECK(told[0].control & KVM_GUESTDBG_SINGLESTEP);
    CHECK(!(told[0].control & KVM_GUESTDBG_USE_HW_BP));
    CHECK_EQ(told[1].control, 0u);
    CHECK_EQ(told[2].control, u32{KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP});
}

}  // namespace

int main() {
    if (::access("/dev/kvm", R_OK | W_OK) != 0) {
        std::puts("no /dev/kvm that this user can open");
        return 77;
    }
    listen();
    int3();
    watchpoints_and_the_guests_own_traps();
    on_from_a_code_breakpoint();
    return finish("test_debug_exits");
}
