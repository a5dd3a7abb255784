#include "host/init/program.hpp"

#include <asm/ioctls.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <linux/socket.h>

#include "host/init/messages.hpp"
#include "host/init/report.hpp"
#include "host/init/sys.hpp"

// The system call filters, as native/host/seccomp has made them.
extern const polyvisor::u8 pv_filter_default[], pv_filter_default_end[];
extern const polyvisor::u8 pv_filter_system[], pv_filter_system_end[];

namespace polyvisor::host::init {

namespace {

constexpr int kSigSetMask = 2, kSignals = 64, kSigKill = 9;
constexpr unsigned kCloseRangeCloexec = 4;
constexpr int kCapabilities = 64;  // more than any kernel has

void set_capabilities(u64 permitted, u64 inheritable) {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    for (int i = 0; i < 2; ++i) {
        data[i].effective = data[i].permitted = static_cast<u32>(permitted >> (32 * i));
        data[i].inheritable = static_cast<u32>(inheritable >> (32 * i));
    }
    check(sys(__NR_capset, &header, data), "give up capabilities", nullptr);
}

/// From the bounding set, so that no file gives them back.
void bound_capabilities(u64 kept) {
    for (int i = 0; i < kCapabilities; ++i) {
        if (kept & bit(static_cast<unsigned>(i))) continue;
        const long result = sys(__NR_prctl, PR_CAPBSET_DROP, i, 0, 0, 0);
        if (result == -kEinval) return;  // the kernel has no more
        check(result, "give up capabilities", nullptr);
    }
}

void load_filter(Filter filter) {
    if (filter == Filter::kNone) return;
    const u8* begin = filter == Filter::kDefault ? pv_filter_default : pv_filter_system;
    const u8* end = filter == Filter::kDefault ? pv_filter_default_end : pv_filter_system_end;
    struct {
        unsigned short length;
        const u8* code;
    } program{
        static_cast<unsigned short>(static_cast<std::size_t>(end - begin) / sizeof(sock_filter)),
        begin};
    check(sys(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program),
          "filter system calls", nullptr);
}

void set_ids(const Message& message) {
    const Wire& wire = message.wire();
    // The first user's change must not take the capabilities that the rest needs.
    check(sys(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities", nullptr);
    if (wire.flags & kSetGroups) {
        check(sys(__NR_setgroups, wire.groups.count, message.list<u32>(wire.groups)),
              "set the groups", nullptr);
    }
    check(sys(__NR_setresgid, wire.gid, wire.gid, wire.gid), "become the group", nullptr);
    check(sys(__NR_setresuid, wire.uid, wire.uid, wire.uid), "become the user", nullptr);
}

void set_rights(const Message& message) {
    const Wire& wire = message.wire();
    bound_capabilities(wire.capabilities);
    if (wire.flags & kNoNewPrivs) {
        check(sys(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "give up new privileges", nullptr);
    }
    // While there is CAP_SYS_ADMIN, without which it would need no_new_privs.
    load_filter(wire.filter);
    set_ids(message);
    // execve() gives root's program what is bounded; another user's needs ambient capabilities.
    sys(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    set_capabilities(wire.capabilities, wire.uid != 0 ? wire.capabilities : 0);
    for (unsigned i = 0; wire.uid != 0 && i < kCapabilities; ++i) {
        if ((wire.capabilities & bit(i)) == 0) continue;
        check(sys(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0), "keep capabilities",
              nullptr);
    }
}

void reset_signals() {
    for (int i = 1; i <= kSignals; ++i) default_action(i);
    const u64 none = 0;
    sys(__NR_rt_sigprocmask, kSigSetMask, &none, nullptr, 8);
}

void use_terminal(int terminal) {
    sys(__NR_setsid);
    if (terminal < 0) return;
    check(sys(__NR_ioctl, terminal, TIOCSCTTY, 0), "take the terminal", nullptr);
    for (int i = 0; i < 3; ++i) check(sys(__NR_dup3, terminal, i, 0), "use the terminal", nullptr);
}

bool has_slash(const char* text) {
    while (*text != '\0' && *text != '/') ++text;
    return *text == '/';
}

const char* search_path(char* const* environment) {
    for (; *environment != nullptr; ++environment) {
        const char* at = *environment;
        if (at[0] == 'P' && at[1] == 'A' && at[2] == 'T' && at[3] == 'H' && at[4] == '=') {
            return at + 5;
        }
    }
    return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

/// As execvpe(3), but for scripts without a #! line. Returns the error.
long search_and_execute(char* const* arguments, char* const* environment) {
    const char* name = arguments[0];
    if (has_slash(name)) return sys(__NR_execve, name, arguments, environment);
    long error = -kEnoent;
    for (const char* at = search_path(environment);;) {
        char path[4096];
        std::size_t length = 0;
        for (; *at != '\0' && *at != ':' && length < sizeof path - 2; ++at) path[length++] = *at;
        if (length > 0) path[length++] = '/';
        const std::size_t more = length_of(name) + 1;
        if (length + more <= sizeof path) {
            for (std::size_t i = 0; i < more; ++i) path[length + i] = name[i];
            const long result = sys(__NR_execve, path, arguments, environment);
            if (result == -kEacces) error = result;
            if (result != -kEacces && result != -kEnoent && result != -kEnotdir) return result;
        }
        if (*at == '\0') return error;
        if (*at == ':') ++at;
    }
}

/// The offsets of a list become pointers.
char* const* pointers(const Message& message, const WireList& list) {
    auto* entries = const_cast<u64*>(message.list<u64>(list));
    for (u64 i = 0; i < list.count; ++i) {
        entries[i] = reinterpret_cast<u64>(message.text(entries[i]));
    }
    return reinterpret_cast<char* const*>(entries);
}

}  // namespace

int open_terminal(const Message& message) {
    if ((message.wire().flags & kTerminal) == 0) return -1;
    // (init is in its new root: these paths are its own.)
    const Fd master(check(sys(__NR_openat, kCwd, "/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC),
                          "make a terminal of", "/dev/pts/ptmx"));
    const int unlocked = 0;
    check(sys(__NR_ioctl, master.get(), TIOCSPTLCK, &unlocked), "unlock the terminal", nullptr);
    const long slave =
        check(sys(__NR_ioctl, master.get(), TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC),
              "open the terminal", nullptr);
    sys(__NR_fchown, slave, message.wire().uid, -1);
    send_terminal(master.get());
    return static_cast<int>(slave);
}

void become_setup_user(const Wire& wire) {
    check(sys(__NR_setresgid, wire.setup_gid, wire.setup_gid, wire.setup_gid), "become the group",
          nullptr);
    check(sys(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities", nullptr);
    check(sys(__NR_setresuid, wire.setup_uid, wire.setup_uid, wire.setup_uid), "become the user",
          nullptr);
    set_capabilities(all_capabilities(), 0);
}

void execute(const Message& message, int terminal) {
    const Wire& wire = message.wire();
    use_terminal(terminal);
    const auto* limits = message.list<WireRlimit>(wire.rlimits);
    for (u64 i = 0; i < wire.rlimits.count; ++i) {
        const u64 values[2] = {limits[i].soft, limits[i].hard};
        check(sys(__NR_prlimit64, 0, limits[i].resource, values, nullptr), "set a resource limit",
              nullptr);
    }
    char* const* arguments = pointers(message, wire.argv);
    char* const* environment = pointers(message, wire.env);
    // Whatever was left open ends here: a descriptor of a folder would lead out of the root.
    check(sys(kSysCloseRange, kControlFd, ~0u, kCloseRangeCloexec), "close descriptors", nullptr);
    reset_signals();
    set_rights(message);
    // (Last, as another user's credentials undo it.) Where init is PID 1 the kernel sees to it.
    if ((wire.flags & (kAttach | kDetached)) == kAttach) {
        check(sys(__NR_prctl, PR_SET_PDEATHSIG, kSigKill, 0, 0, 0), "end with init", nullptr);
    }
    sys(__NR_umask, 022);
    const char* directory = message.text(wire.cwd);
    check(sys(__NR_chdir, directory), "enter the directory", directory);
    fail(search_and_execute(arguments, environment), "execute", arguments[0]);
}

u64 all_capabilities() {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    check(sys(__NR_capget, &header, data), "read the capabilities", nullptr);
    return data[0].permitted | u64{data[1].permitted} << 32;
}

void default_action(int signal) {
    struct {
        u64 handler, flags, restorer, mask;
    } const standard{};
    sys(__NR_rt_sigaction, signal, &standard, nullptr, 8);
}

void drop_rights() {
    const u64 kept = all_capabilities() & bit(CAP_KILL);
    sys(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    check(sys(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "give up new privileges", nullptr);
    set_capabilities(kept, 0);
}

}  // namespace polyvisor::host::init
