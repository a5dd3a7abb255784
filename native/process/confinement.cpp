// The filter is a program for the kernel's classic BPF, written out here: a comparison per system
// call, and for some a look at one argument. That is the whole of what a library would be for.
#include "process/confinement.hpp"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <initializer_list>
#include <vector>

#include "base/error.hpp"
#include "base/types.hpp"
#include "process/pagemap.hpp"

namespace polyvisor::process {

namespace {

constexpr u32 kAllow = SECCOMP_RET_ALLOW;
constexpr u32 kRefuse = SECCOMP_RET_ERRNO | kRefused;

// Without a condition.
constexpr int kCalls[] = {
    // What is done with what is open.
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_preadv2,
    SYS_pwritev2,
    SYS_close,
    SYS_lseek,
    SYS_fstat,
    SYS_fstatfs,
    SYS_getdents64,
    SYS_fsync,
    SYS_fdatasync,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_flock,
    SYS_dup,
    SYS_dup3,
    SYS_sendfile,
    SYS_copy_file_range,
    SYS_splice,
    SYS_tee,
    SYS_fchmod,
    SYS_fchown,
    SYS_fadvise64,
    SYS_sync_file_range,
    SYS_fgetxattr,
    SYS_flistxattr,
    // The tree of files, which is walked by descriptors.
    SYS_openat,
    SYS_newfstatat,
    SYS_statx,
    SYS_readlinkat,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_mkdirat,
    SYS_unlinkat,
    SYS_renameat,
    SYS_renameat2,
    SYS_linkat,
    SYS_symlinkat,
    SYS_chmod,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_utimensat,
    // Waiting, and telling others.
    SYS_poll,
    SYS_ppoll,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_pipe2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_timerfd_gettime,
    SYS_futex,
    SYS_nanosleep,
    SYS_clock_nanosleep,
    SYS_restart_syscall,
    SYS_sched_yield,
    // Memory: that of programs, malloc()'s, and of files.
    SYS_munmap,
    SYS_madvise,
    SYS_msync,
    SYS_brk,
    SYS_memfd_create,
    SYS_mincore,
    SYS_membarrier,
    // Time, randomness, and what a thread knows of itself.
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_gettimeofday,
    SYS_time,
    SYS_getrandom,
    SYS_getpid,
    SYS_gettid,
    SYS_getuid,
    SYS_getgid,
    SYS_getrusage,
    SYS_times,
    SYS_sysinfo,
    SYS_sched_getaffinity,
    SYS_getcpu,
    // How threads begin and end, and are interrupted.
    SYS_set_robust_list,
    SYS_rseq,
    SYS_set_tid_address,
    SYS_rt_sigprocmask,
    SYS_rt_sigaction,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_exit,
    // Sockets that are there already: standard input may be one, and socketpair() leads nowhere.
    SYS_socketpair,
    SYS_sendto,
    SYS_recvfrom,
    SYS_sendmsg,
    SYS_recvmsg,
    SYS_sendmmsg,
    SYS_recvmmsg,
    SYS_shutdown,
    SYS_getsockname,
    SYS_getpeername,
    SYS_getsockopt,
    SYS_setsockopt,
};
constexpr int kNetwork[] = {SYS_connect, SYS_bind, SYS_listen, SYS_accept, SYS_accept4};

class Filter {
  public:
    explicit Filter(const Confinement& confinement);
    std::vector<sock_filter>& program() { return program_; }

  private:
    void emit(u16 code, u32 value, u8 if_true = 0, u8 if_false = 0) {
        program_.push_back({code, if_true, if_false, value});
    }
    void load(std::size_t offset) { emit(BPF_LD | BPF_W | BPF_ABS, static_cast<u32>(offset)); }
    void allow(int number) { decide(number, kAllow); }
    void decide(int number, u32 action) {
        emit(BPF_JMP | BPF_JEQ | BPF_K, static_cast<u32>(number), 0, 1);
        emit(BPF_RET | BPF_K, action);
    }
    /// When `argument` is one of `values`, as far as `mask` goes. (The low half: all of these are
    /// 32 bits wide for the kernel, too, or have their flags there.)
    void allow_if(int number, unsigned argument, u32 mask, std::initializer_list<u32> values) {
        const std::size_t size = 3 + 2 * values.size();
        emit(BPF_JMP | BPF_JEQ | BPF_K, static_cast<u32>(number), 0, static_cast<u8>(size));
        load(offsetof(seccomp_data, args) + 8 * argument);
        emit(BPF_ALU | BPF_AND | BPF_K, mask);
        for (u32 value : values) decide(static_cast<int>(value), kAllow);
        emit(BPF_RET | BPF_K, kRefuse);
    }

    std::vector<sock_filter> program_;
};

Filter::Filter(const Confinement& confinement) {
    constexpr u32 kAll = ~u32{0}, kX32 = 0x4000'0000;
    const u32 self = static_cast<u32>(::getpid());
    load(offsetof(seccomp_data, arch));
    emit(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    emit(BPF_RET | BPF_K, kRefuse);
    load(offsetof(seccomp_data, nr));
    emit(BPF_JMP | BPF_JGE | BPF_K, kX32, 0, 1);
    emit(BPF_RET | BPF_K, kRefuse);
    // All of KVM's requests have this type; the others say what a terminal is, and a pipe holds.
    constexpr u32 kType = 0xff00, kKvmType = 0xae00;
    if (confinement.kvm) {
        emit(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 5);
        load(offsetof(seccomp_data, args) + 8);
        emit(BPF_ALU | BPF_AND | BPF_K, kType);
        emit(BPF_JMP | BPF_JEQ | BPF_K, kKvmType, 0, 1);
        emit(BPF_RET | BPF_K, kAllow);
        load(offsetof(seccomp_data, nr));
    }
    for (int number : kCalls) allow(number);
    allow_if(SYS_ioctl, 1, kAll, {TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, kPagemapScan});
    // Devices are not made.
    allow_if(SYS_mknodat, 2, S_IFMT, {S_IFIFO, S_IFSOCK});
    allow_if(SYS_fcntl, 1, kAll,
             {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK,
              F_SETLKW, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW, F_ADD_SEALS, F_GET_SEALS,
              F_GETPIPE_SZ, F_SETPIPE_SZ});
    // No new code.
    allow_if(SYS_mmap, 2, PROT_EXEC, {0});
    allow_if(SYS_mprotect, 2, PROT_EXEC, {0});
    // (mremap() keeps the rights.)
    allow(SYS_mremap);
    // Threads, and no processes. clone3()'s flags cannot be seen; without it glibc takes clone().
    allow_if(SYS_clone, 0, CLONE_THREAD, {CLONE_THREAD});
    decide(SYS_clone3, SECCOMP_RET_ERRNO | ENOSYS);
    // This process alone: interrupting a vCPU, and copying what a file may have lost.
    allow_if(SYS_tgkill, 0, kAll, {self});
    allow_if(SYS_process_vm_readv, 0, kAll, {self});
    allow_if(SYS_prctl, 0, kAll, {PR_SET_NAME});
    if (confinement.network) {
        allow_if(SYS_socket, 0, kAll, {AF_UNIX, AF_INET, AF_INET6});
        for (int number : kNetwork) allow(number);
    }
    emit(BPF_RET | BPF_K, kRefuse);
}

// Nobody needs its parent: whether it is refused tells whether there is a filter already.
bool is_confined() {
    return ::syscall(SYS_getppid) < 0 && errno == kRefused;
}

}  // namespace

void confine_this_thread(const Confinement& confinement) {
    if (is_confined()) return;
    Filter filter(confinement);
    const sock_fprog program{static_cast<unsigned short>(filter.program().size()),
                             filter.program().data()};
    int error = 0;
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) error = errno;
    // The monitor is nobody's prisoner in that sense: no slow-down against speculation.
    for (unsigned flags : {SECCOMP_FILTER_FLAG_SPEC_ALLOW, 0ul}) {
        if (error != 0) break;
        if (::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program) == 0) return;
        if (errno != EINVAL || flags == 0) error = errno;
    }
    throw HostError(
        error, "",
        "this host does not let a thread give up system calls (seccomp), which confines "
        "what a process VM's monitor can do; pass confine=False to do without");
}

}  // namespace polyvisor::process
