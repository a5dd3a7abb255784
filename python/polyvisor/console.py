"""The machine's first serial port, as a program talks to it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from polyvisor.errors import ConsoleClosed, ConsoleTimeout

if TYPE_CHECKING:
    from polyvisor import _native

#: How much of the console's end goes into an exception.
TAIL = 2000
#: A guest writes byte by byte; searching again for each would cost more than it gains.
_COALESCE = 0.003


class Console:
    """Everything the guest ever wrote to its first serial port, and a way to type.

    Text is decoded as UTF-8 with replacement characters; the bytes are there as well. One reading
    position is kept: `read` and `expect` move it.
    """

    def __init__(self, native: _native.Machine) -> None:
        self._native = native
        self._position = 0

    @property
    def transcript_bytes(self) -> bytes:
        """All output since the machine was made."""
        return self._native.console_read(0)

    @property
    def transcript(self) -> str:
        """All output since the machine was made, as text."""
        return self.transcript_bytes.decode("utf-8", "replace")

    def tail(self, size: int = TAIL) -> str:
        """The last `size` bytes of the output as text."""
        start = max(0, self._native.console_size() - size)
        return self._native.console_read(start).decode("utf-8", "replace")

    def read_bytes(self, timeout: float | None = 0.0) -> bytes:
        """Output since the last read; waits up to `timeout` seconds (None: for ever) for some.

        b"" when the time is up or the machine has ended.
        """
        if timeout is None or timeout > 0:
            self._native.console_wait(self._position, timeout)
        data = self._native.console_read(self._position)
        self._position += len(data)
        return data

    def read(self, timeout: float | None = 0.0) -> str:
        """`read_bytes`, as text."""
        return self.read_bytes(timeout).decode("utf-8", "replace")

    def send(self, text: str | bytes) -> None:
        """Types `text` at the guest. Never blocks: what the guest has not read yet is queued."""
        self._native.console_send(text.encode() if isinstance(text, str) else text)

    def expect(
        self, pattern: str | re.Pattern[str], timeout: float | None = 30.0
    ) -> re.Match[str]:
        """Waits until `pattern` (a regular expression) is found in the output not yet read.

        Returns the match; the next read starts behind it. Raises `ConsoleTimeout` after `timeout`
        seconds and `ConsoleClosed` when the machine ends without it, both with the console's tail.
        """
        wanted = re.compile(pattern) if isinstance(pattern, str) else pattern
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            data = self._native.console_read(self._position)
            seen = self._position + len(data)
            text = data.decode("utf-8", "surrogateescape")
            match = wanted.search(text)
            if match is not None:
                matched = text[: match.end()].encode("utf-8", "surrogateescape")
                self._position += len(matched)
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
            if self._native.console_wait(seen, left):
                time.sleep(_COALESCE)
            elif self._ended(seen):
                raise ConsoleClosed(
                    f"the machine ended before {wanted.pattern!r} appeared on its console, "
                    f"which ends with {self.tail(200)!r}",
                    pattern=wanted.pattern,
                    tail=self.tail(),
                )

    def _ended(self, seen: int) -> bool:
        return (
            self._native.state in ("ended", "closed") and self._native.console_size() == seen
        )
