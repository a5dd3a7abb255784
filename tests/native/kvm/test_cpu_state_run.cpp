// What a restored state does when the vCPU runs: an event in flight reaches its handler before the
// next instruction, an INT n that was under way is made again, and translations from before are
// forgotten. In long mode, with a handler of one HLT for every vector.
#include <cstdio>
#include <memory>
#include <string_view>

#include "base/error.hpp"
#include "check.hpp"
#include "kvm/engine.hpp"
#include "kvm/lone_vcpu.hpp"

using namespace polyvisor;
using namespace pvtest;

namespace {

constexpr int kSkipped = 77;
constexpr u64 kPml4 = 0x1000, kPdpt = 0x2000, kPd = 0x3000, kPt = 0x4000, kGdt = 0x5000;
constexpr u64 kIdt = 0x6000, kTss = 0x7000, kCode = 0x8000, kHandlers = 0x9000, kStack = 0xb000;
constexpr u64 kPages = 0x200000;  // linear; 4 KiB pages from kPt
constexpr u16 kCode64 = 8, kData64 = 16, kTask = 24;

struct Machine {
    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Clock clock;
    NoInterrupts interrupts;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;
    CpuState state;  ///< to change before start()

    explicit Machine(const std::shared_ptr<const kvm::System>& system) {
        memory.add(Gpa(0), 2 << 20, "ram");
        EngineOffer offer = kvm::make_offer(*system);
        CpuidOptions options;
        options.physical_bits = offer.physical_bits;
        options.arch_capabilities = offer.arch_capabilities;
        clock.set_tsc_khz(offer.native_tsc_khz);
        EngineConfig config{
            memory, pio, mmio, clock,
            make_cpuid_policy("host", offer.features, 1, offer.native_tsc_khz, options)};
        engine = kvm::create_engine(system, config);
        vcpu = engine->create_vcpu(0, &interrupts);
        build_tables();
        build_state();
    }

    void put(u64 gpa, u64 value) { memory.store<u64>(Gpa(gpa), value); }

    void build_tables() {
        put(kPml4, kPdpt | 3);
        put(kPdpt, kPd | 3);
        put(kPd, 0x83);
        put(kPd + 8, kPt | 3);
        put(kGdt + kCode64, 0x00af9b000000ffff);
        put(kGdt + kData64, 0x00cf93000000ffff);
        put(kGdt + kTask, 0x0000'8b00'0000'0067 | kTss << 16);
        put(kGdt + kTask + 8, 0);
        for (u64 n = 0; n < 256; ++n) {
            u64 handler = kHandlers + 16 * n;
            put(kIdt + 16 * n, (handler & 0xffff) | u64{kCode64} << 16 | u64{0x8e00} << 32);
            put(kIdt + 16 * n + 8, 0);
            memory.store<u8>(Gpa(handler), 0xf4);
        }
    }

    void build_state() {
        state = reset_state(true);
        for (Segment& segment : state.segments) segment = {0, ~u32{0}, 0xc093, kData64};
        state.segments[kCs] = {0, ~u32{0}, 0xa09b, kCode64};
        state.tr = {kTss, 0x67, 0x8b, kTask};
        state.ldtr = {0, 0, 1 << 16, 0};
        state.gdtr = {kGdt, 0x27};
        state.idtr = {kIdt, 0xfff};
        state.cr0 = 0x80010031;
        state.cr3 = kPml4;
        state.cr4 = 0x620;
        state.msr.efer = 0x500;
        state.rip = kCode;
        state.gpr[kRsp] = kStack;
        state.gpr[kRax] = 0;
    }

    /// Runs `code` from `state` to a HLT.
    CpuState run(std::string_view code) {
        memory.write(Gpa(kCode), {reinterpret_cast<const u8*>(code.data()), code.size()});
        vcpu->restore(state);
        Exit exit = vcpu->run();
        if (exit.reason != ExitReason::kHalt) {
            fail(__FILE__, __LINE__,
                 std::string("ended with ") + to_string(exit.reason) + ": " + exit.text);
        }
        return vcpu->save();
    }

    /// The vector whose handler the CPU halted in; -1 elsewhere.
    static int vector_of(const CpuState& s) {
        u64 at = s.rip - 1 - kHandlers;
        return at < 0x1000 && at % 16 == 0 ? static_cast<int>(at / 16) : -1;
    }
    u64 pushed(unsigned n, const CpuState& s) { return memory.load<u64>(Gpa(s.gpr[kRsp] + 8 * n)); }
};

#define BYTES(text) std::string_view(text, sizeof(text) - 1)

constexpr std::string_view kMark = "\xb0\x01\xf4";  // mov $1, %al; hlt

void events(const std::shared_ptr<const kvm::System>& system) {
    using Kind = InFlightEvent::Kind;
    struct Case {
        InFlightEvent event;
        u64 rflags;
    };
    const Case cases[] = {
        {{Kind::kException, 13, true, 0, 0x1238}, 2},   {{Kind::kException, 14, true, 0, 2}, 2},
        {{Kind::kException, 6, false, 0, 0}, 2},        {{Kind::kException, 1, false, 0, 0}, 2},
        {{Kind::kInterrupt, 0x41, false, 0, 0}, 0x202}, {{Kind::kNmi, 2, false, 0, 0}, 2},
    };
    for (const Case& c : cases) {
        Machine m(system);
        m.state.event = c.event;
        m.state.rflags = c.rflags;
        m.state.cr2 = 0x12345678;
        m.state.dr6 = 0xffff4ff0;
        CpuState s = m.run(kMark);
        CHECK_EQ(Machine::vector_of(s), int{c.event.vector});
        CHECK_EQ(s.gpr[kRax], u64{0});  // no instruction ran before
        CHECK_EQ(s.cr2, u64{0x12345678});
        CHECK_EQ(s.dr6, u64{0xffff4ff0});
        CHECK_EQ(s.nmi_blocked, c.event.kind == Kind::kNmi);
        CHECK(s.event == InFlightEvent{});
        unsigned first = 0;
        if (c.event.has_error_code) CHECK_EQ(m.pushed(first++, s), u64{c.event.error_code});
        CHECK_EQ(m.pushed(first, s), kCode);
    }
}

// KVM cannot be told of them; RIP is at the instruction.
void software_events(const std::shared_ptr<const kvm::System>& system) {
    using Kind = InFlightEvent::Kind;
    Machine m(system);
    m.state.event = {.kind = Kind::kSoftwareInterrupt, .vector = 0x80, .length = 2};
    CpuState s = m.run(BYTES("\xcd\x80\xb0\x01\xf4"));
    CHECK_EQ(Machine::vector_of(s), 0x80);
    CHECK_EQ(m.pushed(0, s), kCode + 2);
    m.state.event = {.kind = Kind::kSoftwareException, .vector = 3, .length = 1};
    s = m.run(BYTES("\xcc\xb0\x01\xf4"));
    CHECK_EQ(Machine::vector_of(s), 3);
    CHECK_EQ(m.pushed(0, s), kCode + 1);
}

// The page tables of a restored state may be others at the same address.
void translations(const std::shared_ptr<const kvm::System>& system) {
    Machine m(system);
    m.put(kPt, 0x60003);
    m.put(0x60000, 1);
    m.put(0x61000, 2);
    const auto code = BYTES("\x8b\x04\x25\x00\x00\x20\x00\xf4");  // mov 0x200000, %eax; hlt
    static_assert(kPages == 0x200000);
    CHECK_EQ(m.run(code).gpr[kRax], u64{1});
    m.put(kPt, 0x61003);
    CHECK_EQ(m.run(code).gpr[kRax], u64{2});
}

}  // namespace

int main() {
    std::shared_ptr<const kvm::System> system;
    try {
        system = std::make_shared<kvm::System>();
    } catch (const EngineUnavailable& error) {
        std::printf("%s\n", error.what());
        return kSkipped;
    }
    events(system);
    if (hardware()) {
        software_events(system);
    } else {
        std::printf("this host's KVM does not emulate INT n\n");
    }
    translations(system);
    return finish("test_cpu_state_run");
}
