// How init tells the launcher what became of it.
#pragma once

#include "host/wire.hpp"

namespace polyvisor::host::init {

/// Tells the launcher, and ends this process with status 125. `error` is a negative errno; `path`
/// may be null.
[[noreturn]] void fail(long error, const char* what, const char* path);

/// Whether fail() was called in this memory, which a child may share.
bool has_failed();

/// fail() if `result` is an error; else gives it back.
inline long check(long result, const char* what, const char* path = nullptr) {
    if (result < 0) fail(result, what, path);
    return result;
}

void report(ReportKind kind, int code);

}  // namespace polyvisor::host::init
