// The first process in a sandbox or VPS, PID 1 there, and the one that enters a running one.
//
// The launcher (native/host/launch.cpp) executes this program, from a sealed file in memory, in new
// namespaces, with nothing but descriptors 0 to 3. It waits for the launcher's word, builds the
// root file system, drops what rights the program is not to have and executes the program, as
// itself or as its child. Then it reaps what loses its parent, passes signals on, and ends as the
// program does, with which the kernel ends whatever else is in the PID namespace.
//
// Being an executable of its own it has none of the launcher's memory and descriptors that
// something hostile in the namespaces could reach, and /proc/1/exe is a file that nobody can write
// to.
#include <asm/siginfo.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/signalfd.h>
#include <linux/wait.h>

#include "host/init/messages.hpp"
#include "host/init/network.hpp"
#include "host/init/program.hpp"
#include "host/init/report.hpp"
#include "host/init/sys.hpp"

namespace polyvisor::host::init {

namespace {

constexpr int kSigKill = 9, kSigTerm = 15, kSigChld = 17;

/// The calling thread alone moves, which needs none of the locks that moving another process does.
void join_cgroup(int directory) {
    constexpr const char* kFiles[] = {"tasks", "cgroup.procs"};  // version 1, version 2
    for (const char* name : kFiles) {
        const Fd file(sys(__NR_openat, directory, name, O_WRONLY | O_CLOEXEC));
        if (!file && file.error() == kEnoent) continue;
        check(file ? sys(__NR_write, file.get(), "0", 1) : -file.error(), "enter the cgroup's",
              name);
        return;
    }
    fail(-kEnoent, "enter the cgroup", nullptr);
}

void set_up(const Received& received) {
    const Message& message = received.message;
    const Wire& wire = message.wire();
    const bool attach = wire.flags & kAttach;
    const bool first_used = attach || (wire.flags & kHasRootMount);
    const int* cgroups = received.fds + (first_used ? 1 : 0);
    for (u32 i = 0; i < wire.cgroups; ++i) join_cgroup(cgroups[i]);
    if (attach) {
        // No longer readable by those inside: this process is the host's.
        check(sys(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0), "hide from the namespaces");
        check(sys(__NR_setns, received.fds[0], wire.namespaces), "enter the namespaces");
    } else if (wire.namespaces != 0) {
        check(sys(__NR_unshare, wire.namespaces), "make a namespace");
    }
    if (wire.flags & kUserNamespace) become_setup_user(wire);
    if (attach) return;
    if (const char* name = message.text(wire.hostname)) {
        check(sys(__NR_sethostname, name, length_of(name)), "set the host name", name);
    }
    if (wire.flags & kRaiseLoopback) raise_loopback();
    enter_root(message, (wire.flags & kHasRootMount) ? received.fds[0] : -1);
}

/// As vfork(): the child has this process's memory, which stands still until the child executes a
/// program or ends. The child's stack is its own, so that it may return from functions.
struct Child {
    const Message* message;
    int terminal;
};

__attribute__((noreturn, used)) void run_child(const Child* child) {
    execute(*child->message, child->terminal);
}

alignas(16) u8 child_stack[64 * 1024];

long spawn(const Child& child) {
    clone_args arguments{};
    arguments.flags = CLONE_VM | CLONE_VFORK;
    arguments.exit_signal = kSigChld;
    arguments.stack = reinterpret_cast<u64>(child_stack);
    arguments.stack_size = sizeof child_stack;
    long result;
    __asm__ volatile(
        "syscall\n\t"
        "test %%rax, %%rax\n\t"
        "jnz 1f\n\t"
        "mov %[child], %%rdi\n\t"
        "call *%[function]\n\t"
        "hlt\n"
        "1:"
        : "=a"(result)
        : "a"(__NR_clone3), "D"(&arguments),
          "S"(sizeof arguments), [child] "r"(&child), [function] "r"(&run_child)
        : "rcx", "r11", "memory");
    return result;
}

int exit_status(int status) {
    return (status & 0x7f) ? 128 + (status & 0x7f) : (status >> 8) & 0xff;
}

/// Reaps all that have ended. Whether the program has, whose status then is in `status`.
bool reap(long program, int& status) {
    for (;;) {
        int found = 0;
        const long pid = sys(__NR_wait4, -1, &found, WNOHANG | __WALL, nullptr);
        if (pid <= 0) return false;
        if (pid == program) {
            status = found;
            return true;
        }
    }
}

/// PID 1's life: until the program ends, if there is one, or the launcher does.
[[noreturn]] void serve(const Wire& wire, long program) {
    const u64 all = ~u64{0};
    const Fd signals(
        check(sys(__NR_signalfd4, -1, &all, sizeof all, O_CLOEXEC), "wait for signals"));
    int status = 0;
    bool ended = program > 0 && reap(program, status);
    pollfd waited[2] = {{signals.get(), POLLIN, 0}, {kControlFd, 0, 0}};
    while (!ended) {
        if (sys(__NR_poll, waited, 2, -1) < 0) continue;
        if (waited[1].revents != 0) {
            if ((wire.flags & kDetached) == 0) {
                // The program of an attached init is in a PID namespace of others.
                if (program > 0) sys(__NR_kill, program, kSigKill);
                sys(__NR_exit_group, 128 + kSigKill);
            }
            close_fd(kControlFd);
            waited[1].fd = -1;
        }
        if ((waited[0].revents & POLLIN) == 0) continue;
        signalfd_siginfo info;
        if (sys(__NR_read, signals.get(), &info, sizeof info) != sizeof info) continue;
        const int number = static_cast<int>(info.ssi_signo);
        if (number == kSigChld) {
            ended = reap(program, status);
        } else if (program > 0) {
            sys(__NR_kill, program, number);
        } else if (number == kSigTerm) {
            ended = true;
        }
    }
    report(ReportKind::kEnded, status);
    for (;;) sys(__NR_exit_group, exit_status(status));
}

}  // namespace

extern "C" __attribute__((noreturn, used)) void program_main() {
    sys(__NR_prctl, PR_SET_NAME, "polyvisor-init", 0, 0, 0);
    default_action(kSigChld);
    const Received received = receive_message();
    const Message& message = received.message;
    const Wire& wire = message.wire();
    set_up(received);
    const int terminal = open_terminal(message);
    if ((wire.flags & kInit) == 0) execute(message, terminal);
    long program = 0;
    if (wire.argv.count > 0) {
        program = check(spawn({&message, terminal}), "start the program");
        if (has_failed()) sys(__NR_exit_group, 125);  // the child has told
    }
    close_fd(terminal);
    // Neither the launcher's standard files nor the cgroups' are for PID 1 to hold.
    for (int fd = 0; fd < kControlFd; ++fd) sys(__NR_close, fd);
    sys(kSysCloseRange, kControlFd + 1, ~0u, 0);
    drop_rights();
    report(ReportKind::kStarted, 0);
    serve(wire, program);
}

}  // namespace polyvisor::host::init

__asm__(
    ".globl _start\n"
    "_start:\n\t"
    "xor %ebp, %ebp\n\t"
    "and $-16, %rsp\n\t"
    "call program_main\n\t"
    "hlt\n");
