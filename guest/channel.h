// The host's end of a command's stdin, stdout and stderr: frames on the second serial port (init),
// or on a vsock connection for each command (agent).
//
// A frame is 3 bytes of header (type, then the payload's length, 16 bits little-endian) and the
// payload. Numbers in payloads are little-endian too.
//
//   host to guest                          guest to host
//   'i' stdin bytes, within the credit     'R' ready: "PVX1", then the first credit (u32)
//   'e' end of stdin                       'c' credit: that many more bytes of stdin may come (u32)
//   's' signal number for the command (u8) 'o' stdout bytes    'r' stderr bytes
//   'w' window size: rows, columns (u16)   'f' the command cannot be run: stage (u8), errno (u32),
//                                              the module's file when it is one that failed
//                                          'x' it ended: 0 exited or 1 killed (u8), status (u8)
//
// Credit is what keeps a serial line without flow control from losing bytes: the host may send no
// more stdin than the guest has room for, counted from what the command has really taken.
#pragma once

#include "sys.h"

enum { kHeader = 3, kMaxPayload = 65535 };

enum Stage {
    kStageStart = 0,
    kStageDirectory = 1,
    kStageExec = 2,
    kStageModule = 3,
    kStageFile = 4,
};

/// What the host sent, taken apart: `on_frame` gets each complete frame.
struct Parser {
    u8 bytes[kHeader + kMaxPayload];
    u32 used;
    int stop;  ///< set by `on_frame`: the frames behind that one stay for channel_parse()
};

/// Opens and sets up the port: raw, 8 bits, no echo. A negative errno when there is none.
int channel_open(const char* path);
/// Sends one short frame; waits while the port is busy. Does nothing when `fd` is negative.
void channel_send(int fd, u8 type, const void* payload, u32 size);
/// Reads up to `most` bytes from `from` and sends them. What read() returned.
long channel_pass(int fd, u8 type, int from, u32 most);
void channel_ready(int fd, u32 credit);
void channel_credit(int fd, u32 bytes);
void channel_fail(int fd, enum Stage stage, long error, const char* what);
/// Returns when the port has sent everything.
void channel_drain(int fd);
/// Reads what is there and calls back for each frame; false when the port is gone.
int channel_receive(int fd, struct Parser* parser,
                    void (*on_frame)(u8 type, const u8* payload, u32 size));
/// Calls back for frames that were read already.
void channel_parse(struct Parser* parser, void (*on_frame)(u8 type, const u8* payload, u32 size));
