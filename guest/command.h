// What to run: /.polyvisor/command of the initramfs, a list of NUL-terminated records whose first
// letter says what the rest is:
//
//   a ARGUMENT (once per argument, the program first)    e NAME=VALUE (once per variable)
//   d DIRECTORY to start in    h HOSTNAME    t[ROWS COLUMNS] (give the command a terminal)
//   u USER, g GROUP: their numbers
//   m FILE of a kernel module to load (once per module, in that order)
//   r (become the init of a root file system on a disk instead: root.h)
#pragma once

#include "sys.h"

enum { kMaxArguments = 4096, kMaxVariables = 1024, kMaxModules = 256 };

struct Command {
    char* arguments[kMaxArguments + 1];
    char* environment[kMaxVariables + 1];
    char* modules[kMaxModules];
    int argument_count, variable_count, module_count;
    const char* directory;
    const char* hostname;
    int terminal;
    long rows, columns;  ///< of the terminal; 0: the usual ones
    long user, group;    ///< 0: root
    int root;
};

/// Takes one record, which stays where it is.
void command_add(struct Command* command, char* record);
/// Reads the file; leaves `argument_count` zero when there is none.
void command_load(struct Command* command, const char* path);
/// Becomes the command, found by the PATH of its own environment as a shell would find it. Returns
/// only on failure: a negative errno.
long command_exec(struct Command* command);
