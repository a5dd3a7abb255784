"""What a test must leave behind as it found it: descriptors and threads of this process."""

from __future__ import annotations

import gc
import os
import time

PATIENCE = 10.0  # seconds


def settled() -> dict[str, int]:
    """The counts, once two looks 50 ms apart agree: what is going must not count as there."""
    gc.collect()
    end = time.monotonic() + PATIENCE
    found = _count()
    while time.monotonic() < end:
        time.sleep(0.05)
        last, found = found, _count()
        if last == found:
            break
    return found


def _count() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "tasks": len(os.listdir("/proc/self/task")),
    }


class Leftovers:
    """Counts when made; check() fails if there is more than there was.

    A thread that was joined can still be on its way out of the kernel, and how long that takes is
    the scheduler's affair; the threads that run process VMs wait for another one before they end,
    and close a machine when its program is over. So check() gives it all a bounded time, and what
    was about to go before may be gone.
    """

    def __init__(self) -> None:
        self.before = settled()

    def check(self) -> None:
        gc.collect()
        end = time.monotonic() + PATIENCE
        while (more := self._more()) and time.monotonic() < end:
            time.sleep(0.02)
        assert not more

    def _more(self) -> dict[str, tuple[int, int]]:
        found = _count()
        return {what: (n, found[what]) for what, n in self.before.items() if found[what] > n}
