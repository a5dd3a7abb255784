// Prints a system call filter, a program of the kernel's classic BPF, as libseccomp makes it:
// `filter default` or `filter system`. It runs while polyvisor is built; init has the result
// inside.
//
// Both profiles deny what endangers the host's kernel or reaches beyond namespaces. "default" also
// denies what only somebody who administers a system needs: mounts, new namespaces, tracing. What
// is denied fails with EPERM, or with ENOSYS where programs know what to do without it.
#include <fcntl.h>
#include <linux/sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace {

// The host's kernel, its clock and its disks; keys and quotas, which no namespace separates; and
// calls with a past of flaws that few programs need.
constexpr const char* kNever[] = {
    "acct",
    "add_key",
    "adjtimex",
    "bpf",
    "clock_adjtime",
    "clock_adjtime64",
    "clock_settime",
    "clock_settime64",
    "create_module",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "get_kernel_syms",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "modify_ldt",
    "move_pages",
    "nfsservctl",
    "open_by_handle_at",
    "perf_event_open",
    "query_module",
    "quotactl",
    "request_key",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "syslog",
    "sysfs",
    "_sysctl",
    "uselib",
    "userfaultfd",
    "ustat",
    "vm86",
    "vm86old",
    "vhangup",
};
// Numbers of newer calls, the same on every architecture.
constexpr int kNeverNumbers[] = {443 /* quotactl_fd */};

constexpr const char* kAdministration[] = {
    "chroot",
    "kcmp",
    "mbind",
    "migrate_pages",
    "mount",
    "move_mount",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "open_tree",
    "pivot_root",
    "pidfd_getfd",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "reboot",
    "set_mempolicy",
    "setns",
    "umount",
    "umount2",
    "unshare",
};
constexpr int kAdministrationNumbers[] = {442 /* mount_setattr */};

// Seen as unknown: programs then take clone(), whose flags a filter can see, and epoll.
constexpr const char* kMissing[] = {"io_uring_setup", "io_uring_enter", "io_uring_register"};

// mbind and set_mempolicy only place memory, and PR_SET_MM is for checkpoints: left alone.
constexpr std::uint64_t kNamespaces = CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET |
                                      CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWTIME;

class Profile {
  public:
    Profile() : context_(seccomp_init(SCMP_ACT_ALLOW)) {
        if (context_ == nullptr) stop("seccomp_init", -ENOMEM);
        need(seccomp_arch_add(context_, SCMP_ARCH_X86), "x86");
        need(seccomp_attr_set(context_, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_ERRNO(ENOSYS)), "arch");
        // A tree of comparisons instead of a list.
        need(seccomp_attr_set(context_, SCMP_FLTATR_CTL_OPTIMIZE, 2), "optimize");
    }
    ~Profile() { seccomp_release(context_); }
    Profile(const Profile&) = delete;
    Profile& operator=(const Profile&) = delete;

    void deny(const char* name, int error) {
        const int number = seccomp_syscall_resolve_name(name);
        if (number == __NR_SCMP_ERROR) stop(name, -ENOENT);
        deny_number(number, name, error);
    }
    void deny_number(int number, const char* name, int error) {
        need(seccomp_rule_add(context_, SCMP_ACT_ERRNO(static_cast<unsigned>(error)), number, 0),
             name);
    }
    void deny_if(const char* name, int error, scmp_arg_cmp argument) {
        need(seccomp_rule_add(context_, SCMP_ACT_ERRNO(static_cast<unsigned>(error)),
                              seccomp_syscall_resolve_name(name), 1, argument),
             name);
    }
    void print(std::FILE* file) { need(seccomp_export_bpf(context_, fileno(file)), "export"); }

  private:
    [[noreturn]] static void stop(const char* what, int error) {
        std::fprintf(stderr, "libseccomp cannot make the filter: %s: %s\n", what,
                     std::strerror(-error));
        std::exit(1);
    }
    static void need(int result, const char* what) {
        if (result < 0) stop(what, result);
    }

    scmp_filter_ctx context_;
};

}  // namespace

int main(int count, char** arguments) {
    const std::string_view name = count == 2 ? arguments[1] : "";
    if (name != "default" && name != "system") {
        std::fprintf(stderr, "usage: %s default|system\n", arguments[0]);
        return 2;
    }
    Profile profile;
    for (const char* call : kNever) profile.deny(call, EPERM);
    for (int number : kNeverNumbers) profile.deny_number(number, "newer call", EPERM);
    for (const char* call : kMissing) profile.deny(call, ENOSYS);
    // Typing into the terminal of whoever started this, and into its selection.
    for (std::uint64_t request : {std::uint64_t{TIOCSTI}, std::uint64_t{TIOCLINUX}}) {
        profile.deny_if("ioctl", EPERM, SCMP_A1_32(SCMP_CMP_MASKED_EQ, 0xffffffff, request));
    }
    // Sockets of the hypervisor and of the kernel's own cryptography.
    for (std::uint64_t family : {std::uint64_t{AF_VSOCK}, std::uint64_t{AF_ALG}}) {
        profile.deny_if("socket", EAFNOSUPPORT, SCMP_A0_32(SCMP_CMP_MASKED_EQ, 0xffffffff, family));
    }
    if (name == "default") {
        for (const char* call : kAdministration) profile.deny(call, EPERM);
        for (int number : kAdministrationNumbers) profile.deny_number(number, "newer call", EPERM);
        for (unsigned bit = 0; bit < 32; ++bit) {
            const std::uint64_t flag = std::uint64_t{1} << bit;
            if ((kNamespaces & flag) == 0 || flag == CLONE_NEWTIME)
                continue;  // its bit is a signal's
            profile.deny_if("clone", EPERM, SCMP_A0_64(SCMP_CMP_MASKED_EQ, flag, flag));
        }
        // Whose flags a filter cannot see; C libraries fall back to clone().
        profile.deny("clone3", ENOSYS);
    }
    profile.print(stdout);
}
