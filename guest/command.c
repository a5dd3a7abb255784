#include "command.h"

// Larger than an initramfs command line can usefully be (Linux itself stops at 2 MiB of arguments
// and environment); a static buffer costs nothing until it is touched.
static char file[2 << 20];

void command_add(struct Command* command, char* record) {
    char* value = record + 1;
    switch (record[0]) {
        case 'a':
            if (command->argument_count < kMaxArguments)
                command->arguments[command->argument_count++] = value;
            break;
        case 'e':
            if (command->variable_count < kMaxVariables)
                command->environment[command->variable_count++] = value;
            break;
        case 'd':
            command->directory = value;
            break;
        case 'h':
            command->hostname = value;
            break;
        case 't':
            command->terminal = 1;
            command->rows = number_of(value);
            while (*value && *value != ' ') value++;
            command->columns = *value ? number_of(value + 1) : 0;
            break;
        case 'u':
            command->user = number_of(value);
            break;
        case 'g':
            command->group = number_of(value);
            break;
        case 'r':
            command->root = 1;
            break;
        case 'm':
            if (command->module_count < kMaxModules)
                command->modules[command->module_count++] = value;
            break;
    }
}

void command_load(struct Command* command, const char* path) {
    int fd = (int)SYS(open, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    usize size = 0;
    for (;;) {
        long got = SYS(read, fd, file + size, sizeof file - 1 - size);
        if (got <= 0) break;
        size += (usize)got;
    }
    SYS(close, fd);
    for (usize at = 0; at < size; at += length_of(file + at) + 1) command_add(command, file + at);
}

static const char* variable(const struct Command* command, const char* name) {
    usize length = length_of(name);
    for (int i = 0; i < command->variable_count; i++) {
        const char* entry = command->environment[i];
        usize at = 0;
        while (at < length && entry[at] == name[at]) at++;
        if (at == length && entry[at] == '=') return entry + at + 1;
    }
    return 0;
}

static long try_exec(struct Command* command, char* path) {
    long error = SYS(execve, path, command->arguments, command->environment);
    if (error != -ENOEXEC) return error;
    // A script without "#!": every shell's execvp() hands it to sh.
    static char* shell[kMaxArguments + 2];
    shell[0] = "/bin/sh";
    shell[1] = path;
    for (int i = 1; i <= command->argument_count; i++) shell[i + 1] = command->arguments[i];
    return SYS(execve, shell[0], shell, command->environment);
}

long command_exec(struct Command* command) {
    char* name = command->arguments[0];
    if (!name[0]) return -ENOENT;
    if (has_slash(name)) return try_exec(command, name);
    const char* directories = variable(command, "PATH");
    if (!directories) directories = "/bin:/usr/bin";
    static char path[4096];
    usize length = length_of(name);
    long found = -ENOENT;
    for (const char* at = directories;; at++) {
        usize size = 0;
        while (at[size] && at[size] != ':') size++;
        if (size + length + 2 <= sizeof path) {
            memcpy(path, at, size);
            path[size] = '/';
            memcpy(path + size + (size != 0), name, length + 1);
            long error = try_exec(command, path);
            // Not being there does not hide that another directory had one that may not be run.
            if (error != -ENOENT && error != -ENOTDIR) found = error;
        }
        at += size;
        if (!*at) return found;
    }
}
