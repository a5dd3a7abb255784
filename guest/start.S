// The entry point: argc, argv and the environment of init are of no use here.
        .globl _start
        .text
_start:
#ifdef __x86_64__
        xorl %ebp, %ebp
        andq $-16, %rsp
        call init_main
#else
        xorl %ebp, %ebp
        andl $-16, %esp
        call init_main
#endif
        hlt
        .section .note.GNU-stack, "", @progbits
