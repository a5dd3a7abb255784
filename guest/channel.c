#include "channel.h"

int channel_open(const char* path) {
    int fd = (int)SYS(open, path, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return fd;
    struct termios mode;
    memset(&mode, 0, sizeof mode);
    mode.c_cflag = B115200 | CS8 | CREAD | CLOCAL;
    mode.c_cc[VMIN] = 1;
    long error = SYS(ioctl, fd, TCSETS, &mode);
    if (error < 0) {  // what a port without hardware behind it answers
        SYS(close, fd);
        return (int)error;
    }
    SYS(ioctl, fd, TCFLSH, TCIFLUSH);
    // Output waits; reading does not, as it is asked for only when there is something.
    SYS(fcntl, fd, F_SETFL, O_RDWR);
    return fd;
}

void channel_send(int fd, u8 type, const void* payload, u32 size) {
    if (fd < 0) return;
    u8 frame[kHeader + 512] = {type, (u8)size, (u8)(size >> 8)};
    memcpy(frame + kHeader, payload, size);
    write_all(fd, frame, kHeader + size);
}

long channel_pass(int fd, u8 type, int from, u32 most) {
    static u8 frame[kHeader + kMaxPayload];
    long got = SYS(read, from, frame + kHeader, most);
    if (got <= 0 || fd < 0) return got;
    frame[0] = type;
    frame[1] = (u8)got;
    frame[2] = (u8)(got >> 8);
    write_all(fd, frame, kHeader + (usize)got);
    return got;
}

static void put32(u8* at, u32 value) {
    for (int i = 0; i < 4; i++) at[i] = (u8)(value >> 8 * i);
}

void channel_ready(int fd, u32 credit) {
    u8 payload[8] = {'P', 'V', 'X', '1'};
    put32(payload + 4, credit);
    channel_send(fd, 'R', payload, sizeof payload);
}

void channel_credit(int fd, u32 bytes) {
    u8 payload[4];
    put32(payload, bytes);
    channel_send(fd, 'c', payload, sizeof payload);
}

void channel_fail(int fd, enum Stage stage, long error, const char* what) {
    u8 payload[5 + 256] = {(u8)stage};
    usize size = length_of(what);
    if (size > 256) size = 256;
    put32(payload + 1, (u32)-error);
    memcpy(payload + 5, what, size);
    channel_send(fd, 'f', payload, 5 + (u32)size);
}

void channel_drain(int fd) {
    if (fd >= 0) SYS(ioctl, fd, TCSBRK, 1);
}

int channel_receive(int fd, struct Parser* parser,
                    void (*on_frame)(u8 type, const u8* payload, u32 size)) {
    long got = SYS(read, fd, parser->bytes + parser->used, sizeof parser->bytes - parser->used);
    if (got == -EINTR || got == -EAGAIN) return 1;
    if (got <= 0) return 0;
    parser->used += (u32)got;
    channel_parse(parser, on_frame);
    return 1;
}

void channel_parse(struct Parser* parser, void (*on_frame)(u8 type, const u8* payload, u32 size)) {
    u32 at = 0;
    parser->stop = 0;
    while (!parser->stop && parser->used - at >= kHeader) {
        const u8* frame = parser->bytes + at;
        u32 size = frame[1] | (u32)frame[2] << 8;
        if (parser->used - at < kHeader + size) break;
        at += kHeader + size;
        on_frame(frame[0], frame + kHeader, size);
    }
    memmove(parser->bytes, parser->bytes + at, parser->used - at);
    parser->used -= at;
}
