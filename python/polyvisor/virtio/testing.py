"""Test a virtio device without a machine: `FakeGuest` is memory and a driver.

    guest = FakeGuest(Echo())
    assert guest.request(0, b"hello", 100) == b"hello"

It negotiates, starts the device, and offers what a test wants to, right or wrong. What a handler
raises comes out of the call that made the device do it.
"""

from __future__ import annotations

from polyvisor import _native
from polyvisor.config import parse_size
from polyvisor.errors import ConfigError, StateMismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from polyvisor.virtio.base import VirtioDevice

    Bytes = bytes | bytearray | memoryview

_ALL = (1 << 64) - 1


class FakeGuest:
    """A driver for `device`, which must not be plugged in elsewhere.

    `features` are those that it accepts of those that are offered, `packed` has packed rings,
    `memory` is the guest's, at guest-physical 0. `request` and `wait` give up after `timeout`
    seconds. Raises `StateMismatch` when the device refuses the features.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        memory: int | str = "4M",
        features: int = _ALL,
        packed: bool = False,
        queue_size: int = 256,
        timeout: float = 10.0,
    ) -> None:
        self.device = device
        self.timeout = timeout
        size = parse_size(memory)
        self.native = _native.FakeGuest(device, size, features & _ALL, packed, queue_size)

    def request(self, queue: int, out: Bytes | Iterable[Bytes] = b"", into: int = 0) -> bytes:
        """One request, answered: `out` is read by the device (each of several in a descriptor of
        its own), up to `into` bytes are its answer. Raises `StateMismatch` for no answer."""
        wanted = self.offer(queue, out, into)
        self.kick(queue)
        while (used := self.wait(queue)) is not None:
            if used[0] == wanted:
                return used[1]
        raise StateMismatch(
            f"{self.device.name} has not answered on queue {queue} within {self.timeout:g} s"
            + (f": {self.failure}" if self.failure else "")
        )

    def offer(
        self, queue: int, out: Bytes | Iterable[Bytes] = b"", into: int | Iterable[int] = 0
    ) -> int:
        """Puts a chain into `queue` without a word to the device; its id. Raises `StateMismatch`
        when there is no room."""
        pieces = [out] if isinstance(out, (bytes, bytearray, memoryview)) else list(out)
        sizes = [into] if isinstance(into, int) else list(into)
        readable, writable = [bytes(p) for p in pieces if len(p)], [size for size in sizes if size]
        if not readable and not writable:
            raise ConfigError("a chain has at least one byte to read or to write", field="out")
        return self.native.offer(queue, readable, writable)

    def kick(self, queue: int) -> None:
        """Shows the device what was offered, and notifies it if it wants that."""
        self.native.kick(queue)

    def wait(self, queue: int, timeout: float | None = None) -> tuple[int, bytes, int] | None:
        """The next chain that the device gives back: its id, the answer, and how many bytes the
        device says it wrote. None after `timeout` seconds."""
        return self.native.wait(queue, self.timeout if timeout is None else timeout)

    def interrupts(self, queue: int) -> int:
        """How often the device interrupted for `queue`."""
        return self.native.interrupts(queue)

    @property
    def config_interrupts(self) -> int:
        """How often it told of changes of its configuration, or of a failure."""
        return self.native.config_interrupts

    def read_config(self, offset: int = 0, size: int = 4096) -> bytes:
        """The configuration space (beyond it: zeroes)."""
        return self.native.read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Writes to the configuration space."""
        self.native.write_config(offset, data)

    @property
    def memory(self) -> _native.GuestMemory:
        """The guest's memory. Rings and buffers begin at 0x10000."""
        return self.native.memory

    @property
    def features(self) -> int:
        """What was negotiated."""
        return self.native.features

    @property
    def needs_reset(self) -> bool:
        """The device has failed (DEVICE_NEEDS_RESET); `failure` says why."""
        return self.native.status & 0x40 != 0

    @property
    def failure(self) -> str:
        """Why the device needs a reset; "" when it does not."""
        return self.native.failure

    def restart(self) -> None:
        """Resets the device and starts it again. What was offered is forgotten."""
        self.native.restart()

    def reset_queue(self, queue: int) -> None:
        """Resets one queue, which stays so until `restart`."""
        self.native.reset_queue(queue)

    def pause(self) -> None:
        """As when the machine is paused."""
        self.native.pause()

    def resume(self) -> None:
        """As when the machine goes on."""
        self.native.resume()

    def save(self) -> bytes:
        """The device's state while paused, as it is in a snapshot."""
        return self.native.save()

    def restore(self, state: bytes) -> None:
        """Puts `save`'s state back, while paused. Raises `StateError` for what does not fit."""
        self.native.restore(state)

    def close(self) -> None:
        """Resets the device and lets go of it; it can be plugged in elsewhere then."""
        self.native.close()

    def __enter__(self) -> FakeGuest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
