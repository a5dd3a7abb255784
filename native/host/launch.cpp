#include "host/launch.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "host/clone.hpp"
#include "host/ids.hpp"
#include "host/message.hpp"
#include "host/root_mount.hpp"

namespace polyvisor::host {

namespace {

constexpr u64 kNewTime = 0x80;  // CLONE_NEWTIME: in older headers only for unshare()
constexpr unsigned kMaxFds = 64;
constexpr std::chrono::seconds kKillPatience(30);

struct Kind {
    const char* name;
    u64 flag;
};
constexpr std::array<Kind, 8> kKinds{{{"user", CLONE_NEWUSER},
                                      {"mnt", CLONE_NEWNS},
                                      {"pid", CLONE_NEWPID},
                                      {"net", CLONE_NEWNET},
                                      {"ipc", CLONE_NEWIPC},
                                      {"uts", CLONE_NEWUTS},
                                      {"cgroup", CLONE_NEWCGROUP},
                                      {"time", kNewTime}}};

std::string namespace_path(const std::string& process, const char* kind) {
    return "/proc/" + process + "/ns/" + kind;
}

/// Those in which process `pid` is and this one is not.
u64 other_namespaces(int pid) {
    u64 result = 0;
    for (const Kind& kind : kKinds) {
        struct stat own, other;
        const std::string path = namespace_path(std::to_string(pid), kind.name);
        if (::stat(path.c_str(), &other) != 0) throw_errno("cannot look at the namespaces", path);
        if (::stat(namespace_path("self", kind.name).c_str(), &own) != 0 ||
            own.st_ino != other.st_ino) {
            result |= kind.flag;
        }
    }
    return result;
}

int pid_of(int pidfd) {
    const std::string path = "/proc/self/fdinfo/" + std::to_string(pidfd);
    const OwnedFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    char text[1024] = {};
    const char* found = file && ::read(file.get(), text, sizeof text - 1) > 0
                            ? std::strstr(text, "\nPid:\t")
                            : nullptr;
    const int pid = found != nullptr ? std::atoi(found + 6) : -1;
    if (pid <= 0) throw HostError(ESRCH, "", "the process to be entered has ended");
    return pid;
}

OwnedFd duplicate(int fd) {
    OwnedFd result(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!result) throw_errno("a descriptor cannot be passed on");
    return result;
}

/// Waits until one of two is readable, or it is over.
void poll_two(int one, int other, Launched::Duration patience) {
    pollfd waited[2] = {{one, POLLIN, 0}, {other, POLLIN, 0}};
    const auto nanoseconds = std::max<s64>(patience.count(), 0);
    const timespec limit{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
    if (::ppoll(waited, 2, &limit, nullptr) < 0 && errno != EINTR) throw_errno("poll");
}

}  // namespace

const u64 kAllNamespaces = [] {
    u64 all = 0;
    for (const Kind& kind : kKinds) all |= kind.flag;
    return all;
}();

Launched::~Launched() {
    if (!pidfd_ || status_) return;
    if (detached_ && started_) return;
    try {
        kill();
    } catch (const Error&) {
        // It cannot die now, as a process in an uninterruptible call: SIGKILL is pending.
    }
}

int Launched::open_namespace(const std::string& kind) const {
    const std::string path = namespace_path(std::to_string(pid_), kind.c_str());
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw_errno("the namespace cannot be opened", path);
    return fd;
}

void Launched::start(const LaunchSpec& spec, u64 namespaces) {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) throw_errno("socketpair");
    control_ = OwnedFd(pair[0]);
    const OwnedFd theirs(pair[1]);
    OwnedFd null;
    int standard[3];
    for (int i = 0; i < 3; ++i) {
        standard[i] = spec.standard[i];
        if (standard[i] >= 0) continue;
        if (!null) null = OwnedFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
        if (!null) throw_errno("cannot open", "/dev/null");
        standard[i] = null.get();
    }
    int cgroup = -1;
    for (int fd : spec.cgroups) {
        struct statfs found;
        if (::fstatfs(fd, &found) != 0) throw_errno("a descriptor of cgroups cannot be used");
        if (found.f_type == CGROUP2_SUPER_MAGIC && cgroup < 0) {
            cgroup = fd;  // the kernel makes the child there
        } else {
            fds_.push_back(duplicate(fd));
        }
    }
    if (fds_.size() >= kMaxFds) throw ConfigError("cgroups", "there are too many cgroups");
    // The cgroup namespace's root is the cgroup it is made in: init makes it when it is in its own.
    const Born born =
        clone_init(namespaces & ~u64{CLONE_NEWCGROUP}, cgroup, standard, theirs.get());
    pid_ = born.pid;
    pidfd_ = OwnedFd(born.pidfd);
    init_ = spec.init;
    detached_ = spec.detached;
}

Launched launch(const LaunchSpec& spec) {
    validate(spec, false);
    Launched result;
    result.start(spec, spec.namespaces);
    u32 flags = 0;
    bool groups = true;
    if ((spec.namespaces & CLONE_NEWUSER) != 0) {
        flags |= kUserNamespace;
        groups = write_id_maps(result.pid_, spec.uid_map, spec.gid_map);
    }
    if (groups) flags |= kSetGroups;
    if ((spec.namespaces & CLONE_NEWNET) != 0) flags |= kRaiseLoopback;
    const auto cgroups = static_cast<u32>(result.fds_.size());
    if (spec.idmapped) {
        flags |= kHasRootMount;
        const OwnedFd users(result.open_namespace("user"));
        result.fds_.insert(result.fds_.begin(), make_idmapped_root(spec, users.get()));
    }
    if (spec.oom_score_adj) {
        const std::string path = "/proc/" + std::to_string(result.pid_) + "/oom_score_adj";
        const OwnedFd file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
        const std::string text = std::to_string(*spec.oom_score_adj);
        if (!file || ::write(file.get(), text.data(), text.size()) < 0) {
            throw_errno("the kernel refuses oom_score_adj " + text, path);
        }
    }
    result.message_ = encode(spec, flags, spec.namespaces & CLONE_NEWCGROUP, cgroups);
    return result;
}

Launched attach(int target, const LaunchSpec& spec) {
    validate(spec, true);
    const u64 namespaces = other_namespaces(pid_of(target));
    Launched result;
    result.start(spec, 0);
    u32 flags = kAttach;
    if (namespaces & CLONE_NEWUSER) flags |= kUserNamespace;
    if (::geteuid() == 0) flags |= kSetGroups;
    const auto cgroups = static_cast<u32>(result.fds_.size());
    result.fds_.insert(result.fds_.begin(), duplicate(target));
    result.message_ = encode(spec, flags, namespaces, cgroups);
    return result;
}

void Launched::send() {
    if (sent_) throw StateMismatch("go() was called already");
    sent_ = true;
    // With the first bytes the descriptors, whose copies are init's from then on.
    iovec part{message_.data(), sizeof(u64)};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)];
    if (!fds_.empty()) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(sizeof(int) * fds_.size());
        cmsghdr* rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int) * fds_.size());
        int* at = reinterpret_cast<int*>(CMSG_DATA(rights));
        for (const OwnedFd& fd : fds_) *at++ = fd.get();
    }
    std::size_t done = 0;
    if (::sendmsg(control_.get(), &header, MSG_NOSIGNAL) == sizeof(u64)) done = sizeof(u64);
    while (done != 0 && done < message_.size()) {
        const ssize_t sent =
            ::send(control_.get(), message_.data() + done, message_.size() - done, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) done = 0;
        if (sent > 0) done += static_cast<std::size_t>(sent);
    }
    message_ = {};
    fds_.clear();
    if (done == 0) throw HostError(EPIPE, "", "the sandbox was killed before it was started");
}

/// One message of init's, if there is one; false at its end. Whoever is inside might have sent it.
bool Launched::read_report() {
    WireReport report{};
    iovec part{&report, sizeof report};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    const ssize_t got = ::recvmsg(control_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (got != sizeof report) {
        control_.reset();
        return false;
    }
    if (const cmsghdr* rights = CMSG_FIRSTHDR(&header);
        rights != nullptr && rights->cmsg_type == SCM_RIGHTS) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(rights), sizeof fd);
        terminal_ = OwnedFd(fd);
    }
    switch (report.kind) {
        case ReportKind::kStarted:
            started_ = true;
            break;
        case ReportKind::kEnded:
            reported_ = report.code;
            break;
        case ReportKind::kTerminal:
            break;
        case ReportKind::kFailed: {
            report.what[sizeof report.what - 1] = report.path[sizeof report.path - 1] = '\0';
            std::string sentence = std::string("cannot ") + report.what;
            if (report.path[0] != '\0') sentence += std::string(" ") + report.path;
            errno = report.code;
            throw_errno(sentence + " in the sandbox", report.path);
        }
    }
    return true;
}

bool Launched::started(Duration patience) {
    if (started_) return true;
    poll_two(control_.get(), -1, patience);
    if (!read_report()) {
        // An init that became the program has closed its end as it did; or it was killed.
        if (init_) throw HostError(EPIPE, "", "the sandbox was killed before it was started");
        started_ = true;
    }
    return started_;
}

void Launched::reap() {
    siginfo_t info{};
    for (;;) {
        if (::waitid(static_cast<idtype_t>(3) /* P_PIDFD */, static_cast<id_t>(pidfd_.get()), &info,
                     WEXITED | __WALL) == 0) {
            break;
        }
        if (errno != EINTR) throw_errno("waitid");
    }
    const int own =
        info.si_code == CLD_EXITED ? (info.si_status & 0xff) << 8 : (info.si_status & 0x7f);
    status_ = reported_.value_or(own);
    control_.reset();
}

std::optional<int> Launched::wait(Duration patience) {
    using Clk = std::chrono::steady_clock;
    const auto end = Clk::now() + patience;
    while (!status_) {
        poll_two(control_.get(), pidfd_.get(), end - Clk::now());
        if (control_) read_report();
        pollfd ended{pidfd_.get(), POLLIN, 0};
        if (::poll(&ended, 1, 0) == 1) {
            // What it said last.
            while (control_ && !reported_ &&
                   ::poll(&(ended = {control_.get(), POLLIN, 0}), 1, 0) == 1) {
                read_report();
            }
            reap();
        } else if (Clk::now() >= end) {
            return {};
        }
    }
    return status_;
}

void Launched::kill() {
    if (!pidfd_ || status_) return;
    ::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0);
    control_.reset();
    const auto end = std::chrono::steady_clock::now() + kKillPatience;
    while (!wait(std::chrono::milliseconds(100))) {
        if (std::chrono::steady_clock::now() > end) {
            throw HostError(
                ETIMEDOUT, "",
                "process " + std::to_string(pid_) +
                    " does not end though it was killed; something in the kernel waits");
        }
    }
}

}  // namespace polyvisor::host
