// A vCPU's state set and read back, on a real KVM: exact, field by field, for random valid states
// of every mode, with KVM's local APIC and with ours; and states that are refused, by us or by KVM
// at any step, leave the vCPU as it was.
#include <cstdio>
#include <memory>
#include <utility>

#include "base/error.hpp"
#include "check.hpp"
#include "kvm/compare_state.hpp"
#include "kvm/engine.hpp"
#include "kvm/fake_ioctl.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/lone_vcpu.hpp"
#include "kvm/random_state.hpp"

using namespace polyvisor;
using namespace pvtest;

namespace {

constexpr int kSkipped = 77;
constexpr u64 kRam = 1 << 20;

struct Machine {
    GuestMemory memory;
    Bus pio{"pio", 0x10000}, mmio{"mmio", bit(52)};
    Clock clock;
    NoInterrupts interrupts;
    CpuidPolicy policy;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Vcpu> vcpu;

    Machine(std::shared_ptr<const kvm::System> system, IrqchipMode mode,
            std::initializer_list<Feature> without = {}) {
        memory.add(Gpa(0), kRam, "ram");
        EngineOffer offer = kvm::make_offer(*system);
        for (Feature feature : without) offer.features.set(feature, false);
        CpuidOptions options;
        options.physical_bits = offer.physical_bits;
        options.arch_capabilities = offer.arch_capabilities;
        clock.set_tsc_khz(offer.native_tsc_khz);
        policy = make_cpuid_policy("host", offer.features, 1, offer.native_tsc_khz, options);
        EngineConfig config{memory, pio, mmio, clock, policy};
        config.irqchip = mode;
        engine = kvm::create_engine(system, config);
        vcpu = engine->create_vcpu(0, mode == IrqchipMode::kKernel ? nullptr : &interrupts);
    }
};

/// KVMs without hardware have neither virtual-8086 mode nor paging outside IA-32e mode, and have to
/// be refused by name.
bool may_lack(const CpuState& state, const StateError& error) {
    const bool vm86 = state.rflags & bit(17);
    const bool paged32 = (state.cr0 & bit(31)) && !(state.msr.efer & bit(10));
    return !hardware() && ((error.field == "rflags" && vm86) || (error.field == "cr0" && paged32));
}

void round_trips(const std::shared_ptr<const kvm::System>& system, IrqchipMode irqchip) {
    Machine machine(system, irqchip);
    const u64 rounds = environment_number("PV_STATES", 200);
    const u64 seed = environment_number("PV_SEED", 1);
    StateGenerator generator({machine.policy, kRam}, seed);
    CpuState last = machine.vcpu->save();
    u64 lacking = 0;
    for (u64 round = 0; round < rounds; ++round) {
        for (CpuMode mode : kCpuModes) {
            CpuState state = generator.next(mode);
            try {
                machine.vcpu->restore(state);
                last = state;
                // A state that was read can always be set again.
                std::string text = differences(machine.vcpu->save(), state);
                machine.vcpu->restore(machine.vcpu->save());
                text += differences(machine.vcpu->save(), state);
                if (!text.empty()) text = std::string(name_of(mode)) + " mode, has " + text;
                CHECK_EQ(text, std::string());
            } catch (const StateError& error) {
                CHECK_EQ(may_lack(state, error) ? "" : error.what(), std::string());
                CHECK_EQ(differences(machine.vcpu->save(), last), std::string());
                ++lacking;
            }
        }
    }
    if (lacking != 0) {
        std::printf("%llu of %llu states are of modes that this host's KVM lacks\n",
                    static_cast<unsigned long long>(lacking),
                    static_cast<unsigned long long>(rounds * std::size(kCpuModes)));
    }
    CHECK(lacking < rounds * std::size(kCpuModes) / 2);
}

void reset_states(const std::shared_ptr<const kvm::System>& system, IrqchipMode irqchip) {
    Machine machine(system, irqchip);
    for (bool bootstrap : {false, true}) {
        CpuState state = reset_state(bootstrap);
        machine.vcpu->restore(state);
        CHECK_EQ(differences(machine.vcpu->save(), state), std::string());
    }
}

// Halted at the reset vector: KVM makes CPU 0 runnable there, which must not win.
void halted_at_reset(const std::shared_ptr<const kvm::System>& system) {
    Machine machine(system, IrqchipMode::kKernel);
    CpuState state = reset_state(true);
    machine.vcpu->restore(state);
    state.activity = Activity::kHalted;
    machine.vcpu->restore(state);
    CHECK_EQ(machine.vcpu->save().activity, Activity::kHalted);
}

template <class Change>
void refuses(Machine& machine, const char* field, Change change) {
    StateGenerator generator({machine.policy, kRam}, 7);
    const CpuState before = generator.next(CpuMode::kLong);
    machine.vcpu->restore(before);
    CpuState bad = generator.next(CpuMode::kCompat);
    change(bad);
    try {
        machine.vcpu->restore(bad);
        pvtest::fail(__FILE__, __LINE__, std::string("took a bad ") + field);
    } catch (const StateError& error) {
        CHECK_EQ(error.field, std::string(field));
        CHECK(std::string(error.what()).find("CPU state") == 0);
    }
    fake_answers.clear();
    CHECK_EQ(differences(machine.vcpu->save(), before), std::string());
}

void refusals(const std::shared_ptr<const kvm::System>& system) {
    Machine machine(system, IrqchipMode::kUser, {Feature::kSmap, Feature::kAvx});
    refuses(machine, "rflags", [](CpuState& s) { s.rflags = 0; });
    refuses(machine, "cr4", [](CpuState& s) { s.cr4 |= bit(21); });
    refuses(machine, "fpu", [](CpuState& s) { s.fpu.ymm_high[15][15] = 1; });
    refuses(machine, "xcr0", [](CpuState& s) { s.xcr0 = 7; });
    refuses(machine, "msr.mtrr_variable",
            [&](CpuState& s) { s.msr.mtrr_variable[3] = bit(machine.policy.physical_bits); });
    refuses(machine, "event",
            [](CpuState& s) { s.event = {.kind = InFlightEvent::Kind::kException, .vector = 33}; });
}

/// The next `request` that is made fails, later ones are the kernel's again.
void fail_once(unsigned long request, int error) {
    fake_answers[request] = [=, first = true](int fd, void* argument) mutable -> long {
        return std::exchange(first, false) ? -error : kernel_ioctl(fd, request, argument);
    };
}

// KVM refuses each part in turn, after it has taken those before.
void refused_by_kvm(const std::shared_ptr<const kvm::System>& system) {
    Machine machine(system, IrqchipMode::kKernel);
    struct Case {
        unsigned long request;
        const char* field;
    };
    const Case cases[] = {
        {KVM_SET_SREGS, "sregs"},  {KVM_SET_REGS, "regs"},         {KVM_SET_XSAVE, "fpu"},
        {KVM_SET_DEBUGREGS, "dr"}, {KVM_SET_VCPU_EVENTS, "event"}, {KVM_SET_MP_STATE, "activity"},
    };
    for (const Case& c : cases) {
        refuses(machine, c.field, [&](CpuState&) { fail_once(c.request, EINVAL); });
    }
    // MSRs: all but the last four are set.
    refuses(machine, "msr.mtrr_variable", [&](CpuState&) {
        fake_answers[KVM_SET_MSRS] = [first = true](int fd, void* argument) mutable -> long {
            if (!std::exchange(first, false)) return kernel_ioctl(fd, KVM_SET_MSRS, argument);
            static_cast<kvm_msrs*>(argument)->nmsrs -= 4;
            return kernel_ioctl(fd, KVM_SET_MSRS, argument);
        };
    });
    // A mode that is taken, but not kept.
    refuses(machine, "cr4", [&](CpuState& s) {
        s.cr4 |= bit(7);
        fake_answers[KVM_SET_SREGS] = [first = true](int fd, void* argument) mutable -> long {
            auto* sregs = static_cast<kvm_sregs*>(argument);
            if (std::exchange(first, false)) sregs->cr4 &= ~bit(7);
            return kernel_ioctl(fd, KVM_SET_SREGS, argument);
        };
    });
}

// What is nobody's mistake is the host's error, and names the request.
void host_errors(const std::shared_ptr<const kvm::System>& system) {
    Machine machine(system, IrqchipMode::kUser);
    const CpuState before = machine.vcpu->save();
    for (unsigned long request : {KVM_GET_SREGS, KVM_SET_XSAVE}) {
        fail_once(request, ENOMEM);
        try {
            machine.vcpu->restore(before);
            pvtest::fail(__FILE__, __LINE__, "no error");
        } catch (const HostError& error) {
            CHECK_EQ(error.code, ENOMEM);
            CHECK(std::string(error.what()).find(kvm::request_name(request)) == 0);
        }
        fake_answers.clear();
        CHECK_EQ(differences(machine.vcpu->save(), before), std::string());
    }
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
    for (IrqchipMode mode : {IrqchipMode::kUser, IrqchipMode::kSplit, IrqchipMode::kKernel}) {
        reset_states(system, mode);
        round_trips(system, mode);
    }
    halted_at_reset(system);
    refusals(system);
    refused_by_kvm(system);
    host_errors(system);
    return pvtest::finish("test_cpu_state");
}
