// An event that was in flight when the state was saved (on another engine) is delivered before the
// next instruction, exactly once, with the frame that hardware would push.
#include "base/error.hpp"
#include "system_machine.hpp"

using namespace pvtest;

namespace {

#define BYTES(text) std::string_view(text, sizeof(text) - 1)

using Kind = InFlightEvent::Kind;

constexpr u64 kIf = bit(9), kRf = bit(16);
// Would be seen in RAX if an instruction ran first.
constexpr std::string_view kCodeBytes = "\xb0\x01\xf4";  // mov $1, %al; hlt

/// Restores `event` and runs to its handler's first instruction, executing none.
Outcome deliver(Machine& m, const InFlightEvent& event) {
    m.state.event = event;
    m.start(kCodeBytes);
    CHECK(m.vcpu->save().event == event);  // nothing happens before run()
    CHECK_EQ(m.run(0).reason, ExitReason::kInterrupted);
    CpuState s = m.vcpu->save();
    CHECK(s.event == InFlightEvent{});
    CHECK_EQ(s.gpr[kRax] & 0xff, u64{0});
    CHECK_EQ(s.instructions, u64{0});
    m.run(1);  // the handler's HLT
    return outcome_of(m, m.vcpu->save());
}

constexpr Mode kAll[] = {Mode::kReal,        Mode::kVm86,   Mode::kProtected16,
                         Mode::kProtected32, Mode::kCompat, Mode::kLong};

u64 start_of(const Machine& m) {
    return m.mode == Mode::kReal || m.mode == Mode::kVm86 ? 0 : kCode;
}

void exceptions() {
    for (Mode mode : kAll) {
        Machine m(mode);
        const bool pushes = mode != Mode::kReal;
        Outcome o = deliver(m, {.kind = Kind::kException,
                                .vector = 13,
                                .has_error_code = pushes,
                                .error_code = pushes ? 0x1234u : 0});
        CHECK_EQ(o.vector, 13);
        CHECK_EQ(o.rip, start_of(m));
        if (!pushes) continue;
        CHECK_EQ(o.error, u64{0x1234});
        CHECK(o.rflags & kRf);  // a fault goes past its instruction's breakpoint
    }
    // CR2 and DR6 were set when the exception was raised.
    Machine page(Mode::kLong, 3);
    page.state.cr2 = 0x1234'5678'9000;
    Outcome o = deliver(page, {Kind::kException, 14, true, 0, 6});
    CHECK_EQ(o.vector, 14);
    CHECK_EQ(o.error, u64{6});
    CHECK_EQ(o.cs, u64{kCs64User});
    CHECK_EQ(o.state.cr2, u64{0x1234'5678'9000});
    Machine debug(Mode::kLong);
    debug.state.dr6 = 0xffff4ff3;
    o = deliver(debug, {.kind = Kind::kException, .vector = 1});
    CHECK_EQ(o.vector, 1);
    CHECK_EQ(o.state.dr6, u64{0xffff4ff3});
    CHECK(!(o.rflags & kRf));
}

void interrupts() {
    for (Mode mode : kAll) {
        Machine m(mode);
        m.state.rflags |= kIf;
        Outcome o = deliver(m, {.kind = Kind::kInterrupt, .vector = 0x41});
        CHECK_EQ(o.vector, 0x41);
        CHECK_EQ(o.rip, start_of(m));
        CHECK(o.rflags & kIf);
        CHECK(!(o.rflags & kRf));
    }
    // The one in flight comes before those that wait.
    Machine m(Mode::kLong);
    m.state.rflags |= kIf;
    m.apic.vectors = {0x55};
    Outcome o = deliver(m, {.kind = Kind::kInterrupt, .vector = 0x41});
    CHECK_EQ(o.vector, 0x41);
    CHECK_EQ(m.apic.vectors.size(), std::size_t{1});
}

void nmis() {
    for (Mode mode : kAll) {
        Machine m(mode);
        Outcome o = deliver(m, {.kind = Kind::kNmi, .vector = 2});
        CHECK_EQ(o.vector, 2);
        CHECK_EQ(o.rip, start_of(m));
        CHECK(o.state.nmi_blocked);
    }
}

void software() {
    for (Mode mode :
         {Mode::kReal, Mode::kProtected16, Mode::kProtected32, Mode::kCompat, Mode::kLong}) {
        Machine m(mode);
        Outcome o = deliver(m, {.kind = Kind::kSoftwareInterrupt, .vector = 0x80, .length = 2});
        CHECK_EQ(o.vector, 0x80);
        CHECK_EQ(o.rip, start_of(m) + 2);
        Machine breakpoint(mode);
        o = deliver(breakpoint, {.kind = Kind::kSoftwareException, .vector = 3, .length = 1});
        CHECK_EQ(o.vector, 3);
        CHECK_EQ(o.rip, start_of(m) + 1);
    }
    // The gate's privilege counts for INT n, and its fault is at the instruction.
    Machine user(Mode::kLong, 3);
    CHECK_EQ(deliver(user, {.kind = Kind::kSoftwareInterrupt, .vector = 0x80, .length = 2}).vector,
             0x80);
    Machine denied(Mode::kLong, 3);
    Outcome o = deliver(denied, {.kind = Kind::kSoftwareInterrupt, .vector = 0x81, .length = 2});
    CHECK_EQ(o.vector, 13);
    CHECK_EQ(o.error, u64{0x81 * 8 + 2});
    CHECK_EQ(o.rip, kCode);
}

// Until it is delivered it is part of the state, and what ends the CPU's present ends it, too.
void waiting() {
    const InFlightEvent event{.kind = Kind::kInterrupt, .vector = 0x41};
    Machine m(Mode::kLong);
    m.state.rflags |= kIf;
    m.state.event = event;
    m.start(kCodeBytes);
    m.vcpu->request_stop();
    CHECK_EQ(m.run().reason, ExitReason::kInterrupted);
    CHECK(m.vcpu->save().event == event);
    CHECK_EQ(m.vcpu->save().rip, kCode);
    m.vcpu->init();
    m.run(0);
    CHECK(m.vcpu->save().event == InFlightEvent{});

    Machine halted(Mode::kLong);
    halted.state.activity = Activity::kHalted;
    CHECK_EQ(deliver(halted, {.kind = Kind::kNmi, .vector = 2}).vector, 2);

    Machine dead(Mode::kLong);
    dead.state.idtr.limit = 0;
    dead.state.event = {Kind::kException, 8, true, 0, 0};
    dead.start(kCodeBytes);
    CHECK_EQ(dead.run().reason, ExitReason::kShutdown);
}

void impossible() {
    const InFlightEvent cases[] = {
        {.kind = static_cast<Kind>(9)},
        {.kind = Kind::kNmi, .vector = 3},
        {.kind = Kind::kException, .vector = 32},
        {.kind = Kind::kException, .vector = 2},
        {.kind = Kind::kException, .vector = 13},                         // lacks its error code
        {.kind = Kind::kException, .vector = 6, .has_error_code = true},  // has none
        {.kind = Kind::kInterrupt, .vector = 0x20, .error_code = 1},
        {.kind = Kind::kSoftwareInterrupt, .vector = 0x80},  // no length
        {.kind = Kind::kSoftwareInterrupt, .vector = 0x80, .length = 16},
        {.kind = Kind::kSoftwareException, .vector = 6, .length = 1},
        {.kind = Kind::kInterrupt, .vector = 0x20, .length = 2},
    };
    Machine m(Mode::kLong);
    for (const InFlightEvent& event : cases) {
        CpuState bad = m.state;
        bad.event = event;
        try {
            m.vcpu->restore(bad);
            fail(__FILE__, __LINE__, "took an impossible event");
        } catch (const StateError& error) {
            CHECK_EQ(error.field, std::string("event"));
        }
    }
}

}  // namespace

int main() {
    exceptions();
    interrupts();
    nmis();
    software();
    waiting();
    impossible();
    return finish("test_system_in_flight");
}
