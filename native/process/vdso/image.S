/* The vDSO as CMake has built it, for the loader. */
    .section .rodata
    .globl pv_vdso_start, pv_vdso_end
    .balign 64
pv_vdso_start:
    .incbin PV_VDSO
pv_vdso_end:
    .section .note.GNU-stack, "", @progbits
