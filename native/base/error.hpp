// Host and configuration errors. A guest's mistakes are never reported with these: see the header
// of each device and engine for what the guest gets instead. src/errors.cpp maps each class to the
// Python exception of the same name, fields included.
#pragma once

#include <stdexcept>
#include <string>

#include "base/types.hpp"

namespace polyvisor {

/// Base of all errors that polyvisor raises. what() is one sentence: what, where, what to do.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// A value in a configuration or call that cannot be used. `field` names it.
class ConfigError : public Error {
  public:
    ConfigError(std::string field, const std::string& message)
        : Error(message), field(std::move(field)) {}
    std::string field;
};

/// A guest-physical range that is not (wholly) backed by memory, or overlaps another region.
class MemoryRangeError : public Error {
  public:
    MemoryRangeError(u64 gpa, u64 size, const std::string& message)
        : Error(message), gpa(gpa), size(size) {}
    u64 gpa;
    u64 size;
};

/// A system call of the host that failed. `code` is errno; `path` may be empty.
class HostError : public Error {
  public:
    HostError(int code, std::string path, const std::string& message);
    int code;
    std::string path;
};

/// A saved state that cannot be restored; nothing was changed.
class StateError : public Error {
  public:
    StateError(std::string field, const std::string& message)
        : Error(message), field(std::move(field)) {}
    std::string field;
};

/// An engine that cannot run here. `reason` is a short key: "missing", "permission", "version", ...
class EngineUnavailable : public Error {
  public:
    EngineUnavailable(std::string engine, std::string reason, const std::string& message)
        : Error(message), engine(std::move(engine)), reason(std::move(reason)) {}
    std::string engine;
    std::string reason;
};

/// A limit that this host cannot keep. `controller` is the cgroup controller that is missing.
class LimitUnavailable : public Error {
  public:
    LimitUnavailable(std::string controller, const std::string& message)
        : Error(message), controller(std::move(controller)) {}
    std::string controller;
};

/// A call that the object's present state forbids (running, closed, ...).
class StateMismatch : public Error {
  public:
    using Error::Error;
};

/// Throws HostError for the current errno: "what: strerror".
[[noreturn]] void throw_errno(const std::string& what, const std::string& path = {});

}  // namespace polyvisor
