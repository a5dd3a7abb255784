// A hostile program without a CPU: all of its threads and processes make any system call with any
// arguments, nearly right or not, while the memory that those lie in changes under the monitor, and
// the host pauses and ends them at any moment. Nothing may crash or hang, be left behind, or reach
// what is outside of the program's tree (make asan, make ubsan, make tsan).
//
//     PV_FUZZ=1000000 test_fuzz_calls       system calls; PV_SEED; PV_FUZZ_COUNTS=1 tells of each
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/error.hpp"
#include "check.hpp"
#include "fake_engine.hpp"
#include "process/calls.hpp"
#include "process/kernel.hpp"
#include "process/thread.hpp"
#include "random.hpp"
#include "small_elf.hpp"

using namespace polyvisor;
using namespace polyvisor::process;
using namespace pvtest;
namespace fs = std::filesystem;

namespace {

constexpr u64 kData = 0x1000'0000, kDataBytes = 16 * kPageSize;  // the program's, to begin with
constexpr u64 kSlot = 256, kSlots = kDataBytes / kSlot / 9 * 9;
constexpr const char* kSecret = "what nobody inside may ever read";

// The arguments of a call that gets somewhere, a letter each: f descriptor, p path, b buffer,
// l length, o offset, t times, v vector of buffers, n small number, g flags, s signal, a address,
// z size of memory, u process, w word, x anything, and structures: A actions of signals, P
// descriptors to poll, C of clone3(), S address of a socket, M message, E event, 0 nothing.
struct Shape {
    u32 number;
    const char* arguments;
};
constexpr Shape kShapes[] = {
    {SYS_read, "fbl"},
    {SYS_write, "fbl"},
    {SYS_open, "pgn"},
    {SYS_openat, "fpgn"},
    {SYS_openat2, "fpbn"},
    {SYS_close, "f"},
    {SYS_close_range, "ffg"},
    {SYS_stat, "pb"},
    {SYS_lstat, "pb"},
    {SYS_fstat, "fb"},
    {SYS_newfstatat, "fpbg"},
    {SYS_statx, "fpgxb"},
    {SYS_statfs, "pb"},
    {SYS_fstatfs, "fb"},
    {SYS_lseek, "fon"},
    {SYS_pread64, "fblo"},
    {SYS_pwrite64, "fblo"},
    {SYS_readv, "fvn"},
    {SYS_writev, "fvn"},
    {SYS_preadv, "fvno0"},
    {SYS_pwritev, "fvno0"},
    {SYS_preadv2, "fvno0g"},
    {SYS_pwritev2, "fvno0g"},
    {SYS_sendfile, "ffbl"},
    {SYS_copy_file_range, "fbfblg"},
    {SYS_splice, "fbfblg"},
    {SYS_getdents64, "fbl"},
    {SYS_getcwd, "bl"},
    {SYS_chdir, "p"},
    {SYS_fchdir, "f"},
    {SYS_mkdir, "pn"},
    {SYS_mkdirat, "fpn"},
    {SYS_rmdir, "p"},
    {SYS_unlink, "p"},
    {SYS_unlinkat, "fpg"},
    {SYS_rename, "pp"},
    {SYS_renameat, "fpfp"},
    {SYS_renameat2, "fpfpg"},
    {SYS_link, "pp"},
    {SYS_linkat, "fpfpg"},
    {SYS_symlink, "pp"},
    {SYS_symlinkat, "pfp"},
    {SYS_readlink, "pbl"},
    {SYS_readlinkat, "fpbl"},
    {SYS_chmod, "pn"},
    {SYS_fchmod, "fn"},
    {SYS_fchmodat, "fpn"},
    {SYS_chown, "pnn"},
    {SYS_fchown, "fnn"},
    {SYS_fchownat, "fpnng"},
    {SYS_utimensat, "fptg"},
    {SYS_access, "pn"},
    {SYS_faccessat, "fpn"},
    {SYS_faccessat2, "fpng"},
    {SYS_truncate, "po"},
    {SYS_ftruncate, "fo"},
    {SYS_fallocate, "fnoo"},
    {SYS_fsync, "f"},
    {SYS_fcntl, "fnf"},
    {SYS_fcntl, "fnb"},
    {SYS_flock, "fn"},
    {SYS_ioctl, "fxb"},
    {SYS_dup, "f"},
    {SYS_dup2, "ff"},
    {SYS_dup3, "ffg"},
    {SYS_pipe2, "bg"},
    {SYS_eventfd2, "ng"},
    {SYS_timerfd_create, "ng"},
    {SYS_timerfd_settime, "fgtb"},
    {SYS_signalfd4, "fbng"},
    {SYS_memfd_create, "pg"},
    {SYS_inotify_init1, "g"},
    {SYS_epoll_create1, "g"},
    {SYS_epoll_ctl, "fnfE"},
    {SYS_epoll_wait, "fbnn"},
    {SYS_epoll_pwait2, "fbnt00"},
    {SYS_poll, "Pnn"},
    {SYS_ppoll, "Pnt00"},
    {SYS_select, "nbbbt"},
    {SYS_pselect6, "nbbbt0"},
    {SYS_socket, "nnn"},
    {SYS_socketpair, "nnnb"},
    {SYS_bind, "fSn"},
    {SYS_connect, "fSn"},
    {SYS_listen, "fn"},
    {SYS_accept4, "fbbg"},
    {SYS_sendto, "fblgSn"},
    {SYS_recvfrom, "fblgbb"},
    {SYS_sendmsg, "fMg"},
    {SYS_recvmsg, "fMg"},
    {SYS_setsockopt, "fnnbn"},
    {SYS_getsockopt, "fnnbb"},
    {SYS_shutdown, "fn"},
    {SYS_mmap, "azngfo"},
    {SYS_mmap, "aznMfo"},
    {SYS_munmap, "az"},
    {SYS_mprotect, "azn"},
    {SYS_mremap, "azzna"},
    {SYS_madvise, "azn"},
    {SYS_msync, "azn"},
    {SYS_mincore, "azb"},
    {SYS_mlock, "az"},
    {SYS_brk, "a"},
    {SYS_process_vm_readv, "uvnvn0"},
    {SYS_futex, "wgnt"},
    {SYS_futex, "wgntwn"},
    {SYS_set_robust_list, "bn"},
    {SYS_set_tid_address, "w"},
    {SYS_rseq, "bngn"},
    {SYS_rt_sigaction, "sAAn"},
    {SYS_rt_sigaction, "sA08"},
    {SYS_rt_sigprocmask, "nbb8"},
    {SYS_rt_sigpending, "b8"},
    {SYS_rt_sigtimedwait, "bbt8"},
    {SYS_rt_sigsuspend, "b8"},
    {SYS_rt_sigreturn, ""},
    {SYS_sigaltstack, "bb"},
    {SYS_kill, "us"},
    {SYS_tkill, "us"},
    {SYS_tgkill, "uus"},
    {SYS_rt_sigqueueinfo, "usb"},
    {SYS_rt_tgsigqueueinfo, "uusb"},
    {SYS_alarm, "n"},
    {SYS_setitimer, "ntb"},
    {SYS_getitimer, "nb"},
    {SYS_timer_create, "nbb"},
    {SYS_timer_settime, "ngtb"},
    {SYS_timer_gettime, "nb"},
    {SYS_timer_delete, "n"},
    {SYS_nanosleep, "tb"},
    {SYS_clock_nanosleep, "ngtb"},
    {SYS_clock_gettime, "nbx"},
    {SYS_getrandom, "blg"},
    {SYS_clone, "cabbx"},
    {SYS_clone3, "Cn"},
    {SYS_fork, ""},
    {SYS_vfork, ""},
    {SYS_execve, "pvv"},
    {SYS_execveat, "fpvvg"},
    {SYS_exit, "n"},
    {SYS_wait4, "ubnb"},
    {SYS_waitid, "nubnb"},
    {SYS_setpgid, "uu"},
    {SYS_getpgid, "u"},
    {SYS_setsid, ""},
    {SYS_prctl, "nbnnn"},
    {SYS_arch_prctl, "xa"},
    {SYS_prlimit64, "unbb"},
    {SYS_uname, "b"},
    {SYS_sysinfo, "b"},
    {SYS_getrusage, "nb"},
    {SYS_times, "b"},
    {SYS_sched_getaffinity, "unb"},
    {SYS_sched_setaffinity, "unb"},
    {SYS_sched_yield, ""},
    {SYS_getgroups, "nb"},
    {SYS_membarrier, "ng"},
    {SYS_creat, "pn"},
    {SYS_futimesat, "fpt"},
    {SYS_utimes, "pt"},
    {SYS_lchown, "pnn"},
    {SYS_mknod, "pnn"},
    {SYS_mknodat, "fpnn"},
    {SYS_getxattr, "ppbl"},
    {SYS_lgetxattr, "ppbl"},
    {SYS_fgetxattr, "fpbl"},
    {SYS_listxattr, "pbl"},
    {SYS_llistxattr, "pbl"},
    {SYS_flistxattr, "fbl"},
    {SYS_setxattr, "ppblg"},
    {SYS_lsetxattr, "ppblg"},
    {SYS_fsetxattr, "fpblg"},
    {SYS_removexattr, "pp"},
    {SYS_lremovexattr, "pp"},
    {SYS_fremovexattr, "fp"},
    {SYS_fdatasync, "f"},
    {SYS_sync, ""},
    {SYS_syncfs, "f"},
    {SYS_sync_file_range, "foog"},
    {SYS_fadvise64, "foon"},
    {SYS_readahead, "fol"},
    {SYS_pipe, "b"},
    {SYS_eventfd, "n"},
    {SYS_timerfd_gettime, "fb"},
    {SYS_epoll_create, "n"},
    {SYS_epoll_pwait, "fbnn00"},
    {SYS_accept, "fbb"},
    {SYS_getsockname, "fbb"},
    {SYS_getpeername, "fbb"},
    {SYS_sendmmsg, "fMng"},
    {SYS_recvmmsg, "fMngt"},
    {SYS_mlock2, "azn"},
    {SYS_munlock, "az"},
    {SYS_mlockall, "n"},
    {SYS_munlockall, ""},
    {SYS_pause, ""},
    {SYS_timer_getoverrun, "n"},
    {SYS_clock_getres, "nb"},
    {SYS_gettimeofday, "bb"},
    {SYS_time, "b"},
    {SYS_getcpu, "bb"},
    {SYS_umask, "n"},
    {SYS_exit_group, "n"},
    {SYS_getpid, ""},
    {SYS_getppid, ""},
    {SYS_gettid, ""},
    {SYS_getpgrp, ""},
    {SYS_getsid, "u"},
    {SYS_getuid, ""},
    {SYS_getgid, ""},
    {SYS_geteuid, ""},
    {SYS_getegid, ""},
    {SYS_getresuid, "bbb"},
    {SYS_getresgid, "bbb"},
    {SYS_setuid, "n"},
    {SYS_setgid, "n"},
    {SYS_setreuid, "nn"},
    {SYS_setregid, "nn"},
    {SYS_setresuid, "nnn"},
    {SYS_setresgid, "nnn"},
    {SYS_setgroups, "nb"},
    {SYS_getrlimit, "nb"},
    {SYS_pidfd_open, "ug"},
    {SYS_pidfd_send_signal, "fsbg"},
};

constexpr const char* kPaths[] = {
    "/",
    "/work",
    "/work/a",
    "/work/d/b",
    "/work/d",
    "a",
    "d/../a",
    "..",
    ".",
    "",
    "/../../../../..",
    "/outside/secret",
    "/out",
    "/out/secret",
    "/work/out",
    "/work/out/secret",
    "/ro/kept",
    "/ro",
    "/bin/run",
    "/bin/script",
    "/bin/broken",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
    "/proc/self/mem",
    "/proc/self/fd/3",
    "/proc/1/root/",
    "/work/loop",
    "//work///a//",
    "/work/a/",
    "../outside/secret",
    "/work/../../outside/secret",
    "/work/fifo",
    "/bin/run/x",
};

// A call that is served and has no shape here is hardly ever made with arguments that get far.
void every_call_has_a_shape() {
    for (u32 number = 0; number < 512; ++number) {
        const bool known = std::any_of(std::begin(kShapes), std::end(kShapes),
                                       [&](const Shape& shape) { return shape.number == number; });
        if (known || !is_served(number)) continue;
        std::fprintf(stderr, "%s() is served: it needs a line in kShapes\n",
                     system_call_name(number).c_str());
        CHECK(known);
    }
}

// What all rounds share.
struct Common {
    fs::path top;
    std::atomic<s64> left{0};
    std::atomic<u64> made{0};
    std::atomic<bool> leaked{false};
    std::map<u32, CallCount> counts{};
};

class Hostile final : public FakeProgram {
  public:
    Hostile(Common& common, u64 seed, std::shared_ptr<std::atomic<bool>> mapped)
        : common_(common), random_(seed), mapped_(std::move(mapped)) {}

    void next(FakeVcpu& cpu) override {
        GeneralRegisters& r = cpu.registers;
        if (--common_.left < 0) {
            call(r, SYS_exit_group, {0});
            return;
        }
        // Its data, which it may have lost; at times somewhere that is not there.
        if (random_.one_in(64)) look_for_secret(cpu);
        u64 at = 0;
        bool filled = true;
        for (int n = 0; n < 3 && filled; ++n) filled = fill(cpu, at = slot());
        if (!filled) {
            // A page that was not touched yet; or one that is not there any more.
            const u32 page = 1u << (at - kData) / kPageSize;
            if (*mapped_ && !(touched_ & page)) {
                touched_ |= page;
                cpu.fault(at, true);
                return;
            }
            if (!mapped_->exchange(true) || random_.one_in(2)) {
                touched_ = 0;
                call(r, SYS_mmap,
                     {kData, kDataBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, ~u64{0}, 0});
                return;
            }
        }
        ++common_.made;
        const Shape& shape = kShapes[random_.below(std::size(kShapes))];
        std::array<u64, 6> arguments{};
        const bool wild = random_.one_in(8);
        for (std::size_t n = 0; n < 6; ++n) {
            const char kind = n < std::strlen(shape.arguments) ? shape.arguments[n] : 'x';
            arguments[n] = wild || random_.one_in(24) ? anything() : argument(kind);
        }
        const u32 number = random_.one_in(32) ? random_.below(480) : shape.number;
        if (number == SYS_exit_group && !random_.one_in(50)) return call(r, SYS_getpid, {});
        if (number == SYS_exit && !random_.one_in(10)) return call(r, SYS_gettid, {});
        // What ends all of it is not to come too often.
        if (number == SYS_munmap || number == SYS_mremap) {
            if (!random_.one_in(8) && arguments[0] < kData + kDataBytes)
                arguments[0] += 2 * kDataBytes;
        }
        call(r, number, arguments);
    }

  private:
    static void call(GeneralRegisters& r, u32 number, std::array<u64, 6> a) {
        r.gpr[kRax] = number;
        r.gpr[kRdi] = a[0];
        r.gpr[kRsi] = a[1];
        r.gpr[kRdx] = a[2];
        r.gpr[10] = a[3];
        r.gpr[8] = a[4];
        r.gpr[9] = a[5];
    }

    u64 anything() {
        switch (random_.below(5)) {
            case 0:
                return random_.next();
            case 1:
                return random_.pick<u64>({0, 1, ~u64{0}, bit(31), bit(32), bit(47), bit(63),
                                          0x7fffffff, 0xffffffff, AddressSpace::kEnd,
                                          AddressSpace::kEnd - 1, Supervisor::kBase,
                                          Supervisor::kEntry, Supervisor::kClock});
            case 2:
                return address();
            case 3:
                return bit(random_.below(64)) - random_.below(2);
            default:
                return random_.below(300);
        }
    }
    // What a slot holds.
    enum Content : u32 {
        kPath,
        kPath2,
        kPath3,
        kBuffers,
        kStrings,
        kTimes,
        kActions,
        kNumbers,
        kAny
    };
    static constexpr u32 kContents = kAny + 1;
    u64 slot() { return kData + random_.below(kSlots) * kSlot; }
    u64 slot(u32 content) {
        return kData + (content + random_.below(kSlots / kContents) * kContents) * kSlot;
    }
    u64 address() {
        switch (random_.below(8)) {
            case 0:
                return kData + kDataBytes - random_.below(32);  // to its end, and over it
            case 1:
                return kData + random_.below(kDataBytes);
            case 2:
                return 0x400000 + random_.below(4) * kPageSize;  // the program's own
            case 3:
                return AddressSpace::kEnd - random_.below(3 * kPageSize);
            case 4:
                return align_down(random_.next() & (bit(47) - 1), kPageSize);
            default:
                return kData + random_.below(6 * kDataBytes / kPageSize) * kPageSize;
        }
    }
    u64 flags() {
        u64 result = 0;
        for (u32 n = random_.below(4); n > 0; --n) result |= bit(random_.below(24));
        return random_.one_in(3) ? 0 : result;
    }
    u64 argument(char kind) {
        switch (kind) {
            case '0':
                return 0;
            case '8':
                return 8;
            case 'f':
                return random_.one_in(10) ? static_cast<u64>(AT_FDCWD) : random_.below(20);
            case 'l':
                return random_.one_in(8) ? anything() : random_.below(2 * kPageSize);
            case 'o':
                return random_.one_in(8) ? anything() : random_.below(4 * kPageSize);
            case 'n':
                return random_.one_in(16) ? random_.next() : random_.below(20);
            case 'g':
                return flags();
            case 's':
                return random_.pick<u64>(
                    {0, SIGCHLD, SIGUSR1, SIGUSR2, SIGALRM, SIGPIPE, SIGCONT, SIGSEGV, 34, 64, 65});
            case 'a':
                return random_.one_in(3) ? 0 : align_down(address(), kPageSize);
            case 'z':
                return random_.one_in(16) ? anything() : random_.below(24) * kPageSize;
            case 'u':
                return random_.pick<u64>(
                    {0, 1, ~u64{0}, 1000, 1001, 1002, 1003 + random_.below(40)});
            case 'c':
                return random_.pick<u64>({SIGCHLD, CLONE_VM | CLONE_VFORK | SIGCHLD,
                                          CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND |
                                              CLONE_THREAD | CLONE_SYSVSEM,
                                          CLONE_VM | CLONE_SIGHAND | CLONE_THREAD |
                                              CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID |
                                              CLONE_PARENT_SETTID,
                                          flags() | CLONE_VM, random_.next()});
            case 'x':
                return anything();
            case 'p':
                return slot(random_.below(3));
            case 'v':
                return slot(random_.pick<u32>({kBuffers, kBuffers, kBuffers, kStrings}));
            case 't':
                return slot(kTimes);
            case 'A':
                return slot(kActions);
            case 'P':
            case 'E':
                return slot(kNumbers);
            default:  // some structure
                return slot() + (random_.one_in(8) ? 4 : 0);
        }
    }

    // Something to point to.
    bool fill(FakeVcpu& cpu, u64 at) {
        std::array<u8, kSlot> bytes{};
        auto put = [&](std::size_t offset, u64 value, std::size_t size = 8) {
            std::memcpy(bytes.data() + offset, &value, size);
        };
        switch ((at - kData) / kSlot % kContents) {
            case kPath:
            case kPath2:
            case kPath3: {
                const std::string path = kPaths[random_.below(std::size(kPaths))];
                std::memcpy(bytes.data(), path.data(), path.size());
                if (random_.one_in(30)) bytes.fill('a');  // and no end
                break;
            }
            case kBuffers:  // or messages
                for (std::size_t n = 0; n < kSlot; n += 16) {
                    put(n, random_.one_in(10) ? anything() : slot());
                    put(n + 8, random_.one_in(10) ? anything() : random_.below(600));
                }
                break;
            case kStrings:  // as execve() has them
                for (std::size_t n = 0; n < 8 * random_.below(8); n += 8) put(n, slot());
                break;
            case kTimes:
                put(0, random_.one_in(10) ? anything() : 0);
                put(8, random_.below(2'000'000));
                put(16, random_.one_in(10) ? anything() : 0);
                put(24, random_.below(2'000'000));
                break;
            case kActions:
                put(0, random_.pick<u64>({0, 1, 0x400000, address()}));
                put(8, random_.pick<u64>({0x04000000, 0x44000004, flags()}));
                put(16, 0x400000);
                put(24, random_.one_in(3) ? random_.next() : 0);
                break;
            case kNumbers:  // descriptors and what to wait for; events
                for (std::size_t n = 0; n < kSlot; n += 8) {
                    put(n, random_.below(24), 4);
                    put(n + 4, random_.below(64), 4);
                }
                break;
            default:
                for (std::size_t n = 0; n < kSlot; n += 8) put(n, anything());
        }
        return cpu.access(at, bytes.data(), bytes.size(), true) == bytes.size();
    }
    void look_for_secret(FakeVcpu& cpu) {
        std::array<char, kPageSize> page;
        const u64 at = kData + random_.below(kDataBytes / kPageSize) * kPageSize;
        const std::size_t got = cpu.access(at, page.data(), page.size(), false);
        if (std::string_view(page.data(), got).find(kSecret) != std::string_view::npos) {
            common_.leaked = true;
        }
    }

    Common& common_;
    Random random_;
    std::shared_ptr<std::atomic<bool>> mapped_;  // of its machine
    u32 touched_ = 0;                            // pages of the data
};

void write_file(const fs::path& path, std::string_view content, int mode = 0644) {
    std::ofstream(path) << content;
    ::chmod(path.c_str(), static_cast<mode_t>(mode));
}

// Everything around the program that is to stay as it is, in words.
std::string surroundings(const fs::path& top) {
    std::vector<std::string> lines;
    for (const auto& entry : fs::recursive_directory_iterator(top)) {
        const std::string path = entry.path().string();
        if (path.starts_with((top / "work").string())) continue;
        struct stat about{};
        ::lstat(path.c_str(), &about);
        std::string line =
            path + " " + std::to_string(about.st_mode) + " " + std::to_string(about.st_uid) + " " +
            std::to_string(about.st_size) + " " + std::to_string(about.st_nlink) + " " +
            std::to_string(about.st_mtim.tv_sec) + "." + std::to_string(about.st_mtim.tv_nsec);
        if (S_ISREG(about.st_mode)) {
            std::ifstream file(path);
            line.append(std::istreambuf_iterator<char>(file), {});
        }
        lines.push_back(std::move(line));
    }
    std::sort(lines.begin(), lines.end());
    std::string all;
    for (const std::string& line : lines) all += line + "\n";
    return all;
}

std::size_t entries(const char* folder) {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

// Those that run programs wait for another one for a second.
std::size_t threads_left() {
    for (int n = 0; n < 500 && entries("/proc/self/task") != 1; ++n) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return entries("/proc/self/task");
}

void make_tree(const fs::path& top) {
    for (const char* name : {"root/bin", "root/work", "root/ro", "root/dev", "ro", "outside"}) {
        fs::create_directories(top / name);
    }
    write_file(top / "outside/secret", kSecret);
    write_file(top / "ro/kept", "to be read");
    write_file(top / "root/bin/run", small_elf(), 0755);
    write_file(top / "root/bin/script", "#!/bin/run of it\n", 0755);
    write_file(top / "root/bin/broken", small_elf().substr(0, 100), 0755);
    fs::create_symlink("../outside", top / "root/out");
    for (const char* name : {"null", "zero", "urandom"}) write_file(top / "root/dev" / name, "");
}

void make_work(const fs::path& top) {
    fs::remove_all(top / "work");
    fs::create_directories(top / "work/d");
    write_file(top / "work/a", std::string(3 * kPageSize, 'a'));
    fs::create_symlink(top / "outside", top / "work/out");
    fs::create_symlink("loop", top / "work/loop");
    ::mkfifo((top / "work/fifo").c_str(), 0644);
}

void play(Common& common, Random& random, u64 calls) {
    const fs::path& top = common.top;
    make_work(top);
    const bool hypercalls = random.one_in(2);
    auto seeds = std::make_shared<std::atomic<u64>>(random.next());
    KernelConfig config;
    config.arguments = {"/bin/run", "an argument"};
    config.environment = {"A=b"};
    config.mounts = {{"/", top / "root", false},        {"/work", top / "work", true},
                     {"/ro", top / "ro", false},        {"/dev/null", "/dev/null", false},
                     {"/dev/zero", "/dev/zero", false}, {"/dev/urandom", "/dev/urandom", false}};
    config.directory = "/work";
    config.output = 1 << 20;
    config.threads = 12;
    config.confine = random.one_in(2);
    config.vm.memory = 32 << 20;
    config.vm.make_engine = [&common, seeds, hypercalls](const EngineConfig& wanted) {
        auto mapped = std::make_shared<std::atomic<bool>>(false);
        return std::make_unique<FakeEngine>(wanted, hypercalls, [&common, seeds, mapped](u32) {
            return std::make_unique<Hostile>(common, seeds->fetch_add(1), mapped);
        });
    };
    OwnedFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    StandardFiles standard;
    for (auto& fd : standard) fd = OwnedFd(::fcntl(null.get(), F_DUPFD_CLOEXEC, 3));

    common.left = static_cast<s64>(calls);
    Kernel kernel(std::move(config), std::move(standard));
    kernel.resume();
    using namespace std::chrono_literals;
    u64 seen = 0;
    for (int idle = 0; !kernel.wait(1ms);) {
        const u64 made = common.made;
        idle = made == seen ? idle + 1 : 0;
        seen = made;
        if (random.one_in(20)) {
            kernel.pause();
            kernel.resume();
        }
        // All of them wait for what never comes, or have done enough.
        if (idle > 4 || random.one_in(400) || common.left < 0) {
            kernel.kill({.reason = End::Reason::kSignal, .signal = SIGKILL});
            if (!kernel.wait(20s)) {
                std::fprintf(stderr, "the program does not end\n");
                std::abort();
            }
        }
    }
    for (const auto& [number, count] : kernel.counts()) {
        common.counts[number].calls += count.calls;
        common.counts[number].errors += count.errors;
    }
    const auto end = kernel.end();
    CHECK(end.has_value());
    if (end && end->reason == End::Reason::kFailed) {
        CHECK_EQ(end->text, std::string());
    }
}

}  // namespace

int main() {
    every_call_has_a_shape();
    const u64 total = environment_number("PV_FUZZ", 40'000);
    const u64 seed = environment_number("PV_SEED", 1);
    // What a program may write to the host's disk is a question of its own.
    const rlimit most{16 << 20, 16 << 20};
    ::setrlimit(RLIMIT_FSIZE, &most);
    ::signal(SIGXFSZ, SIG_IGN);
    ::signal(SIGPIPE, SIG_IGN);
    Common common;
    // (In memory where that can be had: a disk takes its time for fsync().)
    std::string name = fs::exists("/dev/shm") ? "/dev/shm" : fs::temp_directory_path().string();
    name += "/polyvisor-fuzz-XXXXXX";
    common.top = ::mkdtemp(name.data());
    make_tree(common.top);
    const std::string before = surroundings(common.top);
    Random random(seed);
    play(common, random, 100);  // what is made once and kept
    CHECK_EQ(threads_left(), std::size_t{1});
    const std::size_t descriptors = entries("/proc/self/fd");
    u64 rounds = 0;
    while (common.made < total) {
        play(common, random, 200 + random.below(4000));
        ++rounds;
        CHECK(!common.leaked);
        if (rounds % 50 == 0 || common.made >= total) {
            CHECK(surroundings(common.top) == before);
            CHECK_EQ(threads_left(), std::size_t{1});  // they close machines before they end
            CHECK_EQ(entries("/proc/self/fd"), descriptors);
        }
    }
    fs::remove_all(common.top);
    std::fprintf(stderr, "%llu calls of %llu programs\n",
                 static_cast<unsigned long long>(common.made.load()),
                 static_cast<unsigned long long>(rounds));
    if (environment_number("PV_FUZZ_COUNTS", 0) != 0) {
        for (const auto& [number, count] : common.counts) {
            std::fprintf(stderr, "%s: %llu, of which %llu worked\n",
                         system_call_name(number).c_str(),
                         static_cast<unsigned long long>(count.calls),
                         static_cast<unsigned long long>(count.calls - count.errors));
        }
    }
    return pvtest::finish("fuzz_calls");
}
