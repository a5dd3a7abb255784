// A confined thread can do what serving programs takes and nothing else; the others are as before.
#include "process/confinement.hpp"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "check.hpp"

using namespace polyvisor;
using namespace polyvisor::process;

namespace {

int call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0) {
    errno = 0;
    return ::syscall(number, a, b, c, d, e, f) < 0 ? errno : 0;
}

long address(const void* at) {
    return static_cast<long>(reinterpret_cast<std::uintptr_t>(at));
}

void on_a_confined_thread(const Confinement& confinement, const std::function<void()>& check) {
    std::thread([&] {
        confine_this_thread(confinement);
        check();
    }).join();
}

// With arguments that would work, where that does no harm.
void refused() {
    const char* const arguments[] = {"/bin/true", nullptr};
    char byte = 0;
    const iovec part{&byte, 1};
    const long self = ::getpid();
    struct Row {
        const char* name;
        int error;
    };
    const Row rows[] = {
        {"execve", call(SYS_execve, address("/bin/true"), address(arguments), 0)},
        {"execveat", call(SYS_execveat, AT_FDCWD, address("/bin/true"), address(arguments), 0, 0)},
        {"fork", call(SYS_fork)},
        {"clone of a process", call(SYS_clone, SIGCHLD)},
        {"ptrace", call(SYS_ptrace, 0)},
        {"kill", call(SYS_kill, self, 0)},
        {"tkill", call(SYS_tkill, ::gettid(), 0)},
        {"tgkill of others", call(SYS_tgkill, 1, 1, 0)},
        {"pidfd_open", call(SYS_pidfd_open, self, 0)},
        {"process_vm_writev",
         call(SYS_process_vm_writev, self, address(&part), 1, address(&part), 1)},
        {"process_vm_readv of others",
         call(SYS_process_vm_readv, 1, address(&part), 1, address(&part), 1)},
        {"mount", call(SYS_mount, 0, address("/tmp"), address("tmpfs"))},
        {"umount2", call(SYS_umount2, address("/nowhere"), 0)},
        {"pivot_root", call(SYS_pivot_root, address("/nowhere"), address("/nowhere"))},
        {"chroot", call(SYS_chroot, address("/"))},
        {"chdir", call(SYS_chdir, address("/"))},
        {"unshare", call(SYS_unshare, 0)},
        {"setns", call(SYS_setns, -1, 0)},
        {"open_by_handle_at", call(SYS_open_by_handle_at, -1, 0, 0)},
        {"name_to_handle_at", call(SYS_name_to_handle_at, AT_FDCWD, address("/"), 0, 0, 0)},
        {"bpf", call(SYS_bpf, 0, 0, 0)},
        {"perf_event_open", call(SYS_perf_event_open, 0, 0, 0, 0, 0)},
        {"userfaultfd", call(SYS_userfaultfd, 0)},
        {"io_uring_setup", call(SYS_io_uring_setup, 0, 0)},
        {"keyctl", call(SYS_keyctl, 0)},
        {"init_module", call(SYS_init_module, 0, 0, 0)},
        {"kexec_load", call(SYS_kexec_load, 0, 0, 0, 0)},
        {"reboot", call(SYS_reboot, 0, 0, 0, 0)},
        {"setuid", call(SYS_setuid, ::getuid())},
        {"capset", call(SYS_capset, 0, 0)},
        {"prctl", call(SYS_prctl, 1, 0)},
        {"seccomp", call(SYS_seccomp, 2, 0, 0)},
        {"personality", call(SYS_personality, 0xffffffff)},
        {"prlimit64", call(SYS_prlimit64, 0, 7, 0, 0)},
        {"shmget", call(SYS_shmget, 0, 4096, 0)},
        {"open", call(SYS_open, address("/dev/null"), O_RDONLY)},
        {"mmap of code",
         call(SYS_mmap, 0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)},
        {"mprotect to code", call(SYS_mprotect, address(&byte) & ~4095L, 4096, PROT_EXEC)},
        {"pushing input into a terminal", call(SYS_ioctl, 0, TIOCSTI, address(&byte))},
        {"signals of a file", call(SYS_fcntl, 0, F_SETOWN, self)},
        {"exit_group", call(SYS_exit_group | 0x40000000, 0)},  // x32's
        {"a system call that does not exist", call(1000)},
    };
    for (const Row& row : rows) {
        CHECK_EQ(row.error, kRefused);
        if (row.error != kRefused) std::fprintf(stderr, "%s: %d\n", row.name, row.error);
    }
}

void sockets(bool allowed) {
    const int wanted = allowed ? 0 : kRefused;
    errno = 0;
    OwnedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK_EQ(fd ? 0 : errno, wanted);
    CHECK_EQ(call(SYS_connect, -1, 0, 0), allowed ? EBADF : kRefused);
    CHECK_EQ(call(SYS_listen, -1, 0), allowed ? EBADF : kRefused);
    CHECK_EQ(call(SYS_socket, AF_NETLINK, SOCK_RAW, 0), kRefused);
    CHECK_EQ(call(SYS_socket, AF_PACKET, SOCK_RAW, 0), kRefused);
    int pair[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    CHECK_EQ(::write(pair[0], "x", 1), 1);
    ::close(pair[0]);
    ::close(pair[1]);
}

void allowed() {
    OwnedFd folder(::open("/", O_PATH | O_DIRECTORY | O_CLOEXEC));
    CHECK(bool(folder));
    struct stat about{};
    CHECK_EQ(::fstat(folder.get(), &about), 0);
    OwnedFd event(::eventfd(0, EFD_CLOEXEC));
    CHECK(bool(event));
    std::vector<std::vector<char>> memory(100, std::vector<char>(1 << 20));
    void* at = ::mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    CHECK_EQ(::mprotect(at, 1 << 20, PROT_READ), 0);
    CHECK_EQ(::munmap(at, 1 << 20), 0);
    char byte = 1, copy = 0;
    const iovec from{&byte, 1}, to{&copy, 1};
    CHECK_EQ(::process_vm_readv(::getpid(), &to, 1, &from, 1, 0), 1);
    // Threads, which are confined too; and so are those that ask for it again.
    for (int n = 0; n < 3; ++n) {
        std::thread([] {
            CHECK_EQ(call(SYS_getppid), kRefused);
            confine_this_thread({.network = true});
            CHECK_EQ(call(SYS_socket, AF_INET, SOCK_STREAM, 0), kRefused);
            CHECK_THROWS(throw HostError(1, "", "an exception"), HostError);
        }).join();
    }
}

void others() {
    OwnedFd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
    if (!kvm) return;
    const long version = static_cast<long>(KVM_GET_API_VERSION);
    on_a_confined_thread({}, [&] { CHECK_EQ(call(SYS_ioctl, kvm.get(), version, 0), 0); });
    on_a_confined_thread({.kvm = false},
                         [&] { CHECK_EQ(call(SYS_ioctl, kvm.get(), version, 0), kRefused); });
}

}  // namespace

int main() {
    try {
        on_a_confined_thread({}, [] {});
    } catch (const HostError& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 77;
    }
    on_a_confined_thread({}, refused);
    on_a_confined_thread({}, allowed);
    on_a_confined_thread({}, [] { sockets(false); });
    on_a_confined_thread({.network = true}, [] { sockets(true); });
    others();
    // This thread has never been asked.
    CHECK_EQ(call(SYS_getppid), 0);
    const pid_t child = ::fork();
    if (child == 0) ::_exit(7);
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK_EQ(WEXITSTATUS(status), 7);
    return pvtest::finish("confinement");
}
