"""Devices written in Python: the standard ones that a PC needs, and how to write your own.

A device is any object with ``read(offset, size) -> int`` and/or ``write(offset, size, value)``::

    class Dice:
        def read(self, offset, size):
            return random.randint(1, 6)

    machine.add_port_device(0x500, Dice())

See `polyvisor.devices.base` for the whole protocol.
"""

from __future__ import annotations

import weakref

from polyvisor.devices.i8042 import I8042
from polyvisor.devices.rtc import Rtc, wall_clock_now

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor.devices.base import Device
    from polyvisor.machine import Machine

__all__ = ["I8042", "Device", "Rtc", "install_standard"]

#: What the clock of a deterministic machine says at start unless told otherwise: 2026-01-01, UTC.
DETERMINISTIC_WALL_CLOCK = 1_767_225_600.0


def install_standard(machine: Machine) -> dict[str, object]:
    """Adds what a PC has and is not hot enough for C++: RTC with CMOS RAM, keyboard controller."""
    config = machine.config
    wall_clock = config.wall_clock
    if wall_clock is None:
        wall_clock = DETERMINISTIC_WALL_CLOCK if config.deterministic else wall_clock_now()
    native = machine.native
    rtc = Rtc(
        now=lambda: native.now,
        timer=native.timer,
        irq=native.irq(8),
        wall_clock=wall_clock,
        memory_size=machine.memory_size,
    )
    native.add_port_device(0x70, 2, rtc, 0)

    # The machine holds its devices; they must not hold it.
    reference = weakref.ref(machine)

    def reset() -> None:
        target = reference()
        if target is not None:
            target.end("reset", detail="the guest pulsed the keyboard controller's reset line")

    i8042 = I8042(reset=reset)
    native.add_port_device(0x60, 1, i8042, 0)
    native.add_port_device(0x64, 1, i8042, 4)
    return {"rtc": rtc, "i8042": i8042}


def __getattr__(name: str) -> object:
    if name == "Device":  # for those who derive from it; a machine does not need it
        from polyvisor.devices.base import Device

        return Device
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
