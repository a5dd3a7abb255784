// One command for the host: its process, and its stdin, stdout and stderr on a channel. A program
// runs one; the agent has a process for each.
//
// One loop, one thread. Output to the host waits for the channel, which is what slows down a
// command that prints faster than the host reads; stdin never waits, so a command that does not
// read cannot keep us from hearing signals or the command's end.
#pragma once

#include "channel.h"
#include "command.h"

enum {
    kSerialWindow = 16 << 10,
    kSerialPayload = 4 << 10,
    kSocketWindow = 256 << 10,
    kSocketPayload = 32 << 10,
};

struct Session {
    struct Command* command;
    int channel;  ///< or negative: nobody is there
    u32 window;   ///< stdin bytes to hold for a command that is not reading
    u32 chunk;    ///< of output in one frame, at most
    int bound;    ///< the command ends with the channel
    struct Parser* parser;
};

/// Runs the command, and tells the host how it ended or why it did not run. Blocks SIGCHLD. The
/// command's stdin follows the credit of `window` bytes that the host must have been given.
void session_run(struct Session* session);
