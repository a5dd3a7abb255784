"""A machine's serial port, as a program talks to it."""

from __future__ import annotations

from polyvisor.errors import ConsoleClosed, ConsoleTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re

    from polyvisor import _native

#: How much of the console's end goes into an exception.
TAIL = 2000
#: A guest writes byte by byte; searching again for each would cost more than it gains.
_COALESCE = 0.003


class Console:
    """Everything the guest wrote to a serial port, and a way to type.

    Text is decoded as UTF-8 with replacement characters; the bytes are there as well. One reading
    position is kept: `read` and `expect` move it. The last 16 MiB of output are kept (see
    `flow_control` for more).
    """

    def __init__(self, native: _native.SerialPort) -> None:
        self._native = native
        self._position = 0

    @property
    def transcript_bytes(self) -> bytes:
        """All output since the machine was made."""
        return self._native.read(0)[1]

    @property
    def transcript(self) -> str:
        """All output since the machine was made, as text."""
        return self.transcript_bytes.decode("utf-8", "replace")

    @property
    def closed(self) -> bool:
        """No more output will come: the machine has ended."""
        return self._native.closed

    def tail(self, size: int = TAIL) -> str:
        """The last `size` bytes of the output as text."""
        start = max(0, self._native.size - size)
        return self._native.read(start)[1].decode("utf-8", "replace")

    def flow_control(self, on: bool = True) -> None:
        """On: the guest waits while more than 256 KiB of its output are unread, and all output
        reaches the reader. Off (the default): the guest never waits, and the oldest is dropped."""
        self._native.set_flow_control(on)

    def read_bytes(self, timeout: float | None = 0.0) -> bytes:
        """Output since the last read; waits up to `timeout` seconds (None: for ever) for some.

        b"" when the time is up or the machine has ended.
        """
        if timeout is None or timeout > 0:
            self._native.wait(self._position, timeout)
        self._position, data = self._native.read(self._position)
        return data

    def read(self, timeout: float | None = 0.0) -> str:
        """`read_bytes`, as text."""
        return self.read_bytes(timeout).decode("utf-8", "replace")

    def send(self, text: str | bytes) -> None:
        """Types `text` at the guest. Never blocks: what the guest has not read yet is queued."""
        self._native.send(text.encode() if isinstance(text, str) else text)

    def expect(self, pattern: str | re.Pattern[str], timeout: float | None = 30.0) -> re.Match[str]:
        """Waits until `pattern` (a regular expression) is found in the output not yet read.

        Returns the match; the next read starts behind it. Raises `ConsoleTimeout` after `timeout`
        seconds and `ConsoleClosed` when the machine ends without it, both with the console's tail.
        """
        import re  # not needed to import polyvisor
        import time

        wanted = re.compile(pattern) if isinstance(pattern, str) else pattern
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            seen, data = self._native.read(self._position)
            text = data.decode("utf-8", "surrogateescape")
            match = wanted.search(text)
            if match is not None:
                rest = text[match.end() :].encode("utf-8", "surrogateescape")
                self._position = seen - len(rest)
                return match
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise ConsoleTimeout(
                    f"{wanted.pattern!r} did not appear on the console within {timeout:g} s; "
                    f"it ends with {self.tail(200)!r}",
                    pattern=wanted.pattern,
                    seconds=timeout or 0.0,
                    tail=self.tail(),
                )
            if self._native.wait(seen, left):
                time.sleep(_COALESCE)
            elif self._native.closed and self._native.size == seen:
                raise ConsoleClosed(
                    f"the machine ended before {wanted.pattern!r} appeared on its console, "
                    f"which ends with {self.tail(200)!r}",
                    pattern=wanted.pattern,
                    tail=self.tail(),
                )
