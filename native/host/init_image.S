/* The init program as CMake has built it. */
    .section .rodata
    .globl pv_init_start, pv_init_end
    .balign 64
pv_init_start:
    .incbin PV_INIT
pv_init_end:
    .section .note.GNU-stack, "", @progbits
