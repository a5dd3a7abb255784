#include "kvm/msr_filter.hpp"

#include "kvm/ioctl.hpp"
#include "kvm/vm.hpp"

namespace polyvisor::kvm {

namespace {

constexpr u32 kApicBase = 0x1b, kTscDeadline = 0x6e0;

// Performance counters are not part of the State, and no CPUID leaf tells of any; AMD's guests
// would try the oldest of them all the same. Best effort: kernels before 5.18 keep them.
void hide_counters(Vm& vm) {
    if ((vm.check(KVM_CAP_PMU_CAPABILITY) & KVM_PMU_CAP_DISABLE) == 0) return;
    kvm_enable_cap cap{};
    cap.cap = KVM_CAP_PMU_CAPABILITY;
    cap.args[0] = KVM_PMU_CAP_DISABLE;
    try_ioctl(vm.fd(), KVM_ENABLE_CAP, &cap);
}

}  // namespace

// KVM answers most MSRs itself. Of the rest,
//   * UNKNOWN ones come here to be logged with their value: the guest gets #GP all the same, but
//     people can tell why;
//   * in mode kUser, the base of the local APIC and the deadline timer are filtered, since KVM
//     would keep the one and ignore the other; the x2APIC's registers cannot be filtered, but KVM
//     finds them INVALID as long as it has no local APIC, and that comes here as well.
// INVAL is not asked for in the other modes: there it means that the guest wrote a reserved bit,
// which has nothing to tell but #GP.
void install_msr_filter(Vm& vm) {
    hide_counters(vm);
    bool user = vm.irqchip() == IrqchipMode::kUser;
    if (vm.check(KVM_CAP_X86_USER_SPACE_MSR) == 0 ||
        (user && vm.check(KVM_CAP_X86_MSR_FILTER) == 0)) {
        if (!user) return;  // only the log is poorer
        throw EngineUnavailable("kvm", "version",
                                "interrupt chips in user space need KVM's MSR filter, which came "
                                "with Linux 5.10; give irqchip kernel, or take engine soft");
    }
    kvm_enable_cap cap{};
    cap.cap = KVM_CAP_X86_USER_SPACE_MSR;
    cap.args[0] = KVM_MSR_EXIT_REASON_UNKNOWN;
    if (user) cap.args[0] |= KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_FILTER;
    call_ioctl(vm.fd(), KVM_ENABLE_CAP, &cap);
    if (!user) return;

    // A bit of a map says that KVM is to handle the MSR. One range per MSR, so that all others keep
    // the kernel's fast way.
    u8 refuse = 0;
    kvm_msr_filter filter{};
    filter.flags = KVM_MSR_FILTER_DEFAULT_ALLOW;
    unsigned count = 0;
    for (u32 msr : {kApicBase, kTscDeadline}) {
        kvm_msr_filter_range& range = filter.ranges[count++];
        range.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
        range.nmsrs = 1;
        range.base = msr;
        range.bitmap = &refuse;
    }
    call_ioctl(vm.fd(), KVM_X86_SET_MSR_FILTER, &filter);
}

}  // namespace polyvisor::kvm
