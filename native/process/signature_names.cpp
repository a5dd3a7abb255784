// The names of flags and values in system calls' arguments.
#include <asm/prctl.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "process/signatures.hpp"

namespace polyvisor::process {

namespace {

struct Name {
    u64 value;
    const char* text;
};

// `values` are the names of what `mask` leaves of a value, one of which it is; `bits` those of the
// rest, of which it is any number.
struct Names {
    u64 mask = 0;
    std::span<const Name> values{};
    std::span<const Name> bits{};
};

#define PV(name) {static_cast<u64>(name), #name}

constexpr Name kOpenModes[] = {PV(O_RDONLY), PV(O_WRONLY), PV(O_RDWR)};
constexpr Name kOpenBits[] = {
    PV(O_CREAT),    PV(O_EXCL),      PV(O_NOCTTY),   PV(O_TRUNC),   PV(O_APPEND),
    PV(O_NONBLOCK), PV(O_SYNC),      PV(O_DSYNC),    PV(O_ASYNC),   {0100000, "O_LARGEFILE"},
    PV(O_TMPFILE),  PV(O_DIRECTORY), PV(O_NOFOLLOW), PV(O_CLOEXEC), PV(O_DIRECT),
    PV(O_NOATIME),  PV(O_PATH)};
constexpr Name kProtectionZero[] = {PV(PROT_NONE)};
constexpr Name kProtections[] = {PV(PROT_READ), PV(PROT_WRITE), PV(PROT_EXEC), PV(PROT_GROWSDOWN),
                                 PV(PROT_GROWSUP)};
constexpr Name kMapTypes[] = {PV(MAP_FILE), PV(MAP_SHARED), PV(MAP_PRIVATE),
                              PV(MAP_SHARED_VALIDATE)};
constexpr Name kMapBits[] = {PV(MAP_FIXED),          PV(MAP_ANONYMOUS), PV(MAP_32BIT),
                             PV(MAP_NORESERVE),      PV(MAP_POPULATE),  PV(MAP_NONBLOCK),
                             PV(MAP_GROWSDOWN),      PV(MAP_DENYWRITE), PV(MAP_EXECUTABLE),
                             PV(MAP_LOCKED),         PV(MAP_STACK),     PV(MAP_HUGETLB),
                             PV(MAP_FIXED_NOREPLACE)};
constexpr Name kRemapBits[] = {PV(MREMAP_MAYMOVE), PV(MREMAP_FIXED)};
constexpr Name kCloneBits[] = {PV(CLONE_VM),
                               PV(CLONE_FS),
                               PV(CLONE_FILES),
                               PV(CLONE_SIGHAND),
                               PV(CLONE_PIDFD),
                               PV(CLONE_PTRACE),
                               PV(CLONE_VFORK),
                               PV(CLONE_PARENT),
                               PV(CLONE_THREAD),
                               PV(CLONE_NEWNS),
                               PV(CLONE_SYSVSEM),
                               PV(CLONE_SETTLS),
                               PV(CLONE_NEWUSER),
                               PV(CLONE_PARENT_SETTID),
                               PV(CLONE_CHILD_CLEARTID),
                               PV(CLONE_DETACHED),
                               PV(CLONE_NEWPID),
                               PV(CLONE_NEWNET),
                               PV(CLONE_CHILD_SETTID)};
constexpr Name kMaskWays[] = {PV(SIG_BLOCK), PV(SIG_UNBLOCK), PV(SIG_SETMASK)};
constexpr Name kWhences[] = {PV(SEEK_SET), PV(SEEK_CUR), PV(SEEK_END), PV(SEEK_DATA),
                             PV(SEEK_HOLE)};
constexpr Name kAccessZero[] = {PV(F_OK)};
constexpr Name kAccessBits[] = {PV(R_OK), PV(W_OK), PV(X_OK)};
constexpr Name kAtBits[] = {PV(AT_SYMLINK_NOFOLLOW), PV(AT_REMOVEDIR), PV(AT_SYMLINK_FOLLOW),
                            PV(AT_NO_AUTOMOUNT), PV(AT_EMPTY_PATH)};
constexpr Name kAccessFlagBits[] = {PV(AT_EACCESS), PV(AT_SYMLINK_NOFOLLOW), PV(AT_EMPTY_PATH)};
constexpr Name kFileControls[] = {
    PV(F_DUPFD),         PV(F_GETFD),      PV(F_SETFD),      PV(F_GETFL),     PV(F_SETFL),
    PV(F_GETLK),         PV(F_SETLK),      PV(F_SETLKW),     PV(F_SETOWN),    PV(F_GETOWN),
    PV(F_DUPFD_CLOEXEC), PV(F_GETPIPE_SZ), PV(F_SETPIPE_SZ), PV(F_ADD_SEALS), PV(F_GET_SEALS)};
constexpr Name kDeviceControls[] = {PV(TCGETS),     PV(TCSETS),    PV(TCSETSW),  PV(TIOCGWINSZ),
                                    PV(TIOCSWINSZ), PV(FIONREAD),  PV(FIONBIO),  PV(FIOCLEX),
                                    PV(FIONCLEX),   PV(TIOCGPGRP), PV(TIOCSPGRP)};
constexpr Name kDomains[] = {PV(AF_UNSPEC),  PV(AF_UNIX),   PV(AF_INET), PV(AF_INET6),
                             PV(AF_NETLINK), PV(AF_PACKET), PV(AF_VSOCK)};
constexpr Name kSocketTypes[] = {PV(SOCK_STREAM), PV(SOCK_DGRAM), PV(SOCK_RAW), PV(SOCK_SEQPACKET)};
constexpr Name kSocketBits[] = {PV(SOCK_CLOEXEC), PV(SOCK_NONBLOCK)};
constexpr Name kMessageBits[] = {PV(MSG_OOB),      PV(MSG_PEEK),     PV(MSG_DONTROUTE),
                                 PV(MSG_TRUNC),    PV(MSG_DONTWAIT), PV(MSG_WAITALL),
                                 PV(MSG_NOSIGNAL), PV(MSG_MORE),     PV(MSG_CMSG_CLOEXEC)};
constexpr Name kFutexes[] = {PV(FUTEX_WAIT),        PV(FUTEX_WAKE),       PV(FUTEX_REQUEUE),
                             PV(FUTEX_CMP_REQUEUE), PV(FUTEX_WAKE_OP),    PV(FUTEX_LOCK_PI),
                             PV(FUTEX_UNLOCK_PI),   PV(FUTEX_TRYLOCK_PI), PV(FUTEX_WAIT_BITSET),
                             PV(FUTEX_WAKE_BITSET)};
constexpr Name kFutexBits[] = {PV(FUTEX_PRIVATE_FLAG), PV(FUTEX_CLOCK_REALTIME)};
constexpr Name kAdvices[] = {PV(MADV_NORMAL),   PV(MADV_RANDOM),   PV(MADV_SEQUENTIAL),
                             PV(MADV_WILLNEED), PV(MADV_DONTNEED), PV(MADV_FREE),
                             PV(MADV_DONTFORK), PV(MADV_HUGEPAGE), PV(MADV_NOHUGEPAGE)};
constexpr Name kClocks[] = {PV(CLOCK_REALTIME),           PV(CLOCK_MONOTONIC),
                            PV(CLOCK_PROCESS_CPUTIME_ID), PV(CLOCK_THREAD_CPUTIME_ID),
                            PV(CLOCK_MONOTONIC_RAW),      PV(CLOCK_REALTIME_COARSE),
                            PV(CLOCK_MONOTONIC_COARSE),   PV(CLOCK_BOOTTIME)};
constexpr Name kResources[] = {
    PV(RLIMIT_CPU), PV(RLIMIT_FSIZE), PV(RLIMIT_DATA),   PV(RLIMIT_STACK),   PV(RLIMIT_CORE),
    PV(RLIMIT_RSS), PV(RLIMIT_NPROC), PV(RLIMIT_NOFILE), PV(RLIMIT_MEMLOCK), PV(RLIMIT_AS)};
constexpr Name kArchitectures[] = {PV(ARCH_SET_GS), PV(ARCH_SET_FS), PV(ARCH_GET_FS),
                                   PV(ARCH_GET_GS)};
constexpr Name kWaitBits[] = {PV(WNOHANG),
                              PV(WSTOPPED),
                              PV(WEXITED),
                              PV(WCONTINUED),
                              PV(WNOWAIT),
                              {0x4000'0000, "__WALL"},
                              {0x8000'0000, "__WCLONE"}};
constexpr Name kRandomBits[] = {PV(GRND_NONBLOCK), PV(GRND_RANDOM)};
constexpr Name kEpolls[] = {PV(EPOLL_CTL_ADD), PV(EPOLL_CTL_DEL), PV(EPOLL_CTL_MOD)};
constexpr Name kDescriptorBits[] = {PV(O_CLOEXEC), PV(O_NONBLOCK), {1, "EFD_SEMAPHORE"}};

#undef PV

Names names_of(Kind kind) {
    switch (kind) {
        case Kind::kOpenFlags:
            return {O_ACCMODE, kOpenModes, kOpenBits};
        case Kind::kProtection:
            return {0, kProtectionZero, kProtections};
        case Kind::kMapFlags:
            return {0xf, kMapTypes, kMapBits};
        case Kind::kRemapFlags:
            return {0, {}, kRemapBits};
        case Kind::kCloneFlags:
            return {0, {}, kCloneBits};
        case Kind::kSignalMask:
            return {~u64{0}, kMaskWays, {}};
        case Kind::kWhence:
            return {~u64{0}, kWhences, {}};
        case Kind::kAccess:
            return {0, kAccessZero, kAccessBits};
        case Kind::kAtFlags:
            return {0, {}, kAtBits};
        case Kind::kAccessFlags:
            return {0, {}, kAccessFlagBits};
        case Kind::kFileControl:
            return {~u64{0}, kFileControls, {}};
        case Kind::kDeviceControl:
            return {~u64{0}, kDeviceControls, {}};
        case Kind::kDomain:
            return {~u64{0}, kDomains, {}};
        case Kind::kSocketType:
            return {0xf, kSocketTypes, kSocketBits};
        case Kind::kMessageFlags:
            return {0, {}, kMessageBits};
        case Kind::kFutex:
            return {0x7f, kFutexes, kFutexBits};
        case Kind::kAdvice:
            return {~u64{0}, kAdvices, {}};
        case Kind::kClock:
            return {~u64{0}, kClocks, {}};
        case Kind::kResource:
            return {~u64{0}, kResources, {}};
        case Kind::kArchitecture:
            return {~u64{0}, kArchitectures, {}};
        case Kind::kWaitFlags:
            return {0, {}, kWaitBits};
        case Kind::kRandomFlags:
            return {0, {}, kRandomBits};
        case Kind::kEpoll:
            return {~u64{0}, kEpolls, {}};
        case Kind::kDescriptorFlags:
            return {0, {}, kDescriptorBits};
        default:
            return {};
    }
}

}  // namespace

std::string hexadecimal(u64 value) {
    char text[24];
    std::snprintf(text, sizeof text, value == 0 ? "0" : "%#llx",
                  static_cast<unsigned long long>(value));
    return text;
}

std::string flag_names(Kind kind, u64 value) {
    const Names names = names_of(kind);
    std::string text;
    const auto add = [&](const std::string& part) {
        if (!text.empty()) text += '|';
        text += part;
    };
    u64 rest = value & ~names.mask;
    if (names.mask != 0 || value == 0) {
        const u64 chosen = value & names.mask;
        bool found = false;
        for (const Name& name : names.values) {
            if (name.value == chosen && !found) add(name.text);
            found = found || name.value == chosen;
        }
        if (!found) rest |= chosen;
    }
    for (const Name& name : names.bits) {
        if ((rest & name.value) != name.value) continue;
        add(name.text);
        rest &= ~name.value;
    }
    if (rest != 0 || text.empty()) add(hexadecimal(rest));
    return text;
}

}  // namespace polyvisor::process
