"""A guest that is nothing but busybox and polyvisor's agent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polyvisor
from polyvisor.errors import GuestError
from polyvisor.guest.agent import program
from polyvisor.machine import Machine

PATIENCE = 300.0


@contextmanager
def running(
    on_machine: Callable[[Machine], object],
    argv: Sequence[str] = ("/agent",),
    *,
    files: Mapping[str, bytes] | None = None,
    engine: str = "auto",
    modules: Sequence[str] = (),
    append: str = "",
) -> Iterator[Machine]:
    """A machine with busybox that runs `argv` until the end of the block. /agent is there."""
    ready = threading.Event()
    machines: list[Machine] = []
    failures: list[BaseException] = []

    def started(machine: Machine, channel: object) -> None:
        machines.append(machine)
        ready.set()

    def run() -> None:
        try:
            polyvisor.exec(
                argv,
                engine=engine,
                modules=modules,
                append=append,
                files={"agent": Path(program()).read_bytes(), **(files or {})},
                on_machine=on_machine,
                on_start=started,
                timeout=PATIENCE,
            )
        except GuestError as error:
            if error.reason != "stopped":
                failures.append(error)
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="guest")
    thread.start()
    ready.wait()
    try:
        if machines:
            yield machines[0]
    finally:
        if machines and machines[0].state in ("running", "paused"):
            machines[0].native.stop()
        thread.join()
    if failures:
        raise failures[0]
