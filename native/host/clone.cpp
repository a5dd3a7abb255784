#include "host/clone.hpp"

#include <linux/capability.h>
#include <linux/sched.h>
#include <sys/prctl.h>

#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"
#include "host/init/sys.hpp"
#include "host/init_image.hpp"
#include "host/wire.hpp"

namespace polyvisor::host {

namespace {

using init::sys;

constexpr int kSigSetMask = 2, kEmptyPath = 0x1000, kFailed = 125;
constexpr int kImageFd = kControlFd + 1;

/// What the child needs; `error` is its answer, in the memory that it shares with its parent.
struct Child {
    int fds[kImageFd + 1];
    bool user_namespace;
    volatile long error;
};

/// execve() takes the capabilities from who is not the namespace's root, and nobody is that before
/// there is a map of ids; but not the ambient ones.
void make_capabilities_ambient() {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    sys(__NR_capget, &header, data);
    for (auto& word : data) word.inheritable = word.permitted;
    sys(__NR_capset, &header, data);
    for (int i = 0; sys(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0) == 0; ++i) {
    }
}

/// Runs in the parent's memory while the parent's thread stands still: only system calls.
__attribute__((noreturn)) void run_child(Child* child) {
    if (child->user_namespace) make_capabilities_ambient();
    // Out of the way of their places first.
    for (int& fd : child->fds) fd = static_cast<int>(sys(__NR_fcntl, fd, F_DUPFD, kImageFd + 1));
    for (int i = 0; i <= kImageFd; ++i) {
        const long result = sys(__NR_dup3, child->fds[i], i, i == kImageFd ? O_CLOEXEC : 0);
        if (result < 0) child->error = result;
    }
    sys(init::kSysCloseRange, kImageFd + 1, ~0u, 0);
    const char* const arguments[] = {"polyvisor-init", nullptr};
    const char* const environment[] = {nullptr};
    if (child->error == 0) {
        child->error = sys(__NR_execveat, kImageFd, "", arguments, environment, kEmptyPath);
    }
    for (;;) sys(__NR_exit_group, kFailed);
}

}  // namespace

Born clone_init(u64 namespaces, int cgroup, const int (&standard)[3], int control) {
    Child child{{standard[0], standard[1], standard[2], control, init_image()},
                (namespaces & CLONE_NEWUSER) != 0,
                0};
    alignas(16) u8 stack[16 * 1024];
    int pidfd = -1;
    clone_args arguments{};
    arguments.flags = namespaces | CLONE_VM | CLONE_VFORK | CLONE_PIDFD;
    arguments.pidfd = reinterpret_cast<u64>(&pidfd);
    // No SIGCHLD, so that no other part of this process is told of, and reaps, what is not its own.
    arguments.exit_signal = 0;
    arguments.stack = reinterpret_cast<u64>(stack);
    arguments.stack_size = sizeof stack;
    if (cgroup >= 0) {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = static_cast<u64>(cgroup);
    }
    const u64 all = ~u64{0};
    u64 before = 0;
    sys(__NR_rt_sigprocmask, kSigSetMask, &all, &before, sizeof all);
    long pid;
    __asm__ volatile(
        "syscall\n\t"
        "test %%rax, %%rax\n\t"
        "jnz 1f\n\t"
        "mov %[child], %%rdi\n\t"
        "call *%[function]\n\t"
        "hlt\n"
        "1:"
        : "=a"(pid)
        : "a"(__NR_clone3), "D"(&arguments),
          "S"(sizeof arguments), [child] "r"(&child), [function] "r"(&run_child)
        : "rcx", "r11", "memory");
    sys(__NR_rt_sigprocmask, kSigSetMask, &before, nullptr, sizeof before);
    if (pid < 0) {
        errno = static_cast<int>(-pid);
        throw_errno("the kernel makes no process in new namespaces");
    }
    const Born born{static_cast<int>(pid), pidfd};
    if (child.error != 0) {
        int status;
        sys(__NR_wait4, pid, &status, 0x40000000 /* __WALL */, nullptr);
        ::close(pidfd);
        errno = static_cast<int>(-child.error);
        throw_errno("the init program of a sandbox cannot be executed");
    }
    return born;
}

}  // namespace polyvisor::host
