// The host's end of a command's stdin, stdout and stderr: frames on the second serial port.
//
// A frame is 3 bytes of header (type, then the payload's length, 16 bits little-endian) and the
// payload. Numbers in payloads are little-endian too.
//
//   host to guest                          guest to host
//   'i' stdin bytes, within the credit     'R' ready: "PVX1", then the first credit (u32)
//   'e' end of stdin                       'c' credit: that many more bytes of stdin may come (u32)
//   's' signal number for the command (u8) 'o' stdout bytes    'r' stderr bytes
//   'w' window size: rows, columns (u16)   'f' the command cannot be run: stage (u8), errno (u32)
//                                          'x' it ended: 0 exited or 1 killed (u8), status (u8)
//
// Credit is what keeps a serial line without flow control from losing bytes: the host may send no
// more stdin than the guest has room for, counted from what the command has really taken.
#pragma once

#include "sys.h"

enum {
    kHeader = 3,
    kWindow = 16384,     ///< stdin bytes that init can hold for a command that is not reading
    kMaxPayload = 4096,  ///< of the frames that init sends
};

enum Stage { kStageStart = 0, kStageDirectory = 1, kStageExec = 2 };

/// What the host sent, taken apart: `on_frame` gets each complete frame.
struct Parser {
    u8 bytes[kHeader + 65535];
    u32 used;
};

/// Opens and sets up the port: raw, 8 bits, no echo. A negative errno when there is none.
int channel_open(const char* path);
/// Sends one frame; waits while the port is busy. Does nothing when `fd` is negative.
void channel_send(int fd, u8 type, const void* payload, u32 size);
void channel_ready(int fd);
void channel_credit(int fd, u32 bytes);
/// Returns when the port has sent everything.
void channel_drain(int fd);
/// Reads what is there and calls back for each frame; false when the port is gone.
int channel_receive(int fd, struct Parser* parser,
                    void (*on_frame)(u8 type, const u8* payload, u32 size));
