"""When lines of a guest's output reached the host."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

#: Long enough for any boot here, on a machine that is busy with other tests.
PATIENCE = 300.0


@dataclass
class Stopwatch:
    """Collects output with the host's time at which it came; give it as `on_stdout`."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    _rest: bytes = b""

    def __call__(self, data: bytes) -> None:
        now = time.monotonic()
        *whole, self._rest = (self._rest + data).split(b"\n")
        self.lines += [(now, line.decode()) for line in whole]

    def between(self, first: str, second: str) -> float:
        """Host seconds between two lines."""
        times = {text.split()[0]: when for when, text in self.lines if text}
        return times[second] - times[first]
