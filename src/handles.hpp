// Python's handles on parts of a machine, which stay safe to touch after it was closed.
#pragma once

#include <unistd.h>

#include <atomic>

#include "base/error.hpp"
#include "core.hpp"

namespace polyvisor::python {

/// A source of one interrupt wire.
class PyIrqLine {
  public:
    PyIrqLine(std::shared_ptr<Core> core, unsigned gsi)
        : core_(core), line_(core->machine().pc().irqs().line(gsi)) {}
    IrqLine& get() { return *line_; }

  private:
    std::shared_ptr<Core> core_;  // the wire leads into its chips
    std::unique_ptr<IrqLine> line_;
};

/// The use of a machine's dirty log, from construction to stop().
class PyDirtyLog {
  public:
    /// Throws StateMismatch when the log is in use, HostError.
    PyDirtyLog(const std::shared_ptr<Core>& core, std::string machine);
    ~PyDirtyLog();
    PyDirtyLog(const PyDirtyLog&) = delete;
    PyDirtyLog& operator=(const PyDirtyLog&) = delete;

    bool active() const { return using_ && !core_.expired(); }
    const char* method() const { return method_; }
    /// ([(gpa, bytes), ...] of adjacent pages joined, [(start of region, its bitmap), ...]).
    py::tuple fetch();
    /// Nothing when it has been stopped before, or the machine is closed.
    void stop();

  private:
    std::weak_ptr<Core> core_;
    std::string machine_;
    pid_t pid_;
    const char* method_ = "";
    std::atomic<bool> using_{true};
};

/// A machine, until it is closed; what can still be told then is kept here.
class PyMachine {
  public:
    explicit PyMachine(MachineConfig config);
    ~PyMachine();

    /// Throws StateMismatch once closed, and in a process that was forked off: the machine's
    /// threads are not in it, and whatever they held locked at that moment stays so.
    std::shared_ptr<Core> core() const;
    /// What core() has, without its checks; nullptr once closed.
    Core* peek() const { return core_.get(); }
    bool closed() const { return core_ == nullptr; }
    const std::string& name() const { return name_; }
    void close();

    const std::shared_ptr<devices::HostConsole>& serial(unsigned index) const;
    const std::shared_ptr<devices::HostConsole>& debug_console() const { return debug_console_; }
    /// How it ended; nothing while it has not.
    std::optional<StopInfo> stop_info() const;
    py::object exception() const { return core_ ? core_->exception() : exception_; }
    std::vector<std::string> log() const { return core_ ? core_->log() : log_; }
    py::dict counters() const;
    Statistics statistics() const;  // bind_statistics.cpp
    u64 now() const { return core_ ? core_->machine().clock().now() : now_; }
    const std::string& engine() const { return engine_; }
    const std::vector<std::shared_ptr<devices::HostConsole>>& consoles() const { return consoles_; }

  private:
    bool forked() const { return ::getpid() != pid_; }

    std::shared_ptr<Core> core_;
    const pid_t pid_ = ::getpid();
    std::string name_, engine_;
    std::vector<std::shared_ptr<devices::HostConsole>> consoles_;
    std::shared_ptr<devices::HostConsole> debug_console_;
    std::optional<StopInfo> stop_;
    py::object exception_ = py::none();
    std::vector<std::string> log_;
    py::dict counters_;
    Statistics statistics_;
    u64 now_ = 0;
};

}  // namespace polyvisor::python
