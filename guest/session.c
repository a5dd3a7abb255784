#include "session.h"

#include <asm/termios.h>
#include <linux/signalfd.h>

enum { kRows = 24, kColumns = 80, kEndOfInput = 4 };

static struct Session* session;
static struct {
    int in, out, error_out;  ///< our ends of the command's pipes; all one for a terminal
    int pid;
    u32 pending_used;  ///< stdin that the command has not taken yet
    int in_ended;
    struct winsize window;
} state = {.in = -1, .out = -1, .error_out = -1, .window = {kRows, kColumns, 0, 0}};

// One more for the terminal's end-of-input character. Costs nothing where it is not touched.
static u8 pending[kSocketWindow + 1];

static void send_failure(enum Stage stage, long error) {
    channel_fail(session->channel, stage, error, "");
}

// --- the command's process -------------------------------------------------------------------

struct Report {
    long stage, error;
};

static void set_mask(u64 mask) {
    SYS(rt_sigprocmask, kSigSetMask, &mask, 0, sizeof mask);
}

// i386 has the numbers of two bytes under the plain names.
#ifdef __NR_setuid32
#define WIDE(name) name##32
#else
#define WIDE(name) name
#endif

static long become_user(const struct Command* command) {
    if (!command->user && !command->group) return 0;
    if (command->terminal) SYS(WIDE(fchown), 0, command->user, -1);
    long error = SYS(WIDE(setgroups), 0, 0);
    if (!error) error = SYS(WIDE(setgid), command->group);
    if (!error) error = SYS(WIDE(setuid), command->user);
    return error;
}

static void __attribute__((noreturn)) become_command(int in, int out, int error_out, int report) {
    struct Command* command = session->command;
    struct Report failure = {kStageStart, 0};
    SYS(setsid, 0);
    SYS(dup2, in, 0);
    SYS(dup2, out, 1);
    SYS(dup2, error_out, 2);
    if (command->terminal) SYS(ioctl, 0, TIOCSCTTY, 0);
    set_mask(0);
    ignore_signal(kSigPipe, 0);
    if ((failure.error = become_user(command)) < 0) {
        failure.stage = kStageStart;
    } else if (command->directory && (failure.error = SYS(chdir, command->directory)) < 0) {
        failure.stage = kStageDirectory;
    } else {
        failure.stage = kStageExec;
        failure.error = command_exec(command);
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
    if (session->command->terminal) {
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
    if (!session->command->terminal) {
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
    if (taken) channel_credit(session->channel, taken);
    if (state.in_ended && !state.pending_used) close_input();
}

/// Sends some of what the command has printed; 0 at the end of the stream, a negative errno when
/// there is nothing (yet).
static long pull_output(int fd, u8 type) {
    return channel_pass(session->channel, type, fd, session->chunk);
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
            if (size > session->window - state.pending_used)
                size = session->window - state.pending_used;
            memcpy(pending + state.pending_used, payload, size);
            state.pending_used += size;
            push_input();
            break;
        case 'e':
            if (state.in_ended) break;
            if (session->command->terminal) pending[state.pending_used++] = kEndOfInput;
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
            if (session->command->terminal && state.out >= 0)
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
    channel_parse(session->parser, on_frame);
    for (;;) {
        struct pollfd fds[kCount] = {
            [kChildren] = {children, POLLIN, 0},
            [kChannel] = {session->channel, POLLIN, 0},
            [kOut] = {state.out, POLLIN, 0},
            [kErrorOut] = {state.error_out, POLLIN, 0},
            [kIn] = {state.pending_used ? state.in : -1, POLLOUT, 0},
        };
        if (SYS(poll, fds, kCount, -1) < 0) continue;
        if (fds[kIn].revents) push_input();
        if (fds[kChannel].revents &&
            !channel_receive(session->channel, session->parser, on_frame)) {
            SYS(close, session->channel);
            session->channel = -1;
            if (session->bound) SYS(kill, -state.pid, kSigKill);
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
    channel_send(session->channel, 'x', payload, sizeof payload);
}

void session_run(struct Session* given) {
    session = given;
    if (session->command->rows) {
        state.window.ws_row = (u16)session->command->rows;
        state.window.ws_col = (u16)session->command->columns;
    }
    u64 child_ended = 1ull << (kSigChld - 1);
    set_mask(child_ended);
    int children = (int)SYS(signalfd4, -1, &child_ended, sizeof child_ended, O_CLOEXEC);
    if (!start_command()) return;
    int status = serve(children);
    drain_output(state.out, 'o');
    drain_output(state.error_out, 'r');
    send_exit(status);
}
