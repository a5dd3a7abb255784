"""What a process VM is given beside its files: standard files, where its trace goes, limits."""

from __future__ import annotations

import contextlib
import os

from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class SupportsFileno(Protocol):
        """A file that the host has open."""

        def fileno(self) -> int: ...


@contextlib.contextmanager
def streams(
    collected: dict[str, int], stdin: bytes | int | None, stdout: int | None, stderr: int | None
) -> Iterator[tuple[int, int, int]]:
    """The three file descriptors for a program, valid in the context. Those that are not given
    are put into `collected`: files in memory, the caller's to close."""
    for name, given in (("stdout", stdout), ("stderr", stderr)):
        if given is None:
            collected[name] = os.memfd_create(name, os.MFD_CLOEXEC)
    opened = -1
    if isinstance(stdin, bytes):
        opened = os.memfd_create("stdin", os.MFD_CLOEXEC)
        with open(opened, "wb", closefd=False) as file:
            file.write(stdin)
        os.lseek(opened, 0, os.SEEK_SET)
    elif stdin is None:
        opened = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield (
            opened if opened >= 0 else int(stdin or 0),
            collected["stdout"] if stdout is None else stdout,
            collected["stderr"] if stderr is None else stderr,
        )
    finally:
        if opened >= 0:
            os.close(opened)


@contextlib.contextmanager
def trace_descriptor(
    trace: bool | int | str | os.PathLike[str] | SupportsFileno | None,
) -> Iterator[int]:
    """Where a trace goes: a file descriptor, valid in the context; -1 for nowhere."""
    if trace is None or isinstance(trace, bool):
        yield 2 if trace else -1
    elif isinstance(trace, int):
        yield trace
    elif isinstance(trace, str | os.PathLike):
        opened = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            yield opened
        finally:
            os.close(opened)
    else:
        yield trace.fileno()


def check_limits(
    engine: str,
    instructions: int | None,
    cpu: float | None,
    open_files: int,
    threads: int,
    events: int,
    seed: int | None,
) -> str:
    """The engine that can enforce them; raises `ConfigError`."""
    for name, value, least, most in (
        ("instructions", instructions, 1, 2**63),
        ("cpu", cpu, 0.001, 1e9),
        ("open_files", open_files, 3, 1024),
        ("threads", threads, 1, 4096),
        ("events", events, 0, 10**7),
        ("seed", seed, 0, 2**64 - 1),
    ):
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} must be from {least:g} to {most:g}, not {value}", field=name)
    if instructions is None:
        return engine
    if engine == "kvm":
        raise ConfigError(
            "instructions are counted by the engine soft only; limit the cpu time instead",
            field="instructions",
        )
    return "soft"
