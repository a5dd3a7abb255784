// PID 1 of the guests that `polyvisor exec` boots: sets up what a program expects of a Linux
// system, runs one command with its stdin, stdout and stderr on the second serial port (channel.h),
// tells the host how it ended and powers off. With no command to run it starts a shell on the
// console.
//
// One loop, one thread. Output to the host waits for the port, which is what slows down a command
// that prints faster than the host reads; stdin never waits, so a command that does not read cannot
// keep init from hearing signals or the command's end.
#include <asm/termios.h>
#include <linux/signalfd.h>
#include <linux/sockios.h>

#include "channel.h"
#include "command.h"

enum { kRows = 24, kColumns = 80, kEndOfInput = 4 };

static struct Command command;
static struct Parser parser;
static struct {
    int channel;             ///< the serial port, or negative: nobody is there
    int in, out, error_out;  ///< our ends of the command's pipes; all one for a terminal
    int pid;
    u32 pending_used;  ///< stdin that the command has not taken yet
    int in_ended;
    struct winsize window;
} state = {.channel = -1, .in = -1, .out = -1, .error_out = -1};

static u8 pending[kWindow + 1];  // one more for the terminal's end-of-input character

static void mount_at(const char* type, const char* target, int flags, const char* options) {
    SYS(mount, type, target, type, flags, options);
}

static void set_up_system(void) {
    mount_at("proc", "/proc", kMsNosuid | kMsNodev | kMsNoexec, 0);
    mount_at("sysfs", "/sys", kMsNosuid | kMsNodev | kMsNoexec, 0);
    mount_at("devtmpfs", "/dev", kMsNosuid, "mode=755");
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
    channel_drain(state.channel);
    SYS(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, 0);
    for (;;) SYS(poll, 0, 0, -1);  // a machine that cannot: PID 1 must not end all the same
}

static void send_failure(enum Stage stage, long error) {
    u8 payload[5] = {(u8)stage};
    for (int i = 0; i < 4; i++) payload[1 + i] = (u8)((u32)-error >> 8 * i);
    channel_send(state.channel, 'f', payload, sizeof payload);
}

// --- the command's process -------------------------------------------------------------------

struct Report {
    long stage, error;
};

static void set_mask(u64 mask) {
    SYS(rt_sigprocmask, kSigSetMask, &mask, 0, sizeof mask);
}

static void __attribute__((noreturn)) become_command(int in, int out, int error_out, int report) {
    struct Report failure = {kStageStart, 0};
    SYS(setsid, 0);
    SYS(dup2, in, 0);
    SYS(dup2, out, 1);
    SYS(dup2, error_out, 2);
    if (command.terminal) SYS(ioctl, 0, TIOCSCTTY, 0);
    set_mask(0);
    if (command.directory && (failure.error = SYS(chdir, command.directory)) < 0) {
        failure.stage = kStageDirectory;
    } else {
        failure.stage = kStageExec;
        failure.error = command_exec(&command);
    }
    SYS(write, report, &failure, sizeof failure);
    SYS(exit_group, 127);
    __builtin_unreachable();
}

static long open_terminal(void) {
    int master = (int)SYS(open, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    int unlocked = 0;
    if (master < 0) return master;
    SYS(ioctl, master, TIOCSPTLCK, &unlocked);
    SYS(ioctl, master, TIOCSWINSZ, &state.window);
    state.in = state.out = master;
    return SYS(ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

/// Starts the command; what keeps it from running goes to the host. False when it does not run.
static int start_command(void) {
    int in[2], out[2], error_out[2], report[2];
    SYS(pipe2, report, O_CLOEXEC);
    if (command.terminal) {
        long slave = open_terminal();
        if (slave < 0) {
            send_failure(kStageStart, slave);
            return 0;
        }
        in[0] = out[1] = error_out[1] = (int)slave;
    } else {
        SYS(pipe2, in, O_CLOEXEC);
        SYS(pipe2, out, O_CLOEXEC);
        SYS(pipe2, error_out, O_CLOEXEC);
        SYS(fcntl, in[1], F_SETFL, O_NONBLOCK);
        SYS(fcntl, out[0], F_SETFL, O_NONBLOCK);
        SYS(fcntl, error_out[0], F_SETFL, O_NONBLOCK);
        state.in = in[1];
        state.out = out[0];
        state.error_out = error_out[0];
    }
    long pid = SYS(fork, 0);
    if (pid == 0) become_command(in[0], out[1], error_out[1], report[1]);
    SYS(close, report[1]);
    SYS(close, in[0]);
    if (!command.terminal) {
        SYS(close, out[1]);
        SYS(close, error_out[1]);
    }
    if (pid < 0) {
        send_failure(kStageStart, pid);
        return 0;
    }
    state.pid = (int)pid;
    struct Report failure;
    if (SYS(read, report[0], &failure, sizeof failure) == sizeof failure) {
        send_failure((enum Stage)failure.stage, failure.error);
        return 0;
    }
    SYS(close, report[0]);
    return 1;
}

// --- stdin, stdout, stderr -------------------------------------------------------------------

static void close_input(void) {
    if (state.in >= 0 && state.in != state.out) SYS(close, state.in);
    state.in = -1;
}

/// Gives the command what it will take of the stdin that is waiting, and the host that much credit.
static void push_input(void) {
    u32 taken = 0;
    while (taken < state.pending_used && state.in >= 0) {
        long done = SYS(write, state.in, pending + taken, state.pending_used - taken);
        if (done == -EAGAIN || done == -EINTR) break;
        if (done < 0)
            close_input();  // the command reads no more
        else
            taken += (u32)done;
    }
    if (state.in < 0) taken = state.pending_used;
    memmove(pending, pending + taken, state.pending_used - taken);
    state.pending_used -= taken;
    if (taken) channel_credit(state.channel, taken);
    if (state.in_ended && !state.pending_used) close_input();
}

/// Sends some of what the command has printed; 0 at the end of the stream, a negative errno when
/// there is nothing (yet).
static long pull_output(int fd, u8 type) {
    u8 data[kMaxPayload];
    long got = SYS(read, fd, data, sizeof data);
    if (got > 0) channel_send(state.channel, type, data, (u32)got);
    return got;
}

/// Whether the stream has ended, after pulling from it; a terminal ends with EIO.
static int at_end(long pulled) {
    return pulled <= 0 && pulled != -EAGAIN && pulled != -EINTR;
}

/// Sends what the command left in the pipe, but no more than a pipe can have held: background
/// processes may keep it open and go on printing.
static void drain_output(int fd, u8 type) {
    for (long left = 256 << 10; fd >= 0 && left > 0;) {
        long got = pull_output(fd, type);
        if (got <= 0) break;
        left -= got;
    }
}

static void on_frame(u8 type, const u8* payload, u32 size) {
    switch (type) {
        case 'i':
            if (state.in_ended) break;
            if (size > kWindow - state.pending_used) size = kWindow - state.pending_used;
            memcpy(pending + state.pending_used, payload, size);
            state.pending_used += size;
            push_input();
            break;
        case 'e':
            if (state.in_ended) break;
            if (command.terminal) pending[state.pending_used++] = kEndOfInput;
            state.in_ended = 1;
            push_input();
            break;
        case 's':
            if (size == 1 && state.pid > 0) SYS(kill, -state.pid, payload[0]);
            break;
        case 'w':
            if (size != 4) break;
            state.window.ws_row = (u16)(payload[0] | payload[1] << 8);
            state.window.ws_col = (u16)(payload[2] | payload[3] << 8);
            if (command.terminal && state.out >= 0)
                SYS(ioctl, state.out, TIOCSWINSZ, &state.window);
            break;
    }
}

/// Collects every process that has ended; true when one of them was the command.
static int reap(int* status) {
    int found = 0;
    for (;;) {
        int ended;
        long pid = SYS(wait4, -1, &ended, kWnohang, 0);
        if (pid <= 0) return found;
        if (pid == state.pid) {
            found = 1;
            *status = ended;
        }
    }
}

static int serve(int children) {
    enum { kChildren, kChannel, kOut, kErrorOut, kIn, kCount };
    int status = 0;
    for (;;) {
        struct pollfd fds[kCount] = {
            [kChildren] = {children, POLLIN, 0},
            [kChannel] = {state.channel, POLLIN, 0},
            [kOut] = {state.out, POLLIN, 0},
            [kErrorOut] = {state.error_out, POLLIN, 0},
            [kIn] = {state.pending_used ? state.in : -1, POLLOUT, 0},
        };
        if (SYS(poll, fds, kCount, -1) < 0) continue;
        if (fds[kIn].revents) push_input();
        if (fds[kChannel].revents && !channel_receive(state.channel, &parser, on_frame)) {
            SYS(close, state.channel);
            state.channel = -1;
        }
        if (fds[kOut].revents && at_end(pull_output(state.out, 'o'))) {
            close_input();
            SYS(close, state.out);
            state.out = -1;
        }
        if (fds[kErrorOut].revents && at_end(pull_output(state.error_out, 'r'))) {
            SYS(close, state.error_out);
            state.error_out = -1;
        }
        if (fds[kChildren].revents) {
            struct signalfd_siginfo ignored;
            SYS(read, children, &ignored, sizeof ignored);
            if (reap(&status)) return status;
        }
    }
}

static void send_exit(int status) {
    int killed = status & 0x7f;
    u8 payload[2] = {killed != 0, (u8)(killed ? killed : status >> 8)};
    channel_send(state.channel, 'x', payload, sizeof payload);
}

static void run_command(int children) {
    if (!start_command()) return;
    int status = serve(children);
    drain_output(state.out, 'o');
    drain_output(state.error_out, 'r');
    send_exit(status);
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
        set_mask(0);
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

void __attribute__((noreturn, used)) init_main(void) {
    state.window.ws_row = kRows;
    state.window.ws_col = kColumns;
    command_load(&command, "/.polyvisor/command");
    set_up_system();
    if (command.argument_count) {
        u64 child_ended = 1ull << (kSigChld - 1);
        set_mask(child_ended);
        int children = (int)SYS(signalfd4, -1, &child_ended, sizeof child_ended, O_CLOEXEC);
        state.channel = channel_open("/dev/ttyS1");
        channel_ready(state.channel);
        run_command(children);
    } else {
        run_shell();
    }
    power_off();
}
