// What the arguments of system calls mean, and how strace prints them.
#pragma once

#include <span>
#include <string>

#include "process/observer.hpp"

namespace polyvisor::process {

/// What an argument is.
enum class Kind : u8 {
    kNone,  ///< there are no more
    kInt,
    kOffset,
    kUnsigned,
    kHex,
    kPointer,
    kFd,
    kFolder,  ///< a descriptor of a folder, or AT_FDCWD
    kPath,
    kBytes,  ///< as many as the next argument says
    kMode,
    kOpenMode,  ///< matters only when the flags before it may make a file
    kTime,      ///< struct timespec
    kArgv,
    kEnvironment,
    kAddress,  ///< struct sockaddr of the next argument's size
    kFlags,    ///< the first of those that a table of names describes: see signatures.cpp
    kOpenFlags = kFlags,
    kProtection,
    kMapFlags,
    kRemapFlags,
    kCloneFlags,
    kSignal,
    kSignalMask,
    kWhence,
    kAccess,
    kAtFlags,
    kAccessFlags,
    kFileControl,
    kDeviceControl,
    kDomain,
    kSocketType,
    kMessageFlags,
    kFutex,
    kAdvice,
    kClock,
    kResource,
    kArchitecture,
    kWaitFlags,
    kRandomFlags,
    kEpoll,
    kDescriptorFlags,
    // What a call stores, and is printed when it has.
    kOut,
    kBytesOut = kOut,  ///< as many as the result says
    kStat,
    kTimeOut,
    kPairOut,    ///< of descriptors
    kStatusOut,  ///< of a process that has ended
    kLimitOut,   ///< struct rlimit
    kStringOut,  ///< up to the result, or its end
};

struct Signature {
    u32 number;
    Kind kinds[6];
    bool address = false;  ///< the result is one
};

/// nullptr: it is not known, and all of its arguments are numbers.
const Signature* find_signature(u32 number);
/// How many arguments there are to print; fewer when flags say that the last ones do not matter.
unsigned count_arguments(const Signature* signature, const Arguments& arguments);
/// Argument `n`. What is stored into memory is printed when `result` says that it was.
std::string describe(Thread& thread, Kind kind, const Arguments& arguments, unsigned n,
                     std::optional<s64> result);
/// `= 3`, `= -1 ENOENT (No such file or directory)`, without the `= `.
std::string describe_result(u32 number, s64 result);
/// `O_RDONLY|O_CLOEXEC`, of one of the kinds from kFlags on.
std::string flag_names(Kind kind, u64 value);
/// "0x7f", "0".
std::string hexadecimal(u64 value);
/// In quotes, as C would have it; "..." behind them when there is `more`.
std::string quote(std::span<const char> bytes, bool more = false);
/// "SIGSEGV", "SIGRT_3".
std::string signal_name(int number);

}  // namespace polyvisor::process
