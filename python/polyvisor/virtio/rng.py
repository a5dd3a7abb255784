"""virtio-rng: random bytes for the guest (virtio 1.2, 5.4)."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from polyvisor.errors import ConfigError, StateMismatch
from polyvisor.virtio.base import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from polyvisor._ring import Queue

    #: Where random bytes come from: as many as it is asked for.
    Source = Callable[[int], bytes]

#: One chain gets at most this much, so that a long one does not keep the CPU for long.
_LARGEST = 1 << 16


class Rng(VirtioDevice):
    """An entropy source.

    `source` is asked for bytes and may give fewer, but at least one; None is the host's
    (getrandom(2)). With `rate`, in bytes per second, the guest
    waits for what is beyond that; up to a second's worth may be taken at once.
    """

    device_type = 4
    name = "virtio-rng"
    queue_sizes = (64,)

    def __init__(self, source: Source | None = None, *, rate: int | None = None) -> None:
        if rate is not None and rate < 1:
            raise ConfigError(
                f"the rate of an rng is at least 1 byte per second, not {rate}", field="rate"
            )
        self.source = source or os.getrandom
        self.rate = rate
        self.bytes_given = 0
        self._left = float(rate or 0)
        self._since = time.monotonic()
        self._timer: threading.Timer | None = None

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            size = min(chain.writable, _LARGEST)
            if self.rate is not None and size:
                size = self._allowed(size)
                if size == 0:
                    chain.unpop()
                    self._later()
                    return
            if size:
                self.bytes_given += chain.write(self.source(size)[:size])
            chain.push()

    # --- The rate --------------------------------------------------------------------------------

    def _allowed(self, size: int) -> int:
        assert self.rate is not None
        now = time.monotonic()
        self._left = min(self._left + (now - self._since) * self.rate, float(self.rate))
        self._since = now
        given = min(size, int(self._left))
        self._left -= given
        return given

    def _later(self) -> None:
        """Looks again when a good part of what is asked for may be given."""
        assert self.rate is not None
        if self._timer is None:
            self._timer = threading.Timer(max(0.01, 1 / self.rate), self._again)
            self._timer.daemon = True
            self._timer.start()

    def _again(self) -> None:
        self._timer = None
        with contextlib.suppress(StateMismatch), self.queue(0) as queue:  # it may be closed by now
            self.serve(queue)

    def stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
