"""`Vps`: a Linux system of its own on the host's kernel.

    web = Vps.create("web", base="debian")
    web.start(limits=Limits(memory="256M", cpus=0.5, pids=200))
    print(web.exec(["ps", "aux"]).text)
    web.stop()
    web.delete()

An object is a name: it holds nothing open, and any number of them, in any number of processes, may
be of one VPS. Changes of one VPS take turns by its lock (store.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from polyvisor.errors import ConfigError, HostError, ProcessTimeout, StateMismatch
from polyvisor.records import asdict
from polyvisor.vps import bases, files, layers
from polyvisor.vps.bases import Progress
from polyvisor.vps.execution import Pipes, Result, converse
from polyvisor.vps.layers import Snapshot
from polyvisor.vps.store import Config, State, Store, check_name, no_such, read, write

RESTART = ("no", "on-failure", "always")
#: Finds the shell that people like best.
_SHELL = ("/bin/sh", "-c", "test -x /bin/bash && exec /bin/bash -l; exec /bin/sh -l")


class Info(msgspec.Struct, kw_only=True):
    """A VPS at a moment. `status` is "running", "stopped" or "frozen" (a snapshot is being taken);
    `started` and `created` are seconds since 1970, `addresses` as ADDRESS/PREFIX."""

    name: str
    id: int
    status: str
    pid: int
    base: str
    created: float
    started: float
    restart: str
    restarts: int
    addresses: list[str]
    limits: dict[str, Any]


class Stats(msgspec.Struct, kw_only=True):
    """What a VPS uses: `disk` in bytes of its own files (not its base's, nor its snapshots'),
    `uptime` in seconds; the others as in `limits.CgroupStats`, {} while it does not run."""

    name: str
    status: str
    uptime: float
    disk: int
    cgroup: dict[str, Any]


class Vps:
    """The VPS of that name. As a context manager it stops, at the end, what it started.

    `root` is the directory of VPSs (`store.default_root`). Raises `StateMismatch` when there is
    none of that name.
    """

    def __init__(self, name: str, *, root: str | os.PathLike[str] | None = None) -> None:
        self._store = Store(root)
        self._name = check_name(name)
        self._started = False
        if not self._path.is_dir():
            raise no_such(name)

    @classmethod
    def create(
        cls,
        name: str,
        *,
        base: str | os.PathLike[str] = "debian",
        init: Sequence[str] | None = None,
        hostname: str | None = None,
        restart: str = "no",
        limits: Any = None,
        network: Any = None,
        root: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Vps:
        """Makes a VPS on a base: "debian", "debian-<suite>", a directory, a tar, or a base of
        `bases.Bases.add`.

        `init` is what `start` runs in it; None: the base's own init as PID 1, or, if it has none,
        one that only waits. `hostname` is the name by default. `restart`: "no", "on-failure" or
        "always". `limits` (`Limits`) and `network` (`Network`) are those of `start`, by default.

        Raises `ConfigError` for values that cannot be used, `StateMismatch` when the name is taken.
        """
        store = Store(root)
        check_name(name)
        _check_restart(restart)
        if store.path(name).exists():
            raise StateMismatch(f"there is a VPS {name!r} already; delete it, or take another name")
        lower = bases.Bases(store).get(base, progress)
        found = bases.find_init(lower)
        config = Config(
            name=name,
            id=0,
            base=os.fspath(base),
            lower=lower,
            created=time.time(),
            init=found.argv if init is None else [*init],
            own_init=found.own and init is None,
            stop_signal=found.stop_signal if init is None else 15,
            hostname=hostname or name,
            restart=restart,
            limits=_plain(limits),
            network=_checked(network),
        )
        with store.making(name) as fresh:
            layers.create(fresh)
            _set_hostname(fresh, config)
            store.publish(fresh, config)
        return cls(name, root=store.root)

    @classmethod
    def all(cls, *, root: str | os.PathLike[str] | None = None) -> list[Vps]:
        """Every VPS, by name. Also removes what was left by processes that were killed."""
        store = Store(root)
        store.sweep()
        return [cls(name, root=store.root) for name in store.names()]

    def tidy(self) -> None:
        """Releases what it left on the host, if it has ended by itself or its start was killed, and
        nobody is changing it now."""
        from polyvisor.vps import runtime

        if (self._path / "frozen").exists():
            with contextlib.suppress(StateMismatch), self._store.lock(self._name, seconds=0):
                self._thaw(self._config())
        state = self._state()
        if state is None or (state.wanted and self._config().restart != "no") or self._status()[1]:
            return
        with contextlib.suppress(StateMismatch), self._store.lock(self._name, seconds=0):
            if not self._status()[1]:
                runtime.release(self._path, self._config(), self._state())

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def id(self) -> int:
        """Its number, of which names on the host are made."""
        return self._config().id

    @property
    def path(self) -> Path:
        """Its directory on the host."""
        return self._path

    @property
    def config(self) -> Config:
        """What it is, as it was made and last changed; a copy."""
        return self._config()

    @property
    def status(self) -> str:
        """As in `Info`. What the kernel says, not what was written down."""
        return self._status()[0]

    def info(self) -> Info:
        """What there is to know without asking the VPS."""
        config = self._config()
        status, pid = self._status()
        state = self._state() or State(boot="")
        return Info(
            name=config.name,
            id=config.id,
            status=status,
            pid=pid,
            base=config.base,
            created=config.created,
            started=state.started if pid else 0.0,
            restart=config.restart,
            restarts=state.restarts,
            addresses=list((config.network or {}).get("addresses", [])),
            limits=config.limits,
        )

    def start(self, *, limits: Any = None, network: Any = None, restart: str | None = None) -> Vps:
        """Starts it; it goes on when this program ends. What is given is kept for the next time.

        Raises `StateMismatch` when it runs, `LimitUnavailable` when the host cannot set a limit,
        `HostError` when its init cannot be executed.
        """
        from polyvisor.vps import runtime

        with self._store.lock(self._name):
            config, state = self._config(), self._state()
            with runtime.find(state) or _nothing() as handle:
                if handle is not None:
                    raise StateMismatch(f"VPS {self._name} runs already")
            runtime.release(self._path, config, state)
            layers.repair(self._path)
            self._reconfigure(config, limits, network, restart)
            runtime.launch(self._path, config)
            self._started = True
        if config.restart != "no":
            from polyvisor.vps import monitor

            monitor.ensure(self._store)
        return self

    def exec(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        uid: int = 0,
        gid: int = 0,
        timeout: float | None = None,
    ) -> Result:
        """Runs a command in it, with its limits, and collects what it writes.

        Raises `StateMismatch` when it does not run, `HostError` when there is no such program,
        `ProcessTimeout` after `timeout` seconds, when the command was killed.
        """
        pipes = Pipes()
        try:
            with self._attach(argv, env, cwd, uid, gid, pipes.program) as launched:
                pipes.started()
                return pipes.exchange(launched, stdin, timeout)
        finally:
            pipes.close()

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]] = _SHELL,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
        uid: int = 0,
        gid: int = 0,
        terminal: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Runs a command in it on our own stdin, stdout and stderr, or on a terminal of its own
        that ours is connected with; returns its exit status. Raises as `exec` does."""
        from polyvisor.vps.execution import status_of

        with self._attach(argv, env, cwd, uid, gid, None if terminal else (0, 1, 2)) as launched:
            if terminal:
                return converse(launched)
            ended = launched.wait(timeout)
            if ended is None:
                raise ProcessTimeout(
                    f"the command did not end within {timeout:g} s", seconds=timeout or 0.0
                )
            return status_of(ended)

    def enter(self, *, uid: int = 0, gid: int = 0) -> int:
        """A login shell in it, on this terminal; returns its exit status."""
        env = {"TERM": os.environ.get("TERM", "vt100")}
        return self.run(env=env, cwd="/", uid=uid, gid=gid, terminal=os.isatty(0))

    def limit(self, **changes: Any) -> None:
        """Changes limits (the fields of `Limits`), at once if it runs, and keeps them. None: none.

        Raises `ConfigError` and `LimitUnavailable`, and then changes nothing.
        """
        from polyvisor.vps import runtime
        from polyvisor.vps.limits import Limits

        with self._store.lock(self._name):
            config = self._config()
            limits = Limits(**{**config.limits, **changes})
            cgroup = runtime.find_cgroup(config)
            if cgroup is not None and self._status()[1]:
                cgroup.change(limits)
                runtime.refresh_views(self._path, config, limits, cgroup)
            config.limits = _plain(limits)
            write(self._path / "config.json", config, durable=True)

    def stats(self) -> Stats:
        """What it uses now."""
        from polyvisor.vps import runtime

        state = self._state()
        status, pid = self._status()
        cgroup = runtime.find_cgroup(self._config()) if pid else None
        found = asdict(cgroup.stats()) if cgroup else {}
        folder = self._path / "files"
        return Stats(
            name=self._name,
            status=status,
            uptime=time.time() - state.started if state and pid else 0.0,
            disk=files.used(folder / "upper", folder / "shared"),
            cgroup=found,
        )

    def snapshot(self, name: str) -> Snapshot:
        """Keeps its files as they are now, under a name. While it runs, its processes stand still
        for that long. Raises `StateMismatch` when the name is taken."""
        with self._store.lock(self._name), self._frozen():
            return layers.take(self._path, name)

    def snapshots(self) -> list[Snapshot]:
        """Those that it has, the oldest first."""
        return layers.snapshots(self._path)

    def restore(self, name: str) -> None:
        """Makes its files what they were at a snapshot. It must be stopped (`StateMismatch`)."""
        with self._store.lock(self._name):
            self._refuse_running("restore")
            layers.restore(self._path, name)

    def drop_snapshot(self, name: str) -> None:
        """Removes a snapshot."""
        with self._store.lock(self._name):
            layers.drop(self._path, name)

    def clone(self, name: str, *, snapshot: str | None = None) -> Vps:
        """A new VPS with the same files and settings, but without network addresses, which would be
        those of two; of `snapshot`, or of what is there now (its processes stand still meanwhile).
        """
        with self._store.making(check_name(name)) as fresh:
            with self._store.lock(self._name):
                config = self._config()
                if snapshot is None:
                    with self._frozen():
                        layers.copy(self._path / "files", fresh / "files")
                else:
                    layers.copy(layers.snapshot_path(self._path, snapshot), fresh / "files")
            config.name = config.hostname = name
            config.created = time.time()
            config.network = None
            _set_hostname(fresh, config)
            self._store.publish(fresh, config)
        return Vps(name, root=self._store.root)

    def stop(self, grace: float = 10.0) -> None:
        """Asks its init to end, and after `grace` seconds kills all that is left, for certain.
        Nothing of it is left on the host but its files. Stopping what does not run is no error."""
        from polyvisor.vps import runtime

        if grace < 0:
            raise ConfigError(f"a grace time is 0 or more seconds, not {grace:g}", field="grace")
        with self._store.lock(self._name):
            config, state = self._config(), self._state()
            if state is not None and state.wanted:
                state.wanted = False  # whoever kills us now: the monitor must not start it again
                write(self._path / "state.json", state, durable=False)
            with runtime.find(state) or _nothing() as handle:
                if handle is not None and grace > 0:
                    self._thaw(config)
                    handle.signal(config.stop_signal)
                    handle.wait(grace)
            runtime.release(self._path, config, state)
            self._started = False

    def delete(self, *, force: bool = False) -> None:
        """Removes it, its snapshots too. `force` kills it if it runs, else that is a
        `StateMismatch`."""
        from polyvisor.vps import runtime

        with self._store.lock(self._name):
            if not force:
                self._refuse_running("delete it with --force, or")
            runtime.release(self._path, self._config(), self._state())
            self._store.remove(self._name)

    def __enter__(self) -> Vps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._started and self._path.is_dir():
            self.stop()

    def __repr__(self) -> str:
        return f"Vps({self._name!r})"

    @property
    def _path(self) -> Path:
        return self._store.path(self._name)

    def _config(self) -> Config:
        config = read(self._path / "config.json", Config)
        if config is None:
            raise no_such(self._name)
        return config

    def _state(self) -> State | None:
        return read(self._path / "state.json", State)

    def _status(self) -> tuple[str, int]:
        """The status, and the process id of its init (0 when it does not run)."""
        from polyvisor.vps import runtime

        state = self._state()
        with runtime.find(state) or _nothing() as handle:
            if handle is None or state is None:
                return "stopped", 0
        return "frozen" if (self._path / "frozen").exists() else "running", state.pid

    def _refuse_running(self, what: str) -> None:
        if self._status()[1]:
            raise StateMismatch(f"VPS {self._name} runs; {what} stop it first")

    def _reconfigure(self, config: Config, limits: Any, network: Any, restart: str | None) -> None:
        """Keeps what `start` was given, before anything is made of it: so that what a start leaves
        behind, however it ends, is known by the configuration."""
        before = msgspec.structs.replace(config)
        if limits is not None:
            config.limits = _plain(limits)
        if network is not None:
            config.network = _checked(network)
        if restart is not None:
            _check_restart(restart)
            config.restart = restart
        if config != before:
            write(self._path / "config.json", config, durable=True)

    def _attach(
        self,
        argv: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str] | None,
        cwd: str,
        uid: int,
        gid: int,
        stdio: tuple[int, int, int] | None,
    ) -> Any:
        """The command, started; a context manager that kills it if it has not ended."""
        from polyvisor.vps import runtime

        if (self._path / "frozen").exists():  # a snapshot is being taken, or was given up
            with self._store.lock(self._name):
                self._thaw(self._config())

        state = self._state()
        with runtime.find(state) or _nothing() as handle:
            if handle is None or state is None:
                raise self._does_not_run()
            try:
                return runtime.attach(
                    handle,
                    self._config(),
                    [os.fspath(word) for word in argv],
                    {**runtime.ENVIRONMENT, **(env or {})},
                    cwd=cwd,
                    uid=uid,
                    gid=gid,
                    stdio=stdio,
                )
            except HostError:
                if handle.ending():  # it stopped meanwhile
                    raise self._does_not_run() from None
                raise

    def _does_not_run(self) -> StateMismatch:
        return StateMismatch(
            f"VPS {self._name} does not run; start it with `polyvisor vps start {self._name}`"
        )

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Its processes stand still, if it runs."""
        from polyvisor.vps import runtime

        cgroup = runtime.find_cgroup(self._config())
        if cgroup is None or not self._status()[1]:
            yield
            return
        (self._path / "frozen").touch()  # for others, if we are killed meanwhile
        try:
            cgroup.freeze()
            yield
        finally:
            self._thaw(self._config())

    def _thaw(self, config: Config) -> None:
        """Lets it go on, if it is frozen. The caller has the lock."""
        from polyvisor.vps import runtime

        if (self._path / "frozen").exists():
            cgroup = runtime.find_cgroup(config)
            if cgroup is not None:
                cgroup.thaw()
            (self._path / "frozen").unlink()


def _nothing() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _plain(value: Any) -> dict[str, Any]:
    """Limits or a network as what JSON has."""
    if value is None:
        return {}
    plain = msgspec.to_builtins(asdict(value))
    return {name: one for name, one in plain.items() if one is not None}


def _checked(network: Any) -> dict[str, Any] | None:
    if network is None:
        return None
    from polyvisor.vps.network import validated

    return _plain(validated(network))


def _check_restart(restart: str) -> None:
    if restart not in RESTART:
        raise ConfigError(
            f"restart is one of {', '.join(RESTART)}, not {restart!r}", field="restart"
        )


def _set_hostname(fresh: Path, config: Config) -> None:
    """What programs read that ask a file and not the kernel. A clone's files are not trusted."""
    name = config.hostname
    upper = fresh / "files" / "upper"
    if any((Path(layer) / "etc").is_dir() for layer in config.lower):
        files.replace_file(upper, "etc/hostname", f"{name}\n")
        files.replace_file(
            upper, "etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost\n"
        )


__all__ = ["RESTART", "Info", "Stats", "Vps"]
