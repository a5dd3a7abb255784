// What a process is told of itself and its system: identity, limits, segments.
#include <asm/prctl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>

#include <cstring>

#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

// Everything runs as root, of a world in which that means nothing.
s64 sys_zero(Thread&, const Arguments&) {
    return 0;
}

// As in a user namespace that has no other user or group.
template <unsigned count>
s64 sys_set_ids(Thread&, const Arguments& a) {
    for (unsigned n = 0; n < count; ++n) {
        if (static_cast<s32>(a[n]) != 0 && (count == 1 || static_cast<s32>(a[n]) != -1)) {
            return -EINVAL;
        }
    }
    return 0;
}

s64 sys_get_ids(Thread& thread, const Arguments& a) {
    for (unsigned n = 0; n < 3; ++n) {
        if (!thread.space().store(a[n], u32{0})) return -EFAULT;
    }
    return 0;
}

s64 sys_setgroups(Thread&, const Arguments& a) {
    return a[0] == 0 ? 0 : -EPERM;
}

s64 sys_umask(Thread& thread, const Arguments& a) {
    return std::exchange(thread.process().umask, static_cast<u32>(a[0] & 0777));
}

s64 sys_uname(Thread& thread, const Arguments& a) {
    utsname names{};
    std::strcpy(names.sysname, "Linux");
    std::strcpy(names.nodename, "polyvisor");
    std::strcpy(names.release, "6.1.0");
    std::strcpy(names.version, "#1 polyvisor");
    std::strcpy(names.machine, "x86_64");
    return thread.space().store(a[0], names) ? 0 : -EFAULT;
}

s64 sys_sysinfo(Thread& thread, const Arguments& a) {
    struct sysinfo about{};
    about.totalram = thread.kernel().config().vm.memory;
    about.freeram = thread.space().left();
    about.procs = 1;
    about.mem_unit = 1;
    return thread.space().store(a[0], about) ? 0 : -EFAULT;
}

// --- Segments and prctl --------------------------------------------------------------------------

s64 sys_arch_prctl(Thread& thread, const Arguments& a) {
    const bool fs = a[0] == ARCH_SET_FS || a[0] == ARCH_GET_FS;
    const SegmentIndex segment = fs ? kFs : kGs;
    switch (a[0]) {
        case ARCH_SET_FS:
        case ARCH_SET_GS:
            if (a[1] >= AddressSpace::kEnd) return -EPERM;
            thread.vm().supervisor().set_base(thread.cpu, segment, a[1]);
            return 0;
        case ARCH_GET_FS:
        case ARCH_GET_GS:
            return thread.space().store(a[1], thread.vm().supervisor().base(thread.cpu, segment))
                       ? 0
                       : -EFAULT;
        default:
            return -EINVAL;
    }
}

s64 sys_prctl(Thread& thread, const Arguments& a) {
    char name[16]{};
    switch (a[0]) {
        case PR_SET_NAME: {
            const auto wanted = thread.space().string(a[1], sizeof name);
            thread.title = wanted ? *wanted : thread.title;
            return 0;
        }
        case PR_GET_NAME:
            std::strncpy(name, thread.title.c_str(), sizeof name - 1);
            return thread.space().store(a[1], name) ? 0 : -EFAULT;
        case PR_SET_NO_NEW_PRIVS:
        case PR_SET_DUMPABLE:
        case PR_SET_PDEATHSIG:
            return 0;
        case PR_GET_DUMPABLE:
            return 1;
        default:
            return -EINVAL;
    }
}

// --- Limits --------------------------------------------------------------------------------------

s64 sys_prlimit64(Thread& thread, const Arguments& a) {
    if (a[0] != 0 && a[0] != static_cast<u64>(thread.process().pid)) return -ESRCH;
    if (a[1] >= RLIM_NLIMITS) return -EINVAL;
    if (a[3] == 0) return 0;
    rlimit limit{RLIM_INFINITY, RLIM_INFINITY};
    if (a[1] == RLIMIT_NOFILE) limit = {thread.descriptors().most, thread.descriptors().most};
    if (a[1] == RLIMIT_STACK) limit.rlim_cur = 8 << 20;
    if (a[1] == RLIMIT_DATA)
        limit = {thread.kernel().config().vm.memory, thread.kernel().config().vm.memory};
    if (a[1] == RLIMIT_CORE) limit = {0, 0};
    return thread.space().store(a[3], limit) ? 0 : -EFAULT;
}

s64 sys_getrlimit(Thread& thread, const Arguments& a) {
    return sys_prlimit64(thread, {0, a[0], 0, a[1]});
}

s64 sys_sched_getaffinity(Thread& thread, const Arguments& a) {
    if (a[1] < 8) return -EINVAL;
    return thread.space().store(a[2], u64{1}) ? 8 : -EFAULT;
}

s64 sys_getrusage(Thread& thread, const Arguments& a) {
    rusage usage{};
    ::getrusage(RUSAGE_THREAD, &usage);
    return thread.space().store(a[1], usage) ? 0 : -EFAULT;
}

constexpr Call kCalls[] = {
    {SYS_getuid, sys_zero},
    {SYS_geteuid, sys_zero},
    {SYS_getgid, sys_zero},
    {SYS_getegid, sys_zero},
    {SYS_getgroups, sys_zero},
    {SYS_sched_yield, sys_zero},
    {SYS_setuid, sys_set_ids<1>},
    {SYS_setgid, sys_set_ids<1>},
    {SYS_setreuid, sys_set_ids<2>},
    {SYS_setregid, sys_set_ids<2>},
    {SYS_setresuid, sys_set_ids<3>},
    {SYS_setresgid, sys_set_ids<3>},
    {SYS_getresuid, sys_get_ids},
    {SYS_getresgid, sys_get_ids},
    {SYS_setgroups, sys_setgroups},
    {SYS_umask, sys_umask},
    {SYS_uname, sys_uname},
    {SYS_sysinfo, sys_sysinfo},
    {SYS_arch_prctl, sys_arch_prctl},
    {SYS_prctl, sys_prctl},
    {SYS_prlimit64, sys_prlimit64},
    {SYS_getrlimit, sys_getrlimit},
    {SYS_sched_getaffinity, sys_sched_getaffinity},
    {SYS_getrusage, sys_getrusage},
};

}  // namespace

std::span<const Call> process_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
