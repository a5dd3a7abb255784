// What to run: /.polyvisor/command of the initramfs, a list of NUL-terminated records whose first
// letter says what the rest is:
//
//   a ARGUMENT (once per argument, the program first)    e NAME=VALUE (once per variable)
//   d DIRECTORY to start in    h HOSTNAME    t (give the command a terminal)
#pragma once

#include "sys.h"

enum { kMaxArguments = 4096, kMaxVariables = 1024 };

struct Command {
    char* arguments[kMaxArguments + 1];
    char* environment[kMaxVariables + 1];
    int argument_count, variable_count;
    const char* directory;
    const char* hostname;
    int terminal;
};

/// Reads the file; leaves `argument_count` zero when there is none.
void command_load(struct Command* command, const char* path);
/// Becomes the command, found by the PATH of its own environment as a shell would find it. Returns
/// only on failure: a negative errno.
long command_exec(struct Command* command);
