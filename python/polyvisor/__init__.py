"""polyvisor: a virtual machine monitor that is a Python library.

Its names are loaded when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor import errors
    from polyvisor._native import CpuState, InFlightEvent, IrqLine, Segment, __version__
    from polyvisor.config import MachineConfig
    from polyvisor.console import Console
    from polyvisor.cpu import Cpu
    from polyvisor.errors import Error
    from polyvisor.guest import exec  # noqa: A004
    from polyvisor.machine import ExitInfo, Machine
    from polyvisor.memory import Memory
    from polyvisor.memory_image import MemoryImage
    from polyvisor.registers import Registers

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

#: Where the names above are; tests/test_names.py holds the two together.
_HOMES = {
    "Console": "console",
    "Cpu": "cpu",
    "CpuState": "_native",
    "Error": "errors",
    "ExitInfo": "machine",
    "InFlightEvent": "_native",
    "IrqLine": "_native",
    "Machine": "machine",
    "MachineConfig": "config",
    "Memory": "memory",
    "MemoryImage": "memory_image",
    "Registers": "registers",
    "Segment": "_native",
    "__version__": "_native",
    "exec": "guest",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "errors":
        return import_module("polyvisor.errors")
    value: object = getattr(import_module(f"polyvisor.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
