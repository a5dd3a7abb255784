/* The system call filters as native/host/seccomp has made them while polyvisor was built. */
    .section .rodata
    .globl pv_filter_default, pv_filter_default_end, pv_filter_system, pv_filter_system_end
    .balign 8
pv_filter_default:
    .incbin PV_FILTER_DEFAULT
pv_filter_default_end:
    .balign 8
pv_filter_system:
    .incbin PV_FILTER_SYSTEM
pv_filter_system_end:
    .section .note.GNU-stack, "", @progbits
