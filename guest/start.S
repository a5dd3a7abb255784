// The entry point: argc, argv and the environment are of no use here.
        .globl _start
        .text
_start:
#ifdef __x86_64__
        xorl %ebp, %ebp
        andq $-16, %rsp
        call program_main
#else
        xorl %ebp, %ebp
        andl $-16, %esp
        call program_main
#endif
        hlt
        .section .note.GNU-stack, "", @progbits
