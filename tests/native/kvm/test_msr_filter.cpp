// Which MSR accesses leave the guest, and why, in each mode: a guest in real mode makes one of each
// kind, on a bare vCPU.
#include <unistd.h>

#include <cstring>
#include <map>

#include "base/error.hpp"
#include "base/mapping.hpp"
#include "bus/clock.hpp"
#include "check.hpp"
#include "kvm/bus_hooks.hpp"
#include "kvm/chips.hpp"
#include "kvm/dirty_log.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/vm.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;

namespace {

constexpr u64 kCode = 0x1000;
constexpr u32 kRead = 0x32, kWrite = 0x30;  // the second byte of RDMSR and WRMSR
constexpr u16 kEnd = 0xf4;

struct Access {
    u32 kind, msr;
};

// mov ecx, msr; xor eax, eax; xor edx, edx; rdmsr or wrmsr; ...; out kEnd, al (in 16-bit code)
std::vector<u8> make_code(const std::vector<Access>& accesses) {
    std::vector<u8> code;
    for (const Access& access : accesses) {
        code.insert(code.end(), {0x66, 0xb9});
        for (int shift = 0; shift < 32; shift += 8) {
            code.push_back(static_cast<u8>(access.msr >> shift));
        }
        code.insert(code.end(),
                    {0x66, 0x31, 0xc0, 0x66, 0x31, 0xd2, 0x0f, static_cast<u8>(access.kind)});
    }
    code.insert(code.end(), {0xe6, kEnd});
    return code;
}

/// Reasons of KVM's exits by MSR; -1: something else ended the guest.
std::map<u32, int> run(IrqchipMode mode, const std::vector<Access>& accesses) {
    GuestMemory memory;
    memory.add(Gpa(0), 0x4000, "ram");
    memory.write(Gpa(kCode), make_code(accesses));
    Bus pio("pio", 0x10000), mmio("mmio", bit(52));
    Clock clock;
    auto system = std::make_shared<const System>();
    EngineConfig config{memory, pio, mmio, clock, {}};
    config.irqchip = mode;
    Vm vm(system, config);
    vm.memslots().sync();
    OwnedFd vcpu(call_ioctl(vm.fd(), KVM_CREATE_VCPU, 0L));
    Mapping mapping(vcpu.get(), 0, system->vcpu_mmap_size());
    auto& shared = *reinterpret_cast<kvm_run*>(mapping.data());
    kvm_sregs sregs{};
    call_ioctl(vcpu.get(), KVM_GET_SREGS, &sregs);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    call_ioctl(vcpu.get(), KVM_SET_SREGS, &sregs);
    kvm_regs regs{};
    regs.rip = kCode;
    regs.rflags = 2;
    call_ioctl(vcpu.get(), KVM_SET_REGS, &regs);

    std::map<u32, int> exits;
    for (unsigned n = 0; n <= accesses.size(); ++n) {
        CHECK_EQ(try_ioctl(vcpu.get(), KVM_RUN, 0L), 0);
        u32 reason = shared.exit_reason;
        if (reason == KVM_EXIT_X86_RDMSR || reason == KVM_EXIT_X86_WRMSR) {
            exits[shared.msr.index] = static_cast<int>(shared.msr.reason);
            shared.msr.data = 0;
            shared.msr.error = 0;
            continue;
        }
        if (reason != KVM_EXIT_IO || shared.io.port != kEnd) exits[reason] = -1;
        break;
    }
    return exits;
}

}  // namespace

int main() {
    if (::access("/dev/kvm", R_OK | W_OK) != 0) {
        std::puts("no /dev/kvm that this user can open");
        return 77;
    }
    const Access known{kRead, 0x174}, unknown{kRead, 0x4711}, unknown_too{kWrite, 0x4712};
    const Access base{kRead, 0x1b}, deadline{kWrite, 0x6e0};
    for (IrqchipMode mode : {IrqchipMode::kKernel, IrqchipMode::kSplit}) {
        std::map<u32, int> exits = run(mode, {known, base, deadline, unknown, unknown_too});
        CHECK_EQ(exits.size(), 2u);
        CHECK_EQ(exits[0x4711], KVM_MSR_EXIT_REASON_UNKNOWN);
        CHECK_EQ(exits[0x4712], KVM_MSR_EXIT_REASON_UNKNOWN);
    }
    // Our own local APIC's: the x2APIC's registers cannot be filtered, but are invalid to a KVM
    // that has no local APIC.
    const Access x2apic_id{kRead, 0x802}, self_ipi{kWrite, 0x83f};
    std::map<u32, int> exits =
        run(IrqchipMode::kUser, {known, base, deadline, x2apic_id, self_ipi, unknown});
    CHECK_EQ(exits.size(), 5u);
    CHECK_EQ(exits[0x1b], KVM_MSR_EXIT_REASON_FILTER);
    CHECK_EQ(exits[0x6e0], KVM_MSR_EXIT_REASON_FILTER);
    CHECK_EQ(exits[0x802], KVM_MSR_EXIT_REASON_INVAL);
    CHECK_EQ(exits[0x83f], KVM_MSR_EXIT_REASON_INVAL);
    CHECK_EQ(exits[0x4711], KVM_MSR_EXIT_REASON_UNKNOWN);
    return pvtest::finish("test_msr_filter");
}
