"""A CPU's registers as a mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from polyvisor import _native
from polyvisor.cpu import Cpu


class Registers(MutableMapping[str, int]):
    """Registers by name, all as ints: "rax", "rip", "cr3", "efer", "cs" (the selector),
    "cs.base", "cs.limit", "cs.attributes", "gdtr.base", ... `list(registers)` has them all.

    A single assignment is checked against what a CPU can be in; change several that depend on each
    other at once with `update`.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def __getitem__(self, name: str) -> int:
        return self._cpu.state[name]

    def __setitem__(self, name: str, value: int) -> None:
        self.apply({name: value})

    def __delitem__(self, name: str) -> None:
        raise TypeError("a CPU's registers cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(_native.CpuState.names())

    def __len__(self) -> int:
        return len(_native.CpuState.names())

    def apply(self, values: Mapping[str, int]) -> None:
        """Sets several registers in one step; raises `StateError`, setting none, on a bad one."""
        self._cpu.set_registers(values)

    def update(self, *args: object, **values: int) -> None:
        """Like `dict.update`, in one step (see `apply`)."""
        merged: dict[str, int] = dict(*args, **values)
        self.apply(merged)

    def as_dict(self) -> dict[str, int]:
        """All registers, read at one moment."""
        state = self._cpu.state
        return {name: state[name] for name in _native.CpuState.names()}
