"""Every exception that polyvisor raises on purpose.

The text is one sentence that says what went wrong, where, and what to do. What a program may want
to know is in the fields, so that nobody has to parse the sentence. The classes up to
`StateMismatch` have a C++ twin of the same name in ``native/base/error.hpp``; ``src/errors.cpp``
translates.
"""

from __future__ import annotations


class Error(Exception):
    """Base class of all of polyvisor's own exceptions."""


class ConfigError(Error, ValueError):
    """A value in a configuration or a call that cannot be used; `field` names it."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class MemoryRangeError(Error, IndexError):
    """Guest-physical range [`gpa`, `gpa` + `size`) is not backed by memory, or is taken already."""

    def __init__(self, message: str, *, gpa: int = 0, size: int = 0) -> None:
        super().__init__(message)
        self.gpa = gpa
        self.size = size


class MemoryFault(Error, LookupError):
    """The byte at guest-virtual address `gva` cannot be read or written.

    `level` is the name of the entry that is in the way ("PTE", "PDE", ...; "" when none is),
    `entry` its value and `entry_address` where it is in memory (None for a register). `physical` is
    where the byte would be, when it is mapped to where there is no memory; else None.
    """

    def __init__(
        self,
        message: str,
        *,
        gva: int = 0,
        level: str = "",
        entry: int | None = None,
        entry_address: int | None = None,
        physical: int | None = None,
    ) -> None:
        super().__init__(message)
        self.gva = gva
        self.level = level
        self.entry = entry
        self.entry_address = entry_address
        self.physical = physical


class HostError(Error):
    """A system call of the host failed: its `errno`, and the `path` it was about ("" for none)."""

    def __init__(self, message: str, *, errno: int = 0, path: str = "") -> None:
        super().__init__(message)
        self.errno = errno
        self.path = path


class StateError(Error, ValueError):
    """A saved or given state that no machine can be in; nothing was changed. `field` names it."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class EngineUnavailable(Error):
    """`engine` cannot run here. `reason` is a key: "missing" (no device, or no driver behind it),
    "permission", "version" (of the kernel's API), "busy" (another hypervisor has the CPU) or
    "broken" (it does not do what it should). The message says what helps."""

    def __init__(self, message: str, *, engine: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.engine = engine
        self.reason = reason


class LimitUnavailable(Error):
    """A limit that this host cannot keep, for want of the cgroup `controller` ("memory", "cpu",
    "pids", "cpuset", "io", "devices"); nothing was started. The message says what helps."""

    def __init__(self, message: str, *, controller: str = "") -> None:
        super().__init__(message)
        self.controller = controller


class StateMismatch(Error, RuntimeError):
    """The call does not fit what the machine is doing now (running, ended, closed, ...)."""


class ImageError(Error):
    """A kernel, initrd or other guest file that cannot be used: its `path`, and a `reason` key."""

    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason


class DeviceError(Error):
    """A device written in Python raised; the machine was stopped.

    The device's own exception, with its traceback, is ``__cause__``. `device` is its class's name,
    `access` is "read", "write", "timer" or "reset", `offset` and `size` are those of the access.
    """

    def __init__(
        self, message: str, *, device: str = "", access: str = "", offset: int = 0, size: int = 0
    ) -> None:
        super().__init__(message)
        self.device = device
        self.access = access
        self.offset = offset
        self.size = size


class MachineTimeout(Error, TimeoutError):
    """The machine did not end within `seconds` and was stopped."""

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class EngineFailure(Error):
    """The engine could not go on with a program; the message says why."""


class ProcessTimeout(Error, TimeoutError):
    """A program did not end within `seconds`. `stdout` and `stderr` are what it had written."""

    def __init__(
        self, message: str, *, seconds: float, stdout: bytes = b"", stderr: bytes = b""
    ) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.stdout = stdout
        self.stderr = stderr


class ProcessEnded(Error):
    """A program ended before it did what it was to do; `result` (`process.Result`) says how."""

    def __init__(self, message: str, *, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class ConsoleTimeout(Error, TimeoutError):
    """`pattern` did not appear on the console within `seconds`; `tail` is the console's end."""

    def __init__(
        self, message: str, *, pattern: str = "", seconds: float = 0.0, tail: str = ""
    ) -> None:
        super().__init__(message)
        self.pattern = pattern
        self.seconds = seconds
        self.tail = tail


class ConsoleClosed(Error, EOFError):
    """The machine ended before `pattern` appeared on its console; `tail` is the console's end."""

    def __init__(self, message: str, *, pattern: str = "", tail: str = "") -> None:
        super().__init__(message)
        self.pattern = pattern
        self.tail = tail


class GuestError(Error):
    """The guest did not do what was asked of it (it panicked, ...); `tail` is its console's end."""

    def __init__(self, message: str, *, reason: str = "", tail: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.tail = tail


__all__ = [
    "ConfigError",
    "ConsoleClosed",
    "ConsoleTimeout",
    "DeviceError",
    "EngineUnavailable",
    "Error",
    "GuestError",
    "HostError",
    "ImageError",
    "LimitUnavailable",
    "MachineTimeout",
    "MemoryFault",
    "MemoryRangeError",
    "StateError",
    "StateMismatch",
]
