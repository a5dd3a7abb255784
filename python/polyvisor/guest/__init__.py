"""Running one command in a fresh virtual machine: `polyvisor.exec`."""

from __future__ import annotations

from polyvisor.guest.command import (
    DEFAULT_CMDLINE,
    CommandFailed,
    CommandNotRun,
    Completed,
    GuestPanic,
    exec,  # noqa: A004
)

__all__ = [
    "DEFAULT_CMDLINE",
    "CommandFailed",
    "CommandNotRun",
    "Completed",
    "GuestPanic",
    "exec",
]
