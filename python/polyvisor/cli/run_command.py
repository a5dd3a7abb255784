"""`polyvisor run`."""

from __future__ import annotations

import contextlib
import os
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from polyvisor.cli import output, status
from polyvisor.cli.devices import Devices, Parsed
from polyvisor.cli.terminal import EscapeKeys, RawMode, Reader
from polyvisor.errors import ConfigError, HostError, MachineTimeout
from polyvisor.guest.command import GuestPanic, guest_failure
from polyvisor.images.bootable import share_options
from polyvisor.machine import ExitInfo, Machine

#: Typed bytes that the guest has not taken, from which on no more are read.
_TYPED_AHEAD = 64 << 10
#: Output kept for a pseudo-terminal that nobody reads.
_PTY_KEPT = 64 << 10
_SLICE = 0.1


@dataclass
class Line:
    """What is on the other end of the guest's serial port."""

    write: Callable[[bytes], None]
    quit: Callable[[], bool] = lambda: False


def boot(
    *,
    kernel: Path | None,
    initrd: Path | None,
    append: str | None,
    devices: Devices,
    memory: str,
    cpus: int,
    engine: str,
    irqchip: str,
    serial: str,
    timeout: float | None,
    stats: bool,
    closed: frozenset[int],
) -> int:
    """Boots, serves the serial port until the guest ends, and returns the exit status."""
    if timeout is not None and timeout <= 0:
        raise ConfigError(
            f"--timeout must be more than 0 seconds, not {timeout:g}", field="timeout"
        )
    parsed = devices.parsed()
    image, disk, cmdline = _kernel(kernel, initrd, append, parsed)
    status.note_engine(engine)
    with Machine(memory=memory, cpus=cpus, engine=engine, irqchip=irqchip, name="run") as machine:
        parsed.plug(machine)
        machine.load(image, disk, cmdline)
        machine.console.flow_control()
        with _line(serial, machine, closed) as line:
            machine.start()
            info = _serve(machine, line, timeout)
        if stats:
            output.write_statistics(machine.statistics())
        if info is None:
            status.say("quit; the machine was stopped")
            return status.OK
        return _exit_status(info, machine.console.transcript, shown=serial == "stdio")


def _kernel(
    kernel: Path | None, initrd: Path | None, append: str | None, devices: Parsed
) -> tuple[str | Path, str | Path | None, str]:
    """What to boot: kernel, initrd and command line, as given or as found on the first disk."""
    if kernel is not None:
        mounts = share_options(devices.shares, ours=False)
        cmdline = " ".join([append if append is not None else "console=ttyS0", *mounts])
        return kernel, initrd, cmdline
    if initrd is not None:
        raise ConfigError("an --initrd needs its --kernel", field="initrd")
    from polyvisor.images import bootable

    found = bootable.find(devices.disks[0]["path"], devices.disks[0].get("format"))
    mounts = share_options(devices.shares, ours=found.ours)
    return (
        found.fast_kernel(),
        found.initrd,
        " ".join([found.cmdline, *mounts, append or ""]).strip(),
    )


def _serve(machine: Machine, line: Line, timeout: float | None) -> ExitInfo | None:
    """Passes output on until the machine has ended; None when the user quit."""
    deadline = None if timeout is None else time.monotonic() + timeout
    console = machine.console
    while True:
        data = console.read_bytes(timeout=_SLICE)
        if data:
            line.write(data)
        elif console.closed:
            info = machine.wait(1.0)
            if info is not None:
                return info
        if line.quit():
            machine.stop()
            return None
        if deadline is not None and time.monotonic() >= deadline:
            assert timeout is not None
            raise MachineTimeout(
                f"the guest did not end within {timeout:g} s and was stopped", seconds=timeout
            )


def _exit_status(info: ExitInfo, transcript: str, *, shown: bool) -> int:
    failure = guest_failure(info, transcript)
    panicked = isinstance(failure, GuestPanic)
    if info.reason in ("power_off", "reset") and not panicked:
        return status.OK
    if info.reason == "debug_exit":
        return info.status & 0xFF
    if panicked:
        status.say(str(failure))
    else:
        status.say(f"the guest ended: {info}")
    if not shown:
        status.show_tail(failure.tail)
    return status.GUEST_FAILED


@contextlib.contextmanager
def _line(serial: str, machine: Machine, closed: frozenset[int]) -> Iterator[Line]:
    opener = {"stdio": _stdio, "pty": _pty}.get(serial)
    if opener is not None:
        with opener(machine, closed) as line:
            yield line
    else:
        with _file(serial) as line:
            yield line


@contextlib.contextmanager
def _stdio(machine: Machine, closed: frozenset[int]) -> Iterator[Line]:
    """Stdin and stdout; a terminal in raw mode, with a way out."""
    keys = EscapeKeys()
    port = machine.native.serial(0)

    def take(data: bytes) -> None:
        machine.console.send(keys.filter(data) if raw.active else data)

    def has_room() -> bool:
        return port.unsent < _TYPED_AHEAD

    with RawMode(0) as raw:
        reader = None if 0 in closed else Reader(0, take, room=has_room)
        try:
            yield Line(lambda data: output.write_all(1, data), lambda: keys.quit)
        finally:
            if reader is not None:
                reader.stop()


@contextlib.contextmanager
def _pty(machine: Machine, closed: frozenset[int]) -> Iterator[Line]:
    """A new pseudo-terminal for another program (screen, minicom) to open. While nobody reads it,
    the latest output is kept and the guest does not wait."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    status.say(f"the guest's serial port is {os.ttyname(slave)}")
    waiting = bytearray()

    def write(data: bytes) -> None:
        waiting.extend(data)
        with contextlib.suppress(BlockingIOError):
            while waiting:
                del waiting[: os.write(master, waiting)]
        del waiting[:-_PTY_KEPT]

    # The slave stays open here too: without one, reading the master fails until somebody opens it.
    reader = Reader(master, machine.console.send)
    try:
        yield Line(write)
    finally:
        reader.stop()
        os.close(slave)
        os.close(master)


@contextlib.contextmanager
def _file(path: str) -> Iterator[Line]:
    """A file that takes the output; nothing is typed."""

    def fail(problem: OSError) -> HostError:
        return HostError(
            f"cannot write the guest's serial output to {path}: {problem.strerror}",
            errno=problem.errno or 0,
            path=path,
        )

    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        raise fail(problem) from None

    def write(data: bytes) -> None:
        try:
            output.write_all(descriptor, data)
        except OSError as problem:
            raise fail(problem) from None

    try:
        yield Line(write)
    finally:
        os.close(descriptor)
