"""polyvisor: a virtual machine monitor that is a Python library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyvisor import errors
from polyvisor._native import CpuState, InFlightEvent, IrqLine, Segment, __version__
from polyvisor.config import MachineConfig
from polyvisor.console import Console
from polyvisor.cpu import Cpu, Registers
from polyvisor.errors import Error
from polyvisor.machine import ExitInfo, Machine
from polyvisor.memory import Memory

if TYPE_CHECKING:
    from polyvisor.guest import exec  # noqa: A004
    from polyvisor.memory_image import MemoryImage

__all__ = [
    "Console",
    "Cpu",
    "CpuState",
    "Error",
    "ExitInfo",
    "InFlightEvent",
    "IrqLine",
    "Machine",
    "MachineConfig",
    "Memory",
    "MemoryImage",
    "Registers",
    "Segment",
    "__version__",
    "errors",
    "exec",
]


def __getattr__(name: str) -> Any:
    # `exec` brings the guest images along; a program that has its own guest need not load them.
    if name == "exec":
        from polyvisor.guest import exec  # noqa: A004

        return exec
    if name == "MemoryImage":
        from polyvisor.memory_image import MemoryImage

        return MemoryImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
