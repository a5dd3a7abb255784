// Whether INT3 exits work here, found out with a guest of two instructions.
#include <sys/ioctl.h>

#include <cstring>

#include "base/mapping.hpp"
#include "kvm/debug.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/system.hpp"

namespace polyvisor::kvm {

namespace {

// Real mode: INT3 at 0x800, whose handler is the HLT behind it.
bool measure(const System& system) {
    constexpr u64 kSize = 0x1000, kCode = 0x800, kStack = 0xc00;
    OwnedFd vm(call_ioctl(system.fd(), KVM_CREATE_VM, 0L));
    try_ioctl(vm.get(), KVM_SET_TSS_ADDR, 0xfffbd000UL);  // needed on Intel, harmless elsewhere
    Mapping memory(-1, 0, kSize);
    memory.data()[kCode] = 0xcc;
    memory.data()[kCode + 1] = 0xf4;
    const u8 handler[] = {(kCode + 1) & 0xff, (kCode + 1) >> 8, 0, 0};
    std::memcpy(memory.data() + 4 * 3, handler, sizeof handler);
    kvm_userspace_memory_region region{};
    region.memory_size = kSize;
    region.userspace_addr = reinterpret_cast<u64>(memory.data());
    call_ioctl(vm.get(), KVM_SET_USER_MEMORY_REGION, &region);

    OwnedFd vcpu(call_ioctl(vm.get(), KVM_CREATE_VCPU, 0L));
    Mapping shared(vcpu.get(), 0, system.vcpu_mmap_size());
    auto& run = *reinterpret_cast<kvm_run*>(shared.data());
    kvm_sregs sregs;
    call_ioctl(vcpu.get(), KVM_GET_SREGS, &sregs);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    call_ioctl(vcpu.get(), KVM_SET_SREGS, &sregs);
    kvm_regs regs{};
    regs.rip = kCode;
    regs.rsp = kStack;
    regs.rflags = 2;
    call_ioctl(vcpu.get(), KVM_SET_REGS, &regs);
    kvm_guest_debug debug{};
    debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
    if (try_ioctl(vcpu.get(), KVM_SET_GUEST_DEBUG, &debug) < 0) return false;
    for (int tries = 0; tries < 100; ++tries) {
        int result = ::ioctl(vcpu.get(), KVM_RUN, 0);
        if (result < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        return result == 0 && run.exit_reason == KVM_EXIT_DEBUG;
    }
    return false;
}

}  // namespace

bool int3_can_exit(const System& system) {
    static const bool works = measure(system);
    return works;
}

}  // namespace polyvisor::kvm
