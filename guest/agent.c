// The guest's side of Machine.agent(): runs commands and moves files for the host. It listens on a
// vsock port, to which nobody but the host can connect, and has a process for each connection,
// which does one thing:
//
//   - the host sends 'q' frames, which together are the request, in records as in command.h, and
//   'b':
//     begin. Beside those for a command there are
//         G FILE: send it          P FILE: make it, with the permissions  o MODE (decimal)
//   - of a command, the frames are those of channel.h.
//   - of a file that the host gets, 'z' is first: mode, user, group (u32 each), size, time of the
//     last change (u64 each); then 'o' has its bytes, and 'x' 0 0 ends it.
//   - for a file that the host makes, it sends 'i' within the credit, and 'e'; 'x' 0 0 answers.
//   - 'f' is the answer when it cannot be done.
//
// A command ends when its connection does.
#include "session.h"

#include <linux/signalfd.h>
#include <linux/stat.h>

enum {
    kPort = 20566,
    kHostCid = 2,
    kAfVsock = 40,
    kSockStream = 1,
    kMaxSessions = 256,
    kWaitMs = 100,
};

// Its header wants a C library's struct sockaddr.
struct VsockAddress {
    u16 family, reserved;
    u32 port, cid;
    u8 rest[4];
};

static struct Command command;
static struct Parser parser;
static struct Session session = {.command = &command,
                                 .parser = &parser,
                                 .channel = -1,
                                 .window = kSocketWindow,
                                 .chunk = kSocketPayload,
                                 .bound = 1};
static char request[2 << 20];
static usize request_size;
static const char* get_path;
static const char* put_path;
static long mode = 0644;
static int file = -1;
static int ended;

static void __attribute__((noreturn)) leave(void) {
    SYS(exit_group, 0);
    __builtin_unreachable();
}

static void __attribute__((noreturn)) fail(long error) {
    channel_fail(session.channel, kStageFile, error, "");
    leave();
}

static void finish(void) {
    u8 payload[2] = {0, 0};
    channel_send(session.channel, 'x', payload, sizeof payload);
}

static void put_number(u8** at, u64 value, int bytes) {
    for (int i = 0; i < bytes; i++) *(*at)++ = (u8)(value >> 8 * i);
}

static void send_file(void) {
    file = (int)SYS(open, get_path, O_RDONLY | O_CLOEXEC | O_LARGEFILE);
    if (file < 0) fail(file);
    struct statx about;
    long error = SYS(statx, file, "", 0x1000 /* AT_EMPTY_PATH */, STATX_BASIC_STATS, &about);
    if (error < 0) fail(error);
    u8 payload[28];
    u8* at = payload;
    put_number(&at, about.stx_mode, 4);
    put_number(&at, about.stx_uid, 4);
    put_number(&at, about.stx_gid, 4);
    put_number(&at, about.stx_size, 8);
    put_number(&at, (u64)about.stx_mtime.tv_sec, 8);
    channel_send(session.channel, 'z', payload, sizeof payload);
    long got;
    while ((got = channel_pass(session.channel, 'o', file, kSocketPayload)) > 0) {
    }
    if (got < 0) fail(got);
    finish();
}

static void on_file_frame(u8 type, const u8* payload, u32 size) {
    if (type == 'e') ended = 1;
    if (type != 'i' || ended) return;
    for (u32 done = 0; done < size;) {
        long wrote = SYS(write, file, payload + done, size - done);
        if (wrote < 0 && wrote != -EINTR) fail(wrote);
        if (wrote > 0) done += (u32)wrote;
    }
    channel_credit(session.channel, size);
}

static void take_file(void) {
    file = (int)SYS(open, put_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_LARGEFILE, mode);
    if (file < 0) fail(file);
    channel_parse(&parser, on_file_frame);
    while (!ended) {
        if (!channel_receive(session.channel, &parser, on_file_frame)) leave();
    }
    SYS(fchmod, file, mode);  // whatever the umask, and for a file that was there
    long error = SYS(close, file);
    if (error < 0) fail(error);
    finish();
}

static void on_request_frame(u8 type, const u8* payload, u32 size) {
    if (type == 'q') {
        if (size > sizeof request - 1 - request_size) fail(-E2BIG);
        memcpy(request + request_size, payload, size);
        request_size += size;
    } else if (type == 'b') {
        ended = 1;
        parser.stop = 1;
    }
}

static void read_request(void) {
    while (!ended) {
        if (!channel_receive(session.channel, &parser, on_request_frame)) leave();
    }
    ended = 0;
    for (usize at = 0; at < request_size; at += length_of(request + at) + 1) {
        char* record = request + at;
        switch (record[0]) {
            case 'G':
                get_path = record + 1;
                break;
            case 'P':
                put_path = record + 1;
                break;
            case 'o':
                mode = number_of(record + 1);
                break;
            default:
                command_add(&command, record);
        }
    }
}

static void __attribute__((noreturn)) serve_host(int connection) {
    session.channel = connection;
    channel_ready(connection, session.window);
    read_request();
    if (get_path)
        send_file();
    else if (put_path)
        take_file();
    else if (command.argument_count)
        session_run(&session);
    else
        finish();  // it only wanted to know whether somebody is here
    leave();
}

/// The socket that listens. Waits for the kernel to have vsock: its module may come later.
static int open_listener(void) {
    struct VsockAddress address = {.family = kAfVsock, .port = kPort, .cid = (u32)-1};
    for (;;) {
        int fd = (int)SYS(socket, kAfVsock, kSockStream | O_CLOEXEC, 0);
        if (fd >= 0) {
            if (SYS(bind, fd, &address, sizeof address) == 0 && SYS(listen, fd, 128) == 0)
                return fd;
            SYS(close, fd);
        }
        SYS(poll, 0, 0, kWaitMs);
    }
}

void __attribute__((noreturn, used)) program_main(void) {
    ignore_signal(kSigPipe, 1);  // a host that went away, a command that reads no more
    u64 child_ended = 1ull << (kSigChld - 1);
    SYS(rt_sigprocmask, kSigBlock, &child_ended, 0, sizeof child_ended);
    int children = (int)SYS(signalfd4, -1, &child_ended, sizeof child_ended, O_CLOEXEC);
    int listener = open_listener();
    int sessions = 0;
    for (;;) {
        struct pollfd fds[2] = {{children, POLLIN, 0},
                                {sessions < kMaxSessions ? listener : -1, POLLIN, 0}};
        if (SYS(poll, fds, 2, -1) < 0) continue;
        if (fds[0].revents) {
            struct signalfd_siginfo ignored;
            SYS(read, children, &ignored, sizeof ignored);
            while (SYS(wait4, -1, 0, kWnohang, 0) > 0) sessions--;
        }
        if (!fds[1].revents) continue;
        struct VsockAddress peer = {0};
        int size = sizeof peer;
        int connection = (int)SYS(accept4, listener, &peer, &size, O_CLOEXEC);
        if (connection < 0) continue;
        // Programs of the guest can connect to themselves where vsock has a loopback.
        if (peer.cid == kHostCid) {
            long pid = SYS(fork, 0);
            if (pid == 0) {
                SYS(close, listener);
                serve_host(connection);
            }
            sessions += pid > 0;
        }
        SYS(close, connection);
    }
}
