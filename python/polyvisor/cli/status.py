"""Exit statuses, and how an exception becomes one clear sentence on stderr."""

from __future__ import annotations

import errno
import os
import sys

from polyvisor import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import Any
else:
    # What `signal` is made of. That makes enumerations of all numbers, which takes a third as long
    # as all that polyvisor imports.
    import _signal

OK = 0
#: `run`: the guest crashed or panicked.
GUEST_FAILED = 1
#: A command line that makes no sense.
USAGE = 2
TIMEOUT = 124
#: polyvisor could not do what was asked: a missing file, no memory, a guest that died, ...
FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
INTERRUPTED = 128 + _signal.SIGINT
BROKEN_PIPE = 128 + _signal.SIGPIPE


def of_execution(error: errors.HostError) -> int:
    """For a command that could not be executed, as shells have it."""
    return {
        errno.ENOENT: NOT_FOUND,
        errno.EACCES: NOT_EXECUTABLE,
        errno.ENOEXEC: NOT_EXECUTABLE,
    }.get(error.errno, FAILED)


#: Lines of the guest's console that are shown with an error.
TAIL_LINES = 100


class Terminated(BaseException):
    """A signal that ends programs arrived; raised in the main thread so that all is tidied up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class signals_raise:  # noqa: N801 -- used as a function
    """A context in which Ctrl-C, SIGTERM and SIGHUP unwind, by an exception that nothing on the way
    takes for its own (as parsers and event loops do with KeyboardInterrupt)."""

    def __enter__(self) -> None:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._ignored
        self._before: dict[int, Any] = {}
        for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
            # What our parent chose to ignore (nohup, a shell's background job) stays ignored.
            if _signal.getsignal(number) != _signal.SIG_IGN:
                self._before[number] = _signal.signal(number, self._raise_it)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            _signal.signal(number, handler)

    @staticmethod
    def _raise_it(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    def _ignored(self, unraisable: sys.UnraisableHookArgs) -> None:
        # The signal came where Python drops exceptions (a finalizer, or the callback of a weak
        # reference, of which an import has many): it comes again, when that is over.
        if isinstance(unraisable.exc_value, Terminated):
            import threading

            later = threading.Timer(0.05, os.kill, (os.getpid(), unraisable.exc_value.number))
            later.daemon = True
            later.start()
        else:
            self._hook(unraisable)


def quietly(write: Callable[[], object]) -> None:
    """Calls it; that nobody is there to read what it writes is no error."""
    try:
        write()
    except (OSError, ValueError):
        return


def say(sentence: str) -> None:
    """One line on stderr, if anybody is there to read it."""
    quietly(lambda: print(f"polyvisor: {sentence}", file=sys.stderr, flush=True))


def note_engine(engine: str) -> None:
    """Says why "auto" does not take KVM where there is one; once per process."""
    if engine != "auto" or os.environ.get("POLYVISOR_ENGINE"):
        return
    from polyvisor import _native

    try:
        note = _native.choose_engine(engine)[1]
    except errors.Error:  # which making the machine will raise, too
        return
    if note:
        say(note)


def show_tail(text: str) -> None:
    """The end of the guest's console on stderr."""
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    shown = "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:])
    if shown:
        quietly(lambda: print(shown, file=sys.stderr, flush=True))


def _signal_behind(error: BaseException) -> Terminated | None:
    """The signal that came in the middle of an import of native code, which turns what is raised
    meanwhile into an error of its own."""
    cause: BaseException | None = error
    while isinstance(cause, (ImportError, SystemError)):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, Terminated) else None


def report(error: BaseException) -> int:
    """Says what happened and returns the exit status. Programming errors are raised again."""
    error = _signal_behind(error) or error
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED if error.code else OK
    if isinstance(error, KeyboardInterrupt):
        say("interrupted; the machine was stopped")
        return INTERRUPTED
    if isinstance(error, Terminated) and error.number == _signal.SIGINT:
        return report(KeyboardInterrupt())
    if isinstance(error, Terminated):
        import signal

        say(f"ended by {signal.Signals(error.number).name}; the machine was stopped")
        return 128 + error.number
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE  # as quiet as any program whose reader has gone
    if isinstance(error, errors.MachineTimeout):
        say(str(error))
        return TIMEOUT
    if isinstance(error, errors.Error):
        say(str(error))
        status = getattr(error, "status", FAILED)
        tail = getattr(error, "tail", "")
        if tail and status == FAILED:
            show_tail(tail)
        return status if isinstance(status, int) and status else FAILED
    if isinstance(error, MemoryError):
        say("this host has not enough memory for that machine; give it less with --memory")
        return FAILED
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; make room there" if error.errno == errno.ENOSPC else ""
        say(f"{where}{os.strerror(error.errno)}{hint}")
        return FAILED
    raise error
