"""Breakpoints, watchpoints, and what a machine stopped for.

    machine.breakpoints.add(0xffffffff81000000)
    machine.start()
    while stop := machine.wait_pause():
        print(stop, machine.cpu(stop.cpu).registers["rax"])
        machine.resume()

See docs/debugging.md for what the two engines do and cannot do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, cast

import msgspec

from polyvisor import _native
from polyvisor.errors import ConfigError

#: How a breakpoint works:
#:
#: - ``software``: the instruction is replaced while the machine runs. Any number of them.
#: - ``hardware``: a debug register watches for the instruction's address.
#: - ``write``: a debug register watches for stores to `size` bytes.
#: - ``access``: ... for stores and loads.
#:
#: A CPU has four debug registers; what is set is set on all CPUs.
Kind = Literal["software", "hardware", "write", "access"]


class Breakpoint(msgspec.Struct, frozen=True):
    """One breakpoint of a machine."""

    #: 1, 2, ... in the order they were added.
    id: int
    #: Guest-virtual (linear) address.
    address: int
    kind: Kind
    #: Bytes that are watched; 1 for code.
    size: int = 1

    def __str__(self) -> str:
        what = "breakpoint" if self.kind in ("software", "hardware") else "watchpoint"
        return f"{what} {self.id} ({self.kind}) at {self.address:#x}"


class DebugStop(msgspec.Struct, frozen=True):
    """Why a machine paused."""

    #: "pause": somebody called `Machine.pause`.
    reason: Literal["breakpoint", "watchpoint", "pause"]
    #: The CPU that met it; 0 for a pause.
    cpu: int = 0
    #: Where that CPU stands (linear): at the breakpoint, whose instruction has not been executed,
    #: or behind the instruction that touched a watchpoint. 0 for a pause.
    address: int = 0
    #: None for a pause, and for a breakpoint that was removed since.
    breakpoint: Breakpoint | None = None

    def __str__(self) -> str:
        if self.reason == "pause":
            return "paused"
        return f"CPU {self.cpu} at {self.address:#x}: {self.breakpoint or self.reason}"


class Breakpoints(Collection[Breakpoint]):
    """The breakpoints of a machine, in the order they were added. They hold for all its CPUs.

    They can be changed while it is created or paused; otherwise `StateMismatch` is raised.
    """

    def __init__(self, machine: _native.Machine) -> None:
        self._machine = machine

    def add(
        self, address: int, kind: Kind = "software", *, size: int = 1, cpu: int = 0
    ) -> Breakpoint:
        """Adds one at guest-virtual `address`.

        `size` bytes are watched for kind "write" or "access": 1, 2, 4 or 8, aligned. A software
        breakpoint is put where `address` is mapped now by the page tables of CPU `cpu`; it raises
        `StateError` when that is nowhere. Raises `ConfigError` when the debug registers are used
        up, for an impossible size, and for one that is there already; `StateMismatch` when the
        KVM of this host has no software breakpoints, or the machine is running.
        """
        if not 0 <= address < 1 << 64:
            raise ConfigError(f"{address:#x} is no guest-virtual address", field="address")
        if not 0 <= size <= 8:
            raise ConfigError(f"a breakpoint cannot watch {size} bytes", field="size")
        number = self._machine.add_breakpoint(cpu, address, kind, size)
        return Breakpoint(number, address, kind, size)

    def remove(self, item: Breakpoint) -> None:
        """Takes it away; raises `ConfigError` when it is not there (any more)."""
        self._machine.remove_breakpoint(item.id)

    def clear(self) -> None:
        """Takes all away."""
        for item in self:
            self.remove(item)

    def __iter__(self) -> Iterator[Breakpoint]:
        return iter(
            [
                Breakpoint(number, address, cast("Kind", kind), size)
                for number, address, kind, size in self._machine.breakpoints()
            ]
        )

    def __len__(self) -> int:
        return len(self._machine.breakpoints())

    def __contains__(self, item: object) -> bool:
        return any(item == one for one in self)

    def __repr__(self) -> str:
        return f"<Breakpoints: {', '.join(map(str, self)) or 'none'}>"


def stops(machine: _native.Machine) -> list[DebugStop]:
    """What stopped the CPUs of a paused machine, the first first."""
    known = {item.id: item for item in Breakpoints(machine)}
    return [
        DebugStop(
            reason="breakpoint" if kind in ("software", "hardware") else "watchpoint",
            cpu=cpu,
            address=address,
            breakpoint=known.get(number),
        )
        for cpu, number, kind, address in machine.debug_stops()
    ]
