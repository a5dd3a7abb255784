#include "process/signatures.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>

#include "process/thread.hpp"

namespace polyvisor::process {

namespace {

constexpr std::size_t kShown = 32;  // bytes of a buffer
constexpr unsigned kShownArguments = 32;

using enum Kind;

constexpr Signature kSignatures[] = {
    // Files
    {SYS_read, {kFd, kBytesOut, kUnsigned}},
    {SYS_write, {kFd, kBytes, kUnsigned}},
    {SYS_pread64, {kFd, kBytesOut, kUnsigned, kOffset}},
    {SYS_pwrite64, {kFd, kBytes, kUnsigned, kOffset}},
    {SYS_readv, {kFd, kPointer, kUnsigned}},
    {SYS_writev, {kFd, kPointer, kUnsigned}},
    {SYS_preadv, {kFd, kPointer, kUnsigned, kOffset}},
    {SYS_pwritev, {kFd, kPointer, kUnsigned, kOffset}},
    {SYS_open, {kPath, kOpenFlags, kOpenMode}},
    {SYS_openat, {kFolder, kPath, kOpenFlags, kOpenMode}},
    {SYS_creat, {kPath, kMode}},
    {SYS_close, {kFd}},
    {SYS_close_range, {kUnsigned, kUnsigned, kHex}},
    {SYS_lseek, {kFd, kOffset, kWhence}},
    {SYS_stat, {kPath, kStat}},
    {SYS_lstat, {kPath, kStat}},
    {SYS_fstat, {kFd, kStat}},
    {SYS_newfstatat, {kFolder, kPath, kStat, kAtFlags}},
    {SYS_statx, {kFolder, kPath, kAtFlags, kHex, kPointer}},
    {SYS_statfs, {kPath, kPointer}},
    {SYS_fstatfs, {kFd, kPointer}},
    {SYS_access, {kPath, kAccess}},
    {SYS_faccessat, {kFolder, kPath, kAccess}},
    {SYS_faccessat2, {kFolder, kPath, kAccess, kAccessFlags}},
    {SYS_readlink, {kPath, kStringOut, kUnsigned}},
    {SYS_readlinkat, {kFolder, kPath, kStringOut, kUnsigned}},
    {SYS_getdents64, {kFd, kPointer, kUnsigned}},
    {SYS_getcwd, {kStringOut, kUnsigned}},
    {SYS_chdir, {kPath}},
    {SYS_fchdir, {kFd}},
    {SYS_mkdir, {kPath, kMode}},
    {SYS_mkdirat, {kFolder, kPath, kMode}},
    {SYS_rmdir, {kPath}},
    {SYS_unlink, {kPath}},
    {SYS_unlinkat, {kFolder, kPath, kAtFlags}},
    {SYS_rename, {kPath, kPath}},
    {SYS_renameat, {kFolder, kPath, kFolder, kPath}},
    {SYS_renameat2, {kFolder, kPath, kFolder, kPath, kHex}},
    {SYS_link, {kPath, kPath}},
    {SYS_linkat, {kFolder, kPath, kFolder, kPath, kAtFlags}},
    {SYS_symlink, {kPath, kPath}},
    {SYS_symlinkat, {kPath, kFolder, kPath}},
    {SYS_chmod, {kPath, kMode}},
    {SYS_fchmod, {kFd, kMode}},
    {SYS_fchmodat, {kFolder, kPath, kMode}},
    {SYS_chown, {kPath, kInt, kInt}},
    {SYS_fchown, {kFd, kInt, kInt}},
    {SYS_fchownat, {kFolder, kPath, kInt, kInt, kAtFlags}},
    {SYS_utimensat, {kFolder, kPath, kPointer, kAtFlags}},
    {SYS_truncate, {kPath, kOffset}},
    {SYS_ftruncate, {kFd, kOffset}},
    {SYS_fallocate, {kFd, kHex, kOffset, kOffset}},
    {SYS_fadvise64, {kFd, kOffset, kOffset, kInt}},
    {SYS_fsync, {kFd}},
    {SYS_fdatasync, {kFd}},
    {SYS_flock, {kFd, kHex}},
    {SYS_dup, {kFd}},
    {SYS_dup2, {kFd, kFd}},
    {SYS_dup3, {kFd, kFd, kDescriptorFlags}},
    {SYS_fcntl, {kFd, kFileControl, kUnsigned}},
    {SYS_ioctl, {kFd, kDeviceControl, kPointer}},
    {SYS_pipe, {kPairOut}},
    {SYS_pipe2, {kPairOut, kDescriptorFlags}},
    {SYS_umask, {kMode}},
    {SYS_sendfile, {kFd, kFd, kPointer, kUnsigned}},
    {SYS_copy_file_range, {kFd, kPointer, kFd, kPointer, kUnsigned, kHex}},
    {SYS_getxattr, {kPath, kPath, kPointer, kUnsigned}},
    {SYS_lgetxattr, {kPath, kPath, kPointer, kUnsigned}},
    {SYS_fgetxattr, {kFd, kPath, kPointer, kUnsigned}},
    {SYS_memfd_create, {kPath, kHex}},
    // Waiting
    {SYS_poll, {kPointer, kUnsigned, kInt}},
    {SYS_ppoll, {kPointer, kUnsigned, kTime, kPointer, kUnsigned}},
    {SYS_select, {kInt, kPointer, kPointer, kPointer, kPointer}},
    {SYS_pselect6, {kInt, kPointer, kPointer, kPointer, kTime, kPointer}},
    {SYS_epoll_create1, {kDescriptorFlags}},
    {SYS_epoll_ctl, {kFd, kEpoll, kFd, kPointer}},
    {SYS_epoll_wait, {kFd, kPointer, kInt, kInt}},
    {SYS_epoll_pwait, {kFd, kPointer, kInt, kInt, kPointer, kUnsigned}},
    {SYS_eventfd2, {kUnsigned, kDescriptorFlags}},
    {SYS_timerfd_create, {kClock, kDescriptorFlags}},
    {SYS_timerfd_settime, {kFd, kHex, kPointer, kPointer}},
    {SYS_inotify_init1, {kDescriptorFlags}},
    // Memory
    {SYS_brk, {kPointer}, true},
    {SYS_mmap, {kPointer, kUnsigned, kProtection, kMapFlags, kFd, kHex}, true},
    {SYS_munmap, {kPointer, kUnsigned}},
    {SYS_mprotect, {kPointer, kUnsigned, kProtection}},
    {SYS_mremap, {kPointer, kUnsigned, kUnsigned, kRemapFlags}, true},
    {SYS_madvise, {kPointer, kUnsigned, kAdvice}},
    {SYS_msync, {kPointer, kUnsigned, kHex}},
    {SYS_mlock, {kPointer, kUnsigned}},
    {SYS_munlock, {kPointer, kUnsigned}},
    {SYS_mincore, {kPointer, kUnsigned, kPointer}},
    // Processes and threads
    {SYS_execve, {kPath, kArgv, kEnvironment}},
    {SYS_clone, {kCloneFlags, kPointer, kPointer, kPointer, kHex}},
    {SYS_clone3, {kPointer, kUnsigned}},
    {SYS_fork, {}},
    {SYS_vfork, {}},
    {SYS_exit, {kInt}},
    {SYS_exit_group, {kInt}},
    {SYS_wait4, {kInt, kStatusOut, kWaitFlags, kPointer}},
    {SYS_waitid, {kInt, kInt, kPointer, kWaitFlags, kPointer}},
    {SYS_getpid, {}},
    {SYS_getppid, {}},
    {SYS_gettid, {}},
    {SYS_getuid, {}},
    {SYS_geteuid, {}},
    {SYS_getgid, {}},
    {SYS_getegid, {}},
    {SYS_getpgrp, {}},
    {SYS_setsid, {}},
    {SYS_getpgid, {kInt}},
    {SYS_getsid, {kInt}},
    {SYS_setpgid, {kInt, kInt}},
    {SYS_set_tid_address, {kPointer}},
    {SYS_set_robust_list, {kPointer, kUnsigned}},
    {SYS_rseq, {kPointer, kUnsigned, kHex, kHex}},
    {SYS_futex, {kPointer, kFutex, kInt, kPointer, kPointer, kHex}},
    {SYS_arch_prctl, {kArchitecture, kPointer}},
    {SYS_prctl, {kInt, kHex, kHex, kHex, kHex}},
    {SYS_sched_yield, {}},
    {SYS_sched_getaffinity, {kInt, kUnsigned, kPointer}},
    {SYS_sched_setaffinity, {kInt, kUnsigned, kPointer}},
    {SYS_prlimit64, {kInt, kResource, kPointer, kLimitOut}},
    {SYS_getrlimit, {kResource, kLimitOut}},
    {SYS_setrlimit, {kResource, kPointer}},
    {SYS_getrusage, {kInt, kPointer}},
    {SYS_sysinfo, {kPointer}},
    {SYS_uname, {kPointer}},
    {SYS_getrandom, {kPointer, kUnsigned, kRandomFlags}},
    {SYS_getgroups, {kInt, kPointer}},
    // Signals
    {SYS_rt_sigaction, {kSignal, kPointer, kPointer, kUnsigned}},
    {SYS_rt_sigprocmask, {kSignalMask, kPointer, kPointer, kUnsigned}},
    {SYS_rt_sigreturn, {}},
    {SYS_rt_sigpending, {kPointer, kUnsigned}},
    {SYS_rt_sigsuspend, {kPointer, kUnsigned}},
    {SYS_rt_sigtimedwait, {kPointer, kPointer, kTime, kUnsigned}},
    {SYS_sigaltstack, {kPointer, kPointer}},
    {SYS_kill, {kInt, kSignal}},
    {SYS_tkill, {kInt, kSignal}},
    {SYS_tgkill, {kInt, kInt, kSignal}},
    {SYS_pause, {}},
    {SYS_alarm, {kUnsigned}},
    {SYS_setitimer, {kInt, kPointer, kPointer}},
    {SYS_getitimer, {kInt, kPointer}},
    // Time
    {SYS_clock_gettime, {kClock, kTimeOut}},
    {SYS_clock_getres, {kClock, kTimeOut}},
    {SYS_clock_nanosleep, {kClock, kHex, kTime, kPointer}},
    {SYS_nanosleep, {kTime, kPointer}},
    {SYS_gettimeofday, {kPointer, kPointer}},
    {SYS_time, {kPointer}},
    {SYS_times, {kPointer}},
    // Sockets
    {SYS_socket, {kDomain, kSocketType, kInt}},
    {SYS_socketpair, {kDomain, kSocketType, kInt, kPairOut}},
    {SYS_connect, {kFd, kAddress, kUnsigned}},
    {SYS_bind, {kFd, kAddress, kUnsigned}},
    {SYS_listen, {kFd, kInt}},
    {SYS_accept, {kFd, kPointer, kPointer}},
    {SYS_accept4, {kFd, kPointer, kPointer, kDescriptorFlags}},
    {SYS_sendto, {kFd, kBytes, kUnsigned, kMessageFlags, kPointer, kUnsigned}},
    {SYS_recvfrom, {kFd, kBytesOut, kUnsigned, kMessageFlags, kPointer, kPointer}},
    {SYS_sendmsg, {kFd, kPointer, kMessageFlags}},
    {SYS_recvmsg, {kFd, kPointer, kMessageFlags}},
    {SYS_shutdown, {kFd, kInt}},
    {SYS_getsockname, {kFd, kPointer, kPointer}},
    {SYS_getpeername, {kFd, kPointer, kPointer}},
    {SYS_setsockopt, {kFd, kInt, kInt, kPointer, kUnsigned}},
    {SYS_getsockopt, {kFd, kInt, kInt, kPointer, kPointer}},
};

std::array<const Signature*, Observer::kOthers> make_table() {
    std::array<const Signature*, Observer::kOthers> table{};
    for (const Signature& signature : kSignatures) table[signature.number] = &signature;
    return table;
}

std::string pointer(u64 address) {
    return address == 0 ? "NULL" : hexadecimal(address);
}

std::string octal(u64 mode) {
    char text[24];
    std::snprintf(text, sizeof text, "%#03llo", static_cast<unsigned long long>(mode));
    return text;
}

// --- What addresses lead to ----------------------------------------------------------------------

std::string bytes_at(Thread& thread, u64 address, u64 size) {
    std::vector<char> bytes(std::min<u64>(size, kShown));
    if (!thread.space().copy_in(address, {reinterpret_cast<u8*>(bytes.data()), bytes.size()})) {
        return pointer(address);
    }
    return quote(bytes, size > kShown);
}

std::string path_at(Thread& thread, u64 address) {
    const auto path = address == 0 ? std::nullopt : thread.show_string(address);
    return path ? quote(*path) : pointer(address);
}

std::string strings_at(Thread& thread, u64 address, bool count_only) {
    std::string text = "[";
    for (unsigned n = 0;; ++n) {
        u64 string = 0;
        if (!thread.space().load(address + 8 * n, string) || n == 4096) return pointer(address);
        if (string == 0) {
            if (!count_only) return text + "]";
            return pointer(address) + " /* " + std::to_string(n) + " vars */";
        }
        if (count_only || n > kShownArguments) continue;
        if (n != 0) text += ", ";
        const auto argument = n == kShownArguments ? std::nullopt : thread.space().string(string);
        text += argument ? quote(std::span(*argument).first(std::min(argument->size(), kShown)),
                                 argument->size() > kShown)
                         : "...";
    }
}

std::string time_at(Thread& thread, u64 address) {
    timespec time{};
    if (!thread.space().load(address, time)) return pointer(address);
    return "{tv_sec=" + std::to_string(time.tv_sec) + ", tv_nsec=" + std::to_string(time.tv_nsec) +
           "}";
}

std::string stat_at(Thread& thread, u64 address) {
    struct stat about{};
    if (!thread.space().load(address, about)) return pointer(address);
    const char* type = "0";
    switch (about.st_mode & S_IFMT) {
        case S_IFREG:
            type = "S_IFREG";
            break;
        case S_IFDIR:
            type = "S_IFDIR";
            break;
        case S_IFCHR:
            type = "S_IFCHR";
            break;
        case S_IFBLK:
            type = "S_IFBLK";
            break;
        case S_IFLNK:
            type = "S_IFLNK";
            break;
        case S_IFIFO:
            type = "S_IFIFO";
            break;
        case S_IFSOCK:
            type = "S_IFSOCK";
            break;
    }
    std::string text = "{st_mode=" + std::string(type);
    for (auto [bit, name] :
         {std::pair{S_ISUID, "|S_ISUID"}, {S_ISGID, "|S_ISGID"}, {S_ISVTX, "|S_ISVTX"}}) {
        if (about.st_mode & static_cast<mode_t>(bit)) text += name;
    }
    text += "|" + octal(about.st_mode & 0777);
    if (S_ISCHR(about.st_mode) || S_ISBLK(about.st_mode)) {
        const unsigned major = static_cast<unsigned>(about.st_rdev >> 8) & 0xfff;
        const unsigned minor = static_cast<unsigned>(about.st_rdev) & 0xff;
        return text + ", st_rdev=makedev(" + hexadecimal(major) + ", " + hexadecimal(minor) +
               "), ...}";
    }
    return text + ", st_size=" + std::to_string(about.st_size) + ", ...}";
}

std::string status_at(Thread& thread, u64 address) {
    int status = 0;
    if (!thread.space().load(address, status)) return pointer(address);
    if (WIFEXITED(status)) {
        return "[{WIFEXITED(s) && WEXITSTATUS(s) == " + std::to_string(WEXITSTATUS(status)) + "}]";
    }
    if (WIFSIGNALED(status)) {
        return "[{WIFSIGNALED(s) && WTERMSIG(s) == " + signal_name(WTERMSIG(status)) + "}]";
    }
    return "[" + hexadecimal(static_cast<u32>(status)) + "]";
}

std::string limit_at(Thread& thread, u64 address) {
    const auto number = [](rlim_t value) -> std::string {
        if (value == RLIM_INFINITY) return "RLIM64_INFINITY";
        if (value > 1024 && value % 1024 == 0) return std::to_string(value / 1024) + "*1024";
        return std::to_string(value);
    };
    rlimit limit{};
    if (!thread.space().load(address, limit)) return pointer(address);
    return "{rlim_cur=" + number(limit.rlim_cur) + ", rlim_max=" + number(limit.rlim_max) + "}";
}

std::string address_at(Thread& thread, u64 address, u64 size) {
    sockaddr_storage where{};
    if (size > sizeof where || size < sizeof where.ss_family ||
        !thread.space().copy_in(address, {reinterpret_cast<u8*>(&where), size})) {
        return pointer(address);
    }
    const std::string family = "{sa_family=" + flag_names(kDomain, where.ss_family);
    char text[INET6_ADDRSTRLEN] = "";
    if (where.ss_family == AF_INET && size >= sizeof(sockaddr_in)) {
        const auto& in = reinterpret_cast<const sockaddr_in&>(where);
        ::inet_ntop(AF_INET, &in.sin_addr, text, sizeof text);
        return family + ", sin_port=htons(" + std::to_string(ntohs(in.sin_port)) +
               "), sin_addr=inet_addr(\"" + text + "\")}";
    }
    if (where.ss_family == AF_INET6 && size >= sizeof(sockaddr_in6)) {
        const auto& in = reinterpret_cast<const sockaddr_in6&>(where);
        ::inet_ntop(AF_INET6, &in.sin6_addr, text, sizeof text);
        return family + ", sin6_port=htons(" + std::to_string(ntohs(in.sin6_port)) +
               "), sin6_addr=\"" + text + "\"}";
    }
    if (where.ss_family == AF_UNIX && size > sizeof where.ss_family) {
        const auto& in = reinterpret_cast<const sockaddr_un&>(where);
        const std::size_t most = std::min<std::size_t>(size, sizeof in) - sizeof in.sun_family;
        const std::size_t length = in.sun_path[0] == 0 ? most : ::strnlen(in.sun_path, most);
        return family + ", sun_path=" + quote({in.sun_path, length}) + "}";
    }
    return family + ", ...}";
}

}  // namespace

// --- What is said of a call ----------------------------------------------------------------------

const Signature* find_signature(u32 number) {
    static const auto table = make_table();
    return number < table.size() ? table[number] : nullptr;
}

unsigned count_arguments(const Signature* signature, const Arguments& arguments) {
    if (signature == nullptr) return 6;
    unsigned count = 0;
    while (count < 6 && signature->kinds[count] != kNone) ++count;
    switch (signature->number) {
        case SYS_open:
        case SYS_openat:
            if (!(arguments[count - 2] & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)))) --count;
            break;
        case SYS_fcntl:
            if (arguments[1] == F_GETFD || arguments[1] == F_GETFL) count = 2;
            break;
        case SYS_futex:
            if (const u64 command = arguments[1] & 0x7f; command <= 1) {
                count = command == 0 ? 4 : 3;  // FUTEX_WAIT has a time, FUTEX_WAKE not even that
            }
            break;
        default:
            break;
    }
    return count;
}

std::string describe(Thread& thread, Kind kind, const Arguments& arguments, unsigned n,
                     std::optional<s64> result) {
    const u64 value = arguments[n];
    const u64 size = n < 5 ? arguments[n + 1] : 0;
    switch (kind) {
        case kNone:
        case kHex:
            return hexadecimal(value);
        case kInt:
            // Those that are int are so in the low half, whatever is above it.
            return std::to_string(value >> 32 == 0 ? s64{static_cast<s32>(value)}
                                                   : static_cast<s64>(value));
        case kOffset:
            return std::to_string(static_cast<s64>(value));
        case kUnsigned:
            return std::to_string(value);
        case kPointer:
            return pointer(value);
        case kFd:
            return std::to_string(static_cast<s32>(value));
        case kFolder:
            return static_cast<s32>(value) == AT_FDCWD ? "AT_FDCWD"
                                                       : std::to_string(static_cast<s32>(value));
        case kPath:
            return path_at(thread, value);
        case kBytes:
            return bytes_at(thread, value, size);
        case kMode:
        case kOpenMode:
            return octal(value & 07777);
        case kTime:
            return value == 0 ? "NULL" : time_at(thread, value);
        case kArgv:
        case kEnvironment:
            return strings_at(thread, value, kind == kEnvironment);
        case kAddress:
            return address_at(thread, value, size);
        case kSignal:
            return signal_name(static_cast<int>(value));
        case kCloneFlags: {
            const int number = static_cast<int>(value & 0xff);
            std::string text =
                value == static_cast<u64>(number) ? "" : flag_names(kind, value & ~u64{0xff});
            if (number != 0) text += (text.empty() ? "" : "|") + signal_name(number);
            return text.empty() ? "0" : text;
        }
        case kFutex: {
            std::string text = flag_names(kind, value & 0xffff'ffff);
            const std::size_t at = text.find("|FUTEX_PRIVATE_FLAG");
            if (at != std::string::npos) text.replace(at, 19, "_PRIVATE");
            return text;
        }
        default:
            break;
    }
    if (kind < kOut) return flag_names(kind, value & 0xffff'ffff);
    if (!result || *result < 0 || value == 0) return pointer(value);
    switch (kind) {
        case kBytesOut:
            return bytes_at(thread, value, std::min(static_cast<u64>(*result), size));
        case kStringOut: {
            // (getcwd() counts the end, readlink() has none.)
            std::string text = bytes_at(thread, value, static_cast<u64>(*result));
            if (text.ends_with("\\0\"")) text.replace(text.size() - 3, 3, "\"");
            return text;
        }
        case kStat:
            return stat_at(thread, value);
        case kTimeOut:
            return time_at(thread, value);
        case kPairOut: {
            s32 pair[2];
            if (!thread.space().load(value, pair)) return pointer(value);
            return "[" + std::to_string(pair[0]) + ", " + std::to_string(pair[1]) + "]";
        }
        case kStatusOut:
            return *result == 0 ? pointer(value) : status_at(thread, value);
        case kLimitOut:
            return limit_at(thread, value);
        default:
            return pointer(value);
    }
}

std::string describe_result(u32 number, s64 result) {
    if (result < 0 && result > -4096) {
        const int error = static_cast<int>(-result);
        const char* name = ::strerrorname_np(error);
        const char* text = ::strerrordesc_np(error);
        return name == nullptr || text == nullptr ? "-1 (errno " + std::to_string(error) + ")"
                                                  : "-1 " + std::string(name) + " (" + text + ")";
    }
    const Signature* signature = find_signature(number);
    if (number == SYS_umask) return octal(static_cast<u64>(result));
    return signature != nullptr && signature->address ? hexadecimal(static_cast<u64>(result))
                                                      : std::to_string(result);
}

std::string quote(std::span<const char> bytes, bool more) {
    std::string text = "\"";
    for (std::size_t n = 0; n < bytes.size(); ++n) {
        const auto byte = static_cast<unsigned char>(bytes[n]);
        constexpr char kEscaped[] = "\t\n\v\f\r\"\\", kLetters[] = "tnvfr\"\\";
        if (const char* found = byte == 0 ? nullptr : ::strchr(kEscaped, byte)) {
            text += '\\';
            text += kLetters[found - kEscaped];
        } else if (byte >= ' ' && byte < 0x7f) {
            text += static_cast<char>(byte);
        } else {
            const bool digit = n + 1 < bytes.size() && bytes[n + 1] >= '0' && bytes[n + 1] <= '7';
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, digit ? "\\%03o" : "\\%o", byte);
            text += escaped;
        }
    }
    return text + (more ? "\"..." : "\"");
}

std::string signal_name(int number) {
    if (number >= 32 && number <= 64) return "SIGRT_" + std::to_string(number - 32);
    const char* name = ::sigabbrev_np(number);
    return name == nullptr ? std::to_string(number) : "SIG" + std::string(name);
}

}  // namespace polyvisor::process
