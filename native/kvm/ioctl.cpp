#include "kvm/ioctl.hpp"

#include <cstdio>
#include <cstring>

namespace polyvisor::kvm {

namespace {

struct Row {
    unsigned long request;
    const char* name;
};

#define PV_ROW(request) {request, #request}
constexpr Row kRows[] = {
    PV_ROW(KVM_GET_API_VERSION),
    PV_ROW(KVM_CREATE_VM),
    PV_ROW(KVM_CHECK_EXTENSION),
    PV_ROW(KVM_GET_VCPU_MMAP_SIZE),
    PV_ROW(KVM_GET_SUPPORTED_CPUID),
    PV_ROW(KVM_GET_MSR_INDEX_LIST),
    PV_ROW(KVM_GET_MSR_FEATURE_INDEX_LIST),
    PV_ROW(KVM_CREATE_VCPU),
    PV_ROW(KVM_SET_USER_MEMORY_REGION),
    PV_ROW(KVM_GET_DIRTY_LOG),
    PV_ROW(KVM_CLEAR_DIRTY_LOG),
    PV_ROW(KVM_RESET_DIRTY_RINGS),
    PV_ROW(KVM_SET_TSS_ADDR),
    PV_ROW(KVM_SET_IDENTITY_MAP_ADDR),
    PV_ROW(KVM_CREATE_IRQCHIP),
    PV_ROW(KVM_CREATE_PIT2),
    PV_ROW(KVM_IRQ_LINE),
    PV_ROW(KVM_GET_IRQCHIP),
    PV_ROW(KVM_SET_IRQCHIP),
    PV_ROW(KVM_GET_PIT2),
    PV_ROW(KVM_SET_PIT2),
    PV_ROW(KVM_SET_GSI_ROUTING),
    PV_ROW(KVM_IRQFD),
    PV_ROW(KVM_IOEVENTFD),
    PV_ROW(KVM_SIGNAL_MSI),
    PV_ROW(KVM_REGISTER_COALESCED_MMIO),
    PV_ROW(KVM_UNREGISTER_COALESCED_MMIO),
    PV_ROW(KVM_SET_CLOCK),
    PV_ROW(KVM_GET_CLOCK),
    PV_ROW(KVM_ENABLE_CAP),
    PV_ROW(KVM_X86_SET_MSR_FILTER),
    PV_ROW(KVM_RUN),
    PV_ROW(KVM_GET_REGS),
    PV_ROW(KVM_SET_REGS),
    PV_ROW(KVM_GET_SREGS),
    PV_ROW(KVM_SET_SREGS),
    PV_ROW(KVM_TRANSLATE),
    PV_ROW(KVM_INTERRUPT),
    PV_ROW(KVM_NMI),
    PV_ROW(KVM_GET_MSRS),
    PV_ROW(KVM_SET_MSRS),
    PV_ROW(KVM_SET_CPUID2),
    PV_ROW(KVM_GET_CPUID2),
    PV_ROW(KVM_GET_LAPIC),
    PV_ROW(KVM_SET_LAPIC),
    PV_ROW(KVM_GET_MP_STATE),
    PV_ROW(KVM_SET_MP_STATE),
    PV_ROW(KVM_GET_VCPU_EVENTS),
    PV_ROW(KVM_SET_VCPU_EVENTS),
    PV_ROW(KVM_GET_DEBUGREGS),
    PV_ROW(KVM_SET_DEBUGREGS),
    PV_ROW(KVM_GET_XSAVE),
    PV_ROW(KVM_GET_XSAVE2),
    PV_ROW(KVM_SET_XSAVE),
    PV_ROW(KVM_GET_XCRS),
    PV_ROW(KVM_SET_XCRS),
    PV_ROW(KVM_SET_TSC_KHZ),
    PV_ROW(KVM_GET_TSC_KHZ),
    PV_ROW(KVM_SET_GUEST_DEBUG),
    PV_ROW(KVM_X86_SETUP_MCE),
    PV_ROW(KVM_X86_GET_MCE_CAP_SUPPORTED),
    PV_ROW(KVM_GET_STATS_FD),
    PV_ROW(KVM_SET_DEVICE_ATTR),
    PV_ROW(KVM_GET_DEVICE_ATTR),
    PV_ROW(KVM_HAS_DEVICE_ATTR),
};
#undef PV_ROW

}  // namespace

std::string request_name(unsigned long request) {
    for (const Row& row : kRows) {
        if (row.request == request) return row.name;
    }
    char text[24];
    std::snprintf(text, sizeof text, "KVM ioctl %#lx", request);
    return text;
}

void throw_ioctl(unsigned long request, int error) {
    throw HostError(error, "/dev/kvm", request_name(request) + " failed");
}

}  // namespace polyvisor::kvm
