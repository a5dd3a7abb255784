// Calls everything with anything: system calls of all numbers, with pointers to nowhere, to the
// edges of the address space and of mappings, and with lengths that do not fit. Ends by saying so.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t state = 88172645463325252u;

static uint64_t random_word(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

// Its end, what would take its own ground away, what waits or is waited for, and what makes another
// that goes on with this loop.
static int is_left_out(long number) {
    static const long numbers[] = {
        SYS_exit,
        SYS_exit_group,
        SYS_kill,
        SYS_tkill,
        SYS_tgkill,
        SYS_rt_sigqueueinfo,
        SYS_rt_tgsigqueueinfo,
        SYS_pidfd_send_signal,
        SYS_alarm,
        SYS_setitimer,
        SYS_timer_create,
        SYS_munmap,
        SYS_mprotect,
        SYS_mremap,
        SYS_brk,
        SYS_arch_prctl,
        SYS_madvise,
        SYS_rt_sigreturn,
        SYS_rt_sigaction,
        SYS_shmat,
        SYS_shmdt,
        SYS_set_robust_list,
        SYS_set_tid_address,
        SYS_rseq,
        SYS_sigaltstack,
        SYS_dup2,
        SYS_dup3,
        SYS_close,
        SYS_close_range,
        SYS_pause,
        SYS_futex,
        SYS_futex_waitv,
        SYS_poll,
        SYS_ppoll,
        SYS_select,
        SYS_pselect6,
        SYS_epoll_wait,
        SYS_epoll_pwait,
        SYS_epoll_pwait2,
        SYS_nanosleep,
        SYS_clock_nanosleep,
        SYS_rt_sigsuspend,
        SYS_rt_sigtimedwait,
        SYS_wait4,
        SYS_waitid,
        SYS_accept,
        SYS_pipe,
        SYS_pipe2,
        SYS_socketpair,
        SYS_socket,
        SYS_eventfd,
        SYS_eventfd2,
        SYS_timerfd_create,
        SYS_signalfd,
        SYS_signalfd4,
        SYS_inotify_init,
        SYS_inotify_init1,
        SYS_flock,
        SYS_dup,
        SYS_fcntl,
        SYS_accept4,
        SYS_clone,
        SYS_clone3,
        SYS_fork,
        SYS_vfork,
    };
    for (unsigned n = 0; n < sizeof numbers / sizeof *numbers; ++n) {
        if (numbers[n] == number) return 1;
    }
    return 0;
}

int main(int argc, char** argv) {
    const long calls = argc > 1 ? atol(argv[1]) : 20000;
    char* pages = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(pages + 4096, 4096);
    mprotect(pages + 8192, 4096, PROT_READ);
    strcpy(pages, "/tmp/x");
    const uint64_t pointers[] = {
        0,
        1,
        (uint64_t)pages,
        (uint64_t)pages + 4095,  // the last byte before a hole
        (uint64_t)pages + 4096,
        (uint64_t)pages + 8192,
        (uint64_t)main,
        (uint64_t)pages + 256,
        0x7ffffffff000,
        0x7fffffffefff,
        0x800000000000,
        0xffff800000000000,
        0xffffffff80000000,  // what stands in for a kernel
        0xffffffff80003000,
        0xffffffffffffffff,
        0xfffffffffffff000,
    };
    const uint64_t numbers[] = {0,
                                1,
                                2,
                                3,
                                4,
                                8,
                                16,
                                100,
                                4095,
                                4096,
                                65536,
                                0x7fffffff,
                                0x80000000,
                                0xffffffff,
                                0x7fffffffffffffff,
                                0xffffffffffffff9c};
    for (long n = 0; n < calls; ++n) {
        const long number = random_word() % 460;
        if (is_left_out(number)) continue;
        uint64_t words[6];
        for (int i = 0; i < 6; ++i) {
            const uint64_t choice = random_word();
            words[i] = choice % 2 ? pointers[choice / 2 % 16] : numbers[choice / 2 % 16];
        }
        if (number == SYS_mmap) words[3] &= ~(uint64_t)(MAP_FIXED | MAP_FIXED_NOREPLACE);
        if ((number == SYS_read || number == SYS_write) && words[0] < 3) words[0] = 3;
        syscall(number, words[0], words[1], words[2], words[3], words[4], words[5]);
    }
    printf("still here\n");
    return 0;
}
