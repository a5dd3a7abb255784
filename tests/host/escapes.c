// Tries to get out of a sandbox by every door that is known. One line each: its name, and 0 if it
// was open, else the errno that kept it shut. argv[1] is the id of a process outside.
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef AF_VSOCK
#define AF_VSOCK 40
#endif
#define TRY(name, expression)                                           \
    do {                                                                \
        errno = 0;                                                      \
        long result_ = (long)(expression);                              \
        printf("%s %d\n", name, result_ < 0 ? (errno ? errno : 1) : 0); \
        fflush(stdout);                                                 \
    } while (0)

static long opens(const char* path, int flags) {
    int fd = open(path, flags);
    if (fd >= 0) close(fd);
    return fd;
}

static long writes(const char* path, const char* text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0) return -1;
    long result = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

static long clones(unsigned long flags) {
    long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) _exit(0);
    if (pid > 0) waitpid((pid_t)pid, 0, 0);
    return pid;
}

static long clones3(unsigned long flags) {
    struct clone_args arguments = {.flags = flags, .exit_signal = SIGCHLD};
    long pid = syscall(SYS_clone3, &arguments, sizeof arguments);
    if (pid == 0) _exit(0);
    if (pid > 0) waitpid((pid_t)pid, 0, 0);
    return pid;
}

static long joins(const char* path) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return -1;
    long result = setns(fd, 0);
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

// chroot() into a folder below with a descriptor of one above kept: the oldest way out.
static long chroots_twice(void) {
    mkdir("/tmp/deep", 0700);
    int above = open("/", O_RDONLY | O_DIRECTORY);
    if (chroot("/tmp/deep") < 0) return -1;
    if (fchdir(above) < 0) return -1;
    for (int i = 0; i < 64; i++)
        if (chdir("..") < 0) return -1;
    return chroot(".");
}

// A descriptor beyond the standard ones that was not opened here (CVE-2024-21626).
static long leaked_descriptor(void) {
    for (int fd = 3; fd < 1024; fd++)
        if (fcntl(fd, F_GETFD) >= 0) return fd;
    errno = EBADF;
    return -1;
}

static long reads_memory(pid_t pid) {
    char byte;
    struct iovec here = {&byte, 1}, there = {(void*)0x400000, 1};
    return process_vm_readv(pid, &here, 1, &there, 1, 0);
}

int main(int count, char** arguments) {
    pid_t outside = count > 1 ? atoi(arguments[1]) : 1;
    TRY("leaked descriptor", leaked_descriptor());
    TRY("mount tmpfs", mount("x", "/mnt", "tmpfs", 0, 0));
    TRY("mount proc", mount("x", "/tmp", "proc", 0, 0));
    TRY("bind mount", mount("/", "/tmp", 0, MS_BIND | MS_REC, 0));
    TRY("remount writable", mount(0, "/", 0, MS_REMOUNT | MS_BIND, 0));
    TRY("uncover /tmp", umount2("/tmp", MNT_DETACH));
    TRY("uncover /proc/sys", umount2("/proc/sys", MNT_DETACH));
    TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    TRY("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    TRY("move_mount", syscall(SYS_move_mount, AT_FDCWD, "/tmp", AT_FDCWD, "/mnt", 0));
    TRY("mount_setattr", syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, 0, 0));
    TRY("pivot_root", syscall(SYS_pivot_root, "/tmp", "/tmp"));
    TRY("chroot twice", chroots_twice());
    TRY("unshare user", unshare(CLONE_NEWUSER));
    TRY("unshare mount", unshare(CLONE_NEWNS));
    TRY("clone user", clones(CLONE_NEWUSER));
    TRY("clone net", clones(CLONE_NEWNET));
    TRY("clone3 user", clones3(CLONE_NEWUSER));
    TRY("setns init's mounts", joins("/proc/1/ns/mnt"));
    TRY("setns init's users", joins("/proc/1/ns/user"));
    TRY("mknod disk", mknod("/tmp/disk", S_IFBLK | 0600, makedev(8, 0)));
    TRY("mknod memory", mknod("/dev/shm/mem", S_IFCHR | 0600, makedev(1, 1)));
    TRY("/dev/mem", opens("/dev/mem", O_RDWR));
    TRY("/dev/kmsg", opens("/dev/kmsg", O_RDWR));
    TRY("/dev/kvm", opens("/dev/kvm", O_RDWR));
    TRY("signal outside", kill(outside, 0));
    TRY("ptrace outside", ptrace(PTRACE_SEIZE, outside, 0, 0));
    TRY("ptrace init", ptrace(PTRACE_SEIZE, 1, 0, 0));
    TRY("read init's memory", reads_memory(1));
    TRY("/proc/1/mem", opens("/proc/1/mem", O_RDWR));
    TRY("/proc/1/exe", opens("/proc/1/exe", O_RDWR));
    TRY("/proc/1/environ", opens("/proc/1/environ", O_WRONLY));
    TRY("priority of outside", setpriority(PRIO_PROCESS, (id_t)outside, 19));
    TRY("write /etc", opens("/etc/polyvisor-escape", O_CREAT | O_WRONLY));
    TRY("write through /proc/1/root",
        opens("/proc/1/root/etc/polyvisor-escape", O_CREAT | O_WRONLY));
    TRY("core_pattern", writes("/proc/sys/kernel/core_pattern", "|/tmp/x"));
    TRY("modprobe", writes("/proc/sys/kernel/modprobe", "/tmp/x"));
    TRY("sysrq", writes("/proc/sysrq-trigger", "h"));
    TRY("oom score", writes("/proc/self/oom_score_adj", "-1000"));
    TRY("uevent helper", opens("/sys/kernel/uevent_helper", O_WRONLY));
    TRY("release_agent", opens("/sys/fs/cgroup/memory/release_agent", O_WRONLY));
    TRY("cgroup.procs", writes("/sys/fs/cgroup/memory/cgroup.procs", "0"));
    TRY("keyctl", syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, -3, 0));
    TRY("add_key", syscall(SYS_add_key, "user", "x", "y", 1, -3));
    TRY("bpf", syscall(SYS_bpf, 0, 0, 0));
    TRY("perf_event_open", syscall(SYS_perf_event_open, 0, 0, 0, 0, 0));
    TRY("io_uring", syscall(SYS_io_uring_setup, 1, 0));
    TRY("userfaultfd", syscall(SYS_userfaultfd, 1));
    TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, 0));
    TRY("init_module", syscall(SYS_init_module, 0, 0, ""));
    TRY("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, 0, 0));
    TRY("settimeofday", syscall(SYS_settimeofday, 0, 0));
    TRY("sethostname", sethostname("x", 1));
    TRY("swapon", syscall(SYS_swapon, "/x", 0));
    TRY("reboot", syscall(SYS_reboot, 0, 0, 0, 0));
    TRY("syslog", syscall(SYS_syslog, 3, 0, 0));
    TRY("type into the terminal", ioctl(0, TIOCSTI, "x"));
    TRY("vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
    TRY("alg", socket(AF_ALG, SOCK_SEQPACKET, 0));
    TRY("raw socket", socket(AF_INET, SOCK_RAW, 1));
    TRY("packet socket", socket(AF_PACKET, SOCK_RAW, 0));
    TRY("setuid other", setuid(getuid() + 1));
    TRY("setgid other", setgid(getgid() + 1));
    return 0;
}
