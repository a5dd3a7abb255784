"""The monitor: one small process for all VPSs of a root that are to be started again.

VPSs need nobody to run. Only those whose restart policy is not "no" have to be watched, by a
process that sleeps until one of them ends, and that goes when there is none left to watch. It may
be killed: the next `start` or `list` makes another, which goes by what the kernel and the state
files say.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from polyvisor.errors import Error, StateMismatch
from polyvisor.vps import kernel, runtime
from polyvisor.vps.context import Vps
from polyvisor.vps.store import Config, Lock, State, Store, read

#: Seconds before a VPS is started again: doubled each time that it did not live as long as _CALM.
_FIRST_PAUSE, _LAST_PAUSE, _CALM = 0.1, 60.0, 10.0
#: Seconds between looks when nothing happens.
_LOOK = 30.0


def ensure(store: Store) -> None:
    """Sees to it that there is a monitor, if a VPS needs one, and that it looks around."""
    if not _wanted(store):
        return
    if _lock(store) is None:
        with contextlib.suppress(OSError):  # it is about to go, and looks once more before
            bell = os.open(store.root / ".monitor.bell", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(bell, b".")
            finally:
                os.close(bell)
        return
    subprocess.Popen(
        [sys.executable, "-m", "polyvisor.vps.monitor", str(store.root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    ).returncode = 0  # nobody waits for it


def _lock(store: Store, keep: bool = False) -> Lock | None:
    """The right to be the monitor; None when there is one. Given back at once unless `keep`."""
    try:
        lock = Lock(store.root / ".monitor.lock", "the monitor", seconds=0)
    except StateMismatch:
        return None
    if not keep:
        lock.close()
    return lock


def _wanted(store: Store) -> dict[str, State]:
    """The VPSs that were started and are to be started again when they end."""
    found = {}
    for name in store.names():
        with contextlib.suppress(Error):
            state = read(store.path(name) / "state.json", State)
            if (
                state is not None
                and state.wanted
                and Vps(name, root=store.root).config.restart != "no"
            ):
                found[name] = state
    return found


class Monitor:
    """Watches until there is nothing to watch."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}
        bell = store.root / ".monitor.bell"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(bell, 0o600)
        self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched: dict[str, kernel.Handle] = {}

    def run(self) -> None:
        """Returns when no VPS is to be started again."""
        while wanted := _wanted(self._store):
            for name, state in wanted.items():
                self._look_at(name, state)
            for name in self._watched.keys() - wanted.keys():
                self._watched.pop(name).close()
            self._sleep()

    def _look_at(self, name: str, state: State) -> None:
        handle = self._watched.get(name)
        if handle is not None:
            if kernel.start_time(state.pid) == state.start_time:
                return
            del self._watched[name]
            self._plan(name, state, _exit_status(handle, state.pid))
            handle.close()
        elif name not in self._due:
            handle = runtime.find(state)
            if handle is not None:
                self._watched[name] = handle
                return
            self._plan(name, state, None)
        if self._due.get(name, math.inf) <= time.monotonic():
            del self._due[name]
            with contextlib.suppress(Error, OSError):  # then it is due again, later
                restart(self._store, name)

    def _plan(self, name: str, state: State, status: int | None) -> None:
        """Says when to start one again that has ended, with an exit status if that is known."""
        with contextlib.suppress(Error):
            if not _again(Vps(name, root=self._store.root).config, status):
                forget(self._store, name)
                return
        lived = time.time() - state.started
        pause = _FIRST_PAUSE if lived > _CALM else self._pauses.get(name, _FIRST_PAUSE / 2) * 2
        self._pauses[name] = min(pause, _LAST_PAUSE)
        self._due[name] = time.monotonic() + self._pauses[name]

    def _sleep(self) -> None:
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        for handle in self._watched.values():
            poll.register(handle.descriptor, select.POLLIN)
        now = time.monotonic()
        seconds = min([_LOOK, *(due - now for due in self._due.values())])
        poll.poll(max(0, int(seconds * 1000) + 1))
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell, 4096)

    def close(self) -> None:
        """Lets go of everything."""
        os.close(self._bell)
        for handle in self._watched.values():
            handle.close()


def _again(config: Config, status: int | None) -> bool:
    """Whether one that ended so is to be started again."""
    if config.restart == "on-failure":
        # An init whose system was halted ends by SIGINT, one that wants a reboot by SIGHUP:
        # reboot(2), "Behavior inside PID namespaces".
        return status not in ((0, 128 + signal.SIGINT) if config.own_init else (0,))
    return config.restart == "always"


def _exit_status(handle: kernel.Handle, pid: int) -> int | None:
    """Of one that has ended: of our own child, or of another's."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return handle.exit_status()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def restart(store: Store, name: str) -> None:
    """Starts a VPS again that has ended, unless somebody stopped or started it meanwhile."""
    with store.lock(name):
        state, config, place = _ended(store, name)
        if state is not None:
            runtime.release(place, config, state, keep=True)
            runtime.launch(place, config, state)


def forget(store: Store, name: str) -> None:
    """Releases what a VPS had that has ended and is not to be started again."""
    with store.lock(name):
        state, config, place = _ended(store, name)
        if state is not None:
            runtime.release(place, config, state)


def _ended(store: Store, name: str) -> tuple[State | None, Config, Path]:
    place = store.path(name)
    state = read(place / "state.json", State)
    config = Vps(name, root=store.root).config
    handle = runtime.find(state)
    if handle is not None:
        handle.close()
        state = None
    return state if state is not None and state.wanted else None, config, place


def main() -> None:
    """`python -m polyvisor.vps.monitor ROOT`: the monitor, unless there is one."""
    store = Store(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while _wanted(store):
        lock = _lock(store, keep=True)
        if lock is None:
            return
        monitor = Monitor(store)
        try:
            monitor.run()
        finally:
            monitor.close()
            lock.close()
        # Whoever started one just now found the lock taken: so we look once more without it.


if __name__ == "__main__":
    main()
