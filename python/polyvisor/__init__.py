"""polyvisor: a virtual machine monitor that is a Python library.

Its names are loaded when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from polyvisor import errors
    from polyvisor._native import (
        CpuState,
        InFlightEvent,
        IrqLine,
        Segment,
        SystemCall,
        __version__,
    )
    from polyvisor.config import MachineConfig
    from polyvisor.console import Console
    from polyvisor.cpu import Cpu
    from polyvisor.errors import Error
    from polyvisor.guest import exec  # noqa: A004
    from polyvisor.machine import ExitInfo, Machine
    from polyvisor.memory import Memory
    from polyvisor.memory_image import MemoryImage
    from polyvisor.process import Process
    from polyvisor.process_pool import ProcessPool
    from polyvisor.registers import Registers
    from polyvisor.sandboxes import sandbox
    from polyvisor.vps import Vps

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
    "Process",
    "ProcessPool",
    "Registers",
    "Segment",
    "SystemCall",
    "Vps",
    "__version__",
    "errors",
    "exec",
    "sandbox",
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
    "Process": "process",
    "ProcessPool": "process_pool",
    "Registers": "registers",
    "Segment": "_native",
    "SystemCall": "_native",
    "Vps": "vps",
    "__version__": "_native",
    "exec": "guest",
    "sandbox": "sandboxes",
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
