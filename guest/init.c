// PID 1 of the guests that `polyvisor exec` boots: sets up what a program expects of a Linux
// system, runs one command with its stdin, stdout and stderr on the second serial port (channel.h),
// tells the host how it ended and powers off. With no command to run it starts a shell on the
// console. The initrd of disk images has the same init, which then only finds the root file system.
//
#include <linux/sockios.h>

#include "channel.h"
#include "command.h"
#include "root.h"
#include "session.h"

static struct Command command;
static struct Parser parser;
static struct Session session = {.command = &command,
                                 .parser = &parser,
                                 .channel = -1,
                                 .window = kSerialWindow,
                                 .chunk = kSerialPayload};
static void mount_at(const char* type, const char* target, int flags, const char* options) {
    SYS(mount, type, target, type, flags, options);
}

static void mount_kernel(void) {
    mount_at("proc", "/proc", kMsNosuid | kMsNodev | kMsNoexec, 0);
    mount_at("sysfs", "/sys", kMsNosuid | kMsNodev | kMsNoexec, 0);
    mount_at("devtmpfs", "/dev", kMsNosuid, "mode=755");
}

static void set_up_system(void) {
    SYS(mkdir, "/dev/pts", 0755);
    SYS(mkdir, "/dev/shm", 01777);
    mount_at("devpts", "/dev/pts", kMsNosuid | kMsNoexec, "mode=620,gid=5,ptmxmode=666");
    mount_at("tmpfs", "/dev/shm", kMsNosuid | kMsNodev, "mode=1777");
    SYS(symlink, "/proc/self/fd", "/dev/fd");
    SYS(symlink, "/proc/self/fd/0", "/dev/stdin");
    SYS(symlink, "/proc/self/fd/1", "/dev/stdout");
    SYS(symlink, "/proc/self/fd/2", "/dev/stderr");

    const char* hostname = command.hostname ? command.hostname : "polyvisor";
    SYS(sethostname, hostname, length_of(hostname));

    int fd = (int)SYS(socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */, 0);
    if (fd >= 0) {
        // struct ifreq; its header wants a C library's.
        struct {
            char name[16];
            u16 flags;
            char rest[22];
        } request = {"lo", 0x41 /* IFF_UP | IFF_RUNNING */, ""};
        SYS(ioctl, fd, SIOCSIFFLAGS, &request);
        SYS(close, fd);
    }
}

static void __attribute__((noreturn)) power_off(void) {
    SYS(sync, 0);
    channel_drain(session.channel);
    SYS(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, 0);
    for (;;) SYS(poll, 0, 0, -1);  // a machine that cannot: PID 1 must not end all the same
}

/// Loads the modules. Returns the path of one that the kernel refused, with its reason in `error`,
/// or nothing.
static const char* load_modules(long* error) {
    for (int i = 0; i < command.module_count; i++) {
        const char* path = command.modules[i];
        long fd = SYS(open, path, O_RDONLY | O_CLOEXEC);
        *error = fd < 0 ? fd : SYS(finit_module, fd, "", 0);
        if (fd >= 0) SYS(close, fd);
        SYS(unlink, path);  // its memory is the guest's again
        if (*error < 0 && *error != -EEXIST) return path;
    }
    return 0;
}

// --- no command: a shell on the console ------------------------------------------------------

static void run_shell(void) {
    static char* arguments[] = {"-sh", 0};
    static char* environment[] = {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
        "TERM=vt102", 0};
    long pid = SYS(fork, 0);
    if (pid == 0) {
        SYS(setsid, 0);
        // The first open of a terminal by a session leader makes it the controlling one.
        int fd = (int)SYS(open, "/dev/ttyS0", O_RDWR);
        for (int i = 0; fd >= 0 && i < 3; i++) SYS(dup2, fd, i);
        SYS(chdir, "/root");
        SYS(execve, "/bin/sh", arguments, environment);
        SYS(exit_group, 127);
    }
    int status;
    while (pid > 0 && SYS(wait4, -1, &status, 0, 0) != pid) {
    }
}

void __attribute__((noreturn, used)) program_main(void) {
    command_load(&command, "/.polyvisor/command");
    mount_kernel();
    long error = 0;
    const char* refused = load_modules(&error);
    if (command.root) {
        root_become();
        SYS(exit_group, 1);  // the kernel panics, behind the reason that the console was told
    }
    set_up_system();
    root_mount_shares("");
    if (command.argument_count) {
        session.channel = channel_open("/dev/ttyS1");
        channel_ready(session.channel, session.window);
        if (refused)
            channel_fail(session.channel, kStageModule, error, refused);
        else
            session_run(&session);
    } else {
        run_shell();
    }
    power_off();
}
