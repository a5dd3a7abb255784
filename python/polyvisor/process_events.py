"""What is seen of a program's system calls: hooks, which are shown one and may answer it, and
events, which are what happened."""

from __future__ import annotations

from polyvisor import _native
from polyvisor.errors import ConfigError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, TypeVar

    Hook = Callable[[_native.SystemCall], int | None]
    F = TypeVar("F", bound=Hook)

#: What a call that has no name is watched by.
_OTHERS = 512


class Event(Record, kw_only=True):
    """Something that a program did. `str(event)` is the line that strace would print of it."""

    #: A system call; a signal that a thread was about to see; the end of a process.
    kind: Literal["call", "signal", "end"]
    pid: int
    tid: int
    #: Seconds since the process VM was made, and that it took.
    start: float
    duration: float
    #: Of a call, as are the next four: "openat".
    name: str
    #: Six integers, 0 to 2**64 - 1: what was in the registers.
    args: tuple[int, ...]
    #: The arguments that the call has, as strace prints them: ("AT_FDCWD", '"/etc/passwd"', ...).
    text: tuple[str, ...]
    #: Those of them that are paths, by number: {1: "/etc/passwd"}.
    strings: dict[int, str]
    #: What it returned, -errno for an error. None: the thread ended in the middle of it.
    result: int | None
    #: 0 for none.
    errno: int
    line: str

    def __str__(self) -> str:
        return self.line


class Hooks:
    """The functions that are shown system calls of one process VM, by the calls' numbers."""

    def __init__(self) -> None:
        self._hooks: dict[tuple[int, bool], list[Hook]] = {}

    def add(self, native: _native.Process, names: tuple[str, ...], after: bool, hook: Hook) -> None:
        if not callable(hook):
            raise ConfigError(f"a hook is a function, not {hook!r}", field="on_syscall")
        numbers = [_number(name) for name in names] if names else range(_OTHERS + 1)
        for number in numbers:
            self._hooks.setdefault((number, after), []).append(hook)
            native.watch(number, after)

    def copy(self) -> Hooks:
        """The same functions, for another process VM: see `watch()`."""
        other = Hooks()
        other._hooks = {key: list(hooks) for key, hooks in self._hooks.items()}
        return other

    def watch(self, native: _native.Process) -> None:
        """Has it show the calls that there are functions for."""
        for number, after in self._hooks:
            native.watch(number, after)

    def __call__(self, call: _native.SystemCall) -> int | None:
        """The first answer that one of them gives."""
        key = min(call.number, _OTHERS), call.result is not None
        for hook in self._hooks.get(key, ()):
            answer = hook(call)
            if answer is not None:
                return answer
        return None


def _number(name: str) -> int:
    number = _native.system_call_number(name)
    if number is None:
        raise ConfigError(
            f"there is no system call {name!r}; names are those of `man 2 syscalls`, as 'openat'",
            field="on_syscall",
        )
    return number


class Observed:
    """What `Process` offers to those who look at what its program does."""

    _hooks: Hooks

    def _checked(self) -> _native.Process:
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        """What it has used until now, and which limits it met: the fields of `Result` from
        `cpu_seconds` to `limits`."""
        return self._checked().usage()

    def system_calls(self) -> dict[str, tuple[int, int]]:
        """Its calls until now: name -> (made, failed)."""
        return self._checked().counts()

    def on_syscall(self, *names: str, after: bool = False) -> Callable[[F], F]:
        """Decorates a function that is shown these system calls (none: all) before they are made::

            @process.on_syscall("openat", "open")
            def no_secrets(call):
                if call.path(call.name == "openat").startswith("/work/secret"):
                    return call.deny(errno.EACCES)

        It is called in the thread that is in `run()`, while the program's own stands still and its
        others go on. It returns None, and the call is served; or an int, and that is its result;
        `call.deny(n)` is -n, which programs see as errno n. What it raises, whatever that is, stops
        the program and comes out of `run()`; another `run()` shows the call again. The first hook
        that answers is the last that is asked.

        With `after` it is shown the call after it was served or answered, with its `result` and
        `duration` (seconds), and returns None. Some calls end the thread and have no "after".

        `call.name`, `.number`, `.args` (six integers), `.pid`, `.tid` say what is called;
        `call.string(n)` is the string that argument `n` points to, `call.path(n)` the path that it
        leads to in the program's tree, links resolved as they are now; `call.fd_path(number)` what
        is open there, or None; `call.read(address, size)` and `call.write(address, data)` reach its
        memory (`MemoryFault` where there is none). All of that is so only until the hook returns
        (`StateMismatch`).

        A string that a hook has been shown is the one that the call is served with, whatever other
        threads write there meanwhile. The rest of memory (buffers, structures, the arguments of
        execve) is not: other threads may change it after the hook has looked. What a path leads to
        may change too, where the program can make links. What the vDSO answers (the time) is no
        system call, and the standard output may come by `write`, `writev`, and others.
        """

        def decorate(hook: F) -> F:
            self._hooks.add(self._checked(), names, after, hook)
            return hook

        return decorate

    def events(self) -> list[Event]:
        """What it did since the last time that this was asked, if `events` were to be kept."""
        return [Event(**fields) for fields in self._checked().events()]

    @property
    def events_lost(self) -> int:
        """Events that were dropped for newer ones, and lines of the trace that found no reader."""
        return self._checked().events_lost
