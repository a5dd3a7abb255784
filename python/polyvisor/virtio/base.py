"""How to write a virtio device in Python.

Derive from `VirtioDevice`, say what the device is, and answer `serve`::

    class Echo(VirtioDevice):
        device_type = 42
        name = "virtio-echo"
        queue_sizes = (64,)

        def serve(self, queue: Queue) -> None:
            for chain in queue:
                chain.write(chain.read())
                chain.push()

    machine.add_virtio(Echo())

`polyvisor.virtio.testing.FakeGuest` tests it without a machine. docs/virtio-devices.md has the
rest: threads, resets, snapshots.

What a driver sends must never make a handler raise: an exception that leaves one is taken for a bug
in the device, and stops the machine.
"""

from __future__ import annotations

from polyvisor.errors import ConfigError, StateMismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    from polyvisor import _native
    from polyvisor._ring import Queue
    from polyvisor.machine import Machine

    VirtioDeviceT = TypeVar("VirtioDeviceT", bound="VirtioDevice")

VERSION_1 = 1 << 32


class VirtioDevice:
    """A virtio device (virtio 1.2, chapter 2): what it is, and what its driver's actions do.

    Handlers come on the thread of the CPU that notified, or on the machine's event loop: one at a
    time for each queue, but different queues' may come at once.
    """

    #: The number of its type (virtio 1.2, 5), and the name for people.
    device_type: int
    name: str
    #: The largest size of each queue: powers of two up to 1024.
    queue_sizes: Sequence[int] = (256,)
    #: Its own feature bits (0 to 23, 50 to 63); those of the rings are added.
    features: int = 0
    #: What the configuration space has at first. Its size does not change.
    config: bytes = b""
    #: (offset, size) of what the driver may write in it.
    writable_config: Sequence[tuple[int, int]] = ()
    #: Class code of the PCI function: base class, sub-class, interface.
    pci_class: int = 0xFF0000

    #: The native side, once it is plugged in, and its place in the machine.
    port: _native.VirtioPort | None = None
    place: _native.VirtioHandle | None = None

    # --- What the driver does: override what matters ---------------------------------------------

    def serve(self, queue: Queue) -> None:
        """There may be chains in `queue`, which is held: the driver notified, has started it, or
        the machine goes on. Chains that are popped may be pushed later, from any thread."""
        raise NotImplementedError(f"{type(self).__name__} has no serve(queue)")

    def accept(self, features: int) -> bool:
        """The driver has chosen `features` out of those that are offered; False refuses them."""
        return True

    def start(self, features: int) -> None:
        """The driver has set DRIVER_OK. Queues come alive next."""

    def stop(self) -> None:
        """The device is reset. No chain may be in use any more when it returns: wait for threads.
        Chains that are pushed meanwhile are forgotten."""

    def stop_queue(self, index: int) -> None:
        """The same for one queue."""

    def quiesce(self) -> None:
        """The machine is to stand still: finish what is under way, and start nothing new until
        `unquiesce`, which is followed by a `serve` of every queue."""

    def unquiesce(self) -> None:
        """See `quiesce`."""

    def config_written(self, offset: int, size: int) -> None:
        """The driver has written to the configuration space; `read_config` has it."""

    def save(self) -> bytes:
        """What a snapshot needs beyond features, queues and configuration space."""
        return b""

    def restore(self, state: bytes) -> None:
        """Puts back what `save` gave. Raise ValueError for anything else, and change nothing."""
        if state:
            raise ValueError("this device saves no state of its own")

    # --- What the device can do ------------------------------------------------------------------

    @property
    def native(self) -> _native.VirtioPort:
        """`port`; StateMismatch while it is plugged in nowhere."""
        if self.port is None:
            raise StateMismatch(f"{self.name} is not plugged in; see Machine.add_virtio")
        return self.port

    def queue(self, index: int) -> Queue:
        """Queue `index`, to be held: ``with device.queue(0) as queue: ...``. Handlers have theirs
        already."""
        return self.native.queue(index)

    @property
    def started(self) -> bool:
        """The driver has set DRIVER_OK, and the device does not need a reset."""
        return self.native.status & 0x44 == 4

    @property
    def driver_features(self) -> int:
        """What the driver chose."""
        return self.native.features

    @property
    def memory(self) -> _native.GuestMemory:
        """The guest's memory, for devices that get addresses in what they read."""
        return self.native.memory

    def read_config(self, offset: int = 0, size: int = 4096) -> bytes:
        """Bytes of the configuration space as they are now."""
        return self.native.config(offset, size)

    def set_config(self, offset: int, data: bytes) -> None:
        """Changes the configuration space, and interrupts the driver if that is news."""
        self.native.set_config(offset, data)

    def fail(self, why: str) -> None:
        """The driver did what cannot be answered: it has to reset the device. `why` is a sentence
        about what it did."""
        self.native.fail(why)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def plug(machine: Machine, device: VirtioDeviceT, transport: str, packed: bool) -> VirtioDeviceT:
    """See `Machine.add_virtio`."""
    if not isinstance(device, VirtioDevice):
        raise ConfigError(
            f"a {type(device).__name__} is no virtio device; derive it from "
            "polyvisor.virtio.VirtioDevice",
            field="device",
        )
    # Python takes the thread that imports `threading` for the main one: not one of the machine's.
    import threading  # noqa: F401

    from polyvisor import _native

    device.place = _native.VirtioPython(machine.native, device, transport, packed)
    return device
