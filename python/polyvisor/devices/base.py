"""How to write a device in Python.

The machine asks nothing more of a device than one of two methods, called with plain ints:

``read(offset, size)``
    The guest reads `size` bytes (1, 2 or 4 from ports, 1 to 64 from memory) at `offset` from where
    the device was put. Return an int; only its low ``8 * size`` bits count, so -1 is "all ones". A
    device without `read` reads as all ones.

``write(offset, size, value)``
    The guest writes the unsigned `value`. A device without `write` ignores it.

and, if it has them, ``reset()`` and, for snapshots, ``save() -> bytes`` and ``restore(bytes)``.

A device whose writes only wake something up may have ``doorbells``, a list of
``(offset, size, value, eventfd)``: a write of `size` bytes (0: any size) of `value` (None: any) at
`offset` adds 1 to the event file descriptor, made with os.eventfd() and read by a thread of the
device's own, and nothing more; `write` is not called. On the kvm engine the kernel does that, which
costs no more than a microsecond and no Python. The list is read once, when the device is added.

What it needs it gets from whoever makes it: ``machine.irq(n)`` for an interrupt line,
``machine.memory`` for DMA, ``machine.timer(callback)`` and ``machine.now`` for time,
``machine.end("power_off")`` to switch the machine off. It knows no address, so that it can be put
anywhere, and more than once.

Calls come on the thread of the CPU that made the access, one at a time per device object; timer
callbacks come on the event-loop thread. The methods are looked up once, when the device is added.
Whatever a guest sends must not raise: an exception that leaves a method is taken for a bug in the
device, ends the machine, and is raised from `Machine.wait` as the cause of a `DeviceError`.
"""

from __future__ import annotations


class Device:
    """A base class for those who like one: reads as all ones, ignores writes. Not required."""

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset`."""
        return -1

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest stores `value` in the `size` bytes at `offset`."""

    def reset(self) -> None:
        """Back to the state after power-on."""
