"""Reading a command's stdin on the host, only as fast as the guest takes it."""

from __future__ import annotations

import os
import select
from _thread import allocate_lock

from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import IO

    from polyvisor.guest.channel import Channel

#: Unsent bytes from which on no more is read.
HIGH = 256 << 10
_CHUNK = 64 << 10


class Feeder:
    """Passes stdin to a channel, on a thread of its own when it comes from a file with anything in
    it.

    Whoever else uses the channel meanwhile must hold `lock`.
    """

    def __init__(self, channel: Channel, source: bytes | str | int | IO[bytes] | None) -> None:
        self.lock = allocate_lock()
        self._channel = channel
        self._stopped = False
        self._room: threading.Condition | None = None
        self._thread: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        if source is None or isinstance(source, bytes | str):
            data = source.encode() if isinstance(source, str) else source or b""
            with self.lock:
                channel.write(data)
                channel.end_input()
            return
        descriptor = source if isinstance(source, int) else source.fileno()
        try:
            os.fstat(descriptor)
        except OSError:
            raise ConfigError(
                f"stdin: {descriptor} is not an open file descriptor", field="stdin"
            ) from None
        if _is_at_end(descriptor):
            with self.lock:
                channel.end_input()
            return
        import threading  # which many commands do without: their stdin is /dev/null

        self._room = threading.Condition(self.lock)
        self._wake = os.pipe()
        self._thread = threading.Thread(
            target=self._read, args=(descriptor,), name="polyvisor-stdin", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """The channel may have room again."""
        if self._room is not None:
            with self.lock:
                self._room.notify_all()

    def stop(self) -> None:
        """Ends the thread. What it had read and the guest had not taken is gone."""
        with self.lock:
            self._stopped = True
            if self._room is not None:
                self._room.notify_all()
        if self._thread is not None and self._wake is not None:
            os.write(self._wake[1], b"x")
            self._thread.join()
            for end in self._wake:
                os.close(end)

    def _read(self, descriptor: int) -> None:
        assert self._wake is not None
        assert self._room is not None
        poll = select.poll()  # unlike select(), for any descriptor number
        poll.register(descriptor, select.POLLIN)
        poll.register(self._wake[0], select.POLLIN)
        while True:
            with self.lock:
                while self._channel.unsent >= HIGH and not self._stopped:
                    self._room.wait()
                if self._stopped:
                    return
            ready = {number for number, _ in poll.poll()}
            if self._wake[0] in ready:
                return
            try:
                data = os.read(descriptor, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                data = b""  # a terminal that hung up; the end, as far as the command can tell
            with self.lock:
                if data:
                    self._channel.write(data)
                else:
                    self._channel.end_input()
                    return


def _is_at_end(descriptor: int) -> bool:
    """Whether nothing will ever come from there: /dev/null, most of all."""
    return os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev
