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
    u8 frame[kHeader + kMaxPayload] = {type, (u8)size, (u8)(size >> 8)};
    memcpy(frame + kHeader, payload, size);
    write_all(fd, frame, kHeader + size);
}

static void put32(u8* at, u32 value) {
    for (int i = 0; i < 4; i++) at[i] = (u8)(value >> 8 * i);
}

void channel_ready(int fd) {
    u8 payload[8] = {'P', 'V', 'X', '1'};
    put32(payload + 4, kWindow);
    channel_send(fd, 'R', payload, sizeof payload);
}

void channel_credit(int fd, u32 bytes) {
    u8 payload[4];
    put32(payload, bytes);
    channel_send(fd, 'c', payload, sizeof payload);
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
    u32 at = 0;
    while (parser->used - at >= kHeader) {
        const u8* frame = parser->bytes + at;
        u32 size = frame[1] | (u32)frame[2] << 8;
        if (parser->used - at < kHeader + size) break;
        on_frame(frame[0], frame + kHeader, size);
        at += kHeader + size;
    }
    memmove(parser->bytes, parser->bytes + at, parser->used - at);
    parser->used -= at;
    return 1;
}
