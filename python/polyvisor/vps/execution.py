"""Commands in a running VPS: their input and output, by pipes or on a terminal."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import time
from typing import Any, NamedTuple

from polyvisor.errors import ProcessTimeout

_CHUNK = 1 << 16
#: Seconds that a program's output may stay open after its end, as by a child in the background.
_LINGER = 0.2


class Result(NamedTuple):
    """How a command ended: its exit status (128 + n when signal n ended it) and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """stdout, as text."""
        return self.stdout.decode("utf-8", "replace")


class Pipes:
    """stdin, stdout and stderr of a program to be started, as pipes."""

    def __init__(self) -> None:
        self._ends = [*os.pipe2(os.O_CLOEXEC), *os.pipe2(os.O_CLOEXEC), *os.pipe2(os.O_CLOEXEC)]
        self.program = (self._ends[0], self._ends[3], self._ends[5])
        self._input, self._output, self._errors = self._ends[1], self._ends[2], self._ends[4]

    def started(self) -> None:
        """The program has its ends: ours are the others."""
        for end in self.program:
            self._close(end)

    def exchange(self, launched: Any, data: bytes, timeout: float | None) -> Result:
        """Feeds the program and collects what it writes, until it ends.

        Raises `ProcessTimeout` after `timeout` seconds; the caller kills the program then.
        """
        taken: dict[int, list[bytes]] = {self._output: [], self._errors: []}

        def text(end: int) -> bytes:
            return b"".join(taken[end])

        end = None if timeout is None else time.monotonic() + timeout
        view = memoryview(data)
        with selectors.DefaultSelector() as selector:
            for descriptor in taken:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            os.set_blocking(self._input, False)
            if view:
                selector.register(self._input, selectors.EVENT_WRITE)
            else:
                self._close(self._input)
            selector.register(launched.pidfd, selectors.EVENT_READ)
            ended = False
            while True:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0 and not ended:
                    raise ProcessTimeout(
                        f"the command did not end within {timeout:g} s",
                        seconds=timeout or 0.0,
                        stdout=text(self._output),
                        stderr=text(self._errors),
                    )
                ready = selector.select(_LINGER if ended else left)
                for key, _ in ready:
                    descriptor = int(key.fd)
                    if descriptor == launched.pidfd:
                        ended = True
                        selector.unregister(descriptor)
                    elif descriptor == self._input:
                        try:
                            view = view[os.write(descriptor, view[:_CHUNK]) :]
                        except BrokenPipeError:
                            view = view[:0]
                        if not view:
                            selector.unregister(descriptor)
                            self._close(descriptor)
                    else:
                        chunk = os.read(descriptor, _CHUNK)
                        taken[descriptor].append(chunk)
                        if not chunk:
                            selector.unregister(descriptor)
                if ended and (not ready or not _any_of(selector, taken)):
                    break
        return Result(status_of(launched.wait(None)), text(self._output), text(self._errors))

    def close(self) -> None:
        """Closes what is still open."""
        for end in list(self._ends):
            self._close(end)

    def _close(self, end: int) -> None:
        if end in self._ends:
            self._ends.remove(end)
            os.close(end)


def _any_of(selector: selectors.BaseSelector, descriptors: dict[int, list[bytes]]) -> bool:
    return any(descriptor in selector.get_map() for descriptor in descriptors)


def status_of(wait_status: int) -> int:
    """A wait status as a shell's exit status."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def converse(launched: Any, source: int = 0, target: int = 1) -> int:
    """Connects our terminal with the program's until it ends; returns its exit status.

    The window's size follows ours. `source` at its end is Ctrl-D for the program.
    """
    import fcntl
    import termios

    from polyvisor.cli.terminal import RawMode

    master = launched.terminal

    def resize(*_: object) -> None:
        try:
            size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(master, termios.TIOCSWINSZ, size)
        except OSError:
            return

    resize()
    before = signal.signal(signal.SIGWINCH, resize)
    try:
        with RawMode(source), selectors.DefaultSelector() as selector:
            selector.register(master, selectors.EVENT_READ)
            selector.register(launched.pidfd, selectors.EVENT_READ)
            try:
                selector.register(source, selectors.EVENT_READ)
            except PermissionError:  # a plain file: always ready
                _write(master, os.read(source, _CHUNK) + b"\x04")
            ended = False
            while True:
                ready = [int(key.fd) for key, _ in selector.select(0 if ended else None)]
                if source in ready:
                    data = os.read(source, _CHUNK)
                    if not data:
                        selector.unregister(source)
                        data = b"\x04"
                    _write(master, data)
                if master in ready:
                    data = _read_terminal(master)
                    if not data:
                        break
                    _write(target, data)
                elif ended:
                    break
                if launched.pidfd in ready:
                    ended = True
                    selector.unregister(launched.pidfd)
        return status_of(launched.wait(None))
    finally:
        signal.signal(signal.SIGWINCH, before)


def _read_terminal(master: int) -> bytes:
    try:
        return os.read(master, _CHUNK)
    except OSError as error:  # nobody has the other side open any more
        if error.errno != errno.EIO:
            raise
        return b""


def _write(descriptor: int, data: bytes) -> None:
    from polyvisor.cli.output import write_all

    try:
        write_all(descriptor, data)
    except OSError as error:
        if error.errno != errno.EIO:
            raise


__all__ = ["Pipes", "Result", "converse", "status_of"]
