#include "kvm/exit_names.hpp"

#include "kvm/abi.hpp"

namespace polyvisor::kvm {

// Only what x86 hosts give. The numbers at the end are of kernels later than the oldest
// <linux/kvm.h> that polyvisor is built with.
const char* exit_name(u32 kvm_exit_reason) {
    switch (kvm_exit_reason) {
        case KVM_EXIT_UNKNOWN:
            return "unknown";
        case KVM_EXIT_EXCEPTION:
            return "exception";
        case KVM_EXIT_IO:
            return "io";
        case KVM_EXIT_HYPERCALL:
            return "hypercall";
        case KVM_EXIT_DEBUG:
            return "debug";
        case KVM_EXIT_HLT:
            return "hlt";
        case KVM_EXIT_MMIO:
            return "mmio";
        case KVM_EXIT_IRQ_WINDOW_OPEN:
            return "irq_window_open";
        case KVM_EXIT_SHUTDOWN:
            return "shutdown";
        case KVM_EXIT_FAIL_ENTRY:
            return "fail_entry";
        case KVM_EXIT_INTR:
            return "intr";
        case KVM_EXIT_SET_TPR:
            return "set_tpr";
        case KVM_EXIT_TPR_ACCESS:
            return "tpr_access";
        case KVM_EXIT_NMI:
            return "nmi";
        case KVM_EXIT_INTERNAL_ERROR:
            return "internal_error";
        case KVM_EXIT_WATCHDOG:
            return "watchdog";
        case KVM_EXIT_SYSTEM_EVENT:
            return "system_event";
        case KVM_EXIT_IOAPIC_EOI:
            return "ioapic_eoi";
        case KVM_EXIT_HYPERV:
            return "hyperv";
        case KVM_EXIT_X86_RDMSR:
            return "rdmsr";
        case KVM_EXIT_X86_WRMSR:
            return "wrmsr";
        case KVM_EXIT_DIRTY_RING_FULL:
            return "dirty_ring_full";
        case KVM_EXIT_AP_RESET_HOLD:
            return "ap_reset_hold";
        case KVM_EXIT_X86_BUS_LOCK:
            return "bus_lock";
        case KVM_EXIT_XEN:
            return "xen";
        case 37:
            return "notify";
        case 39:
            return "memory_fault";
        case 40:
            return "tdx";
        default:
            return "other";
    }
}

}  // namespace polyvisor::kvm
