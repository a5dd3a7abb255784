"""What is on the disk of all VPSs: one directory for each, their numbers, and locks.

    <root>/<name>/config.json   what it is: survives everything
                  state.json    what was started: the kernel is asked whether that is still true
                  lock          flock()ed by whoever changes the VPS; the kernel frees it
                  files/        upper, work: its files, over those of the base (overlayfs); shared,
                                a layer between: files that `unify` made one with other VPSs'
                  snapshots/    copies of files/
    <root>/.new-* .old-*        being made or removed; nobody's when their lock is free
    <root>/.bases/              see bases.py

Directories appear and disappear by rename(), so that whatever is killed at whatever moment, a name
is a whole VPS or none. Numbers are unique on the host, whatever the root: names of cgroups, network
interfaces and ranges of user ids are made of them. So they are links in one directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from polyvisor.errors import ConfigError, HostError, StateMismatch
from polyvisor.vps import files

S = TypeVar("S", bound=msgspec.Struct)

#: Host user ids of VPS 0, and how many each has: above what people and subuid ranges have, in the
#: part that systemd leaves to containers (524288 to 1879048191).
UID_BASE, UID_COUNT = 0x4000_0000, 65536
MAX_ID = 12000
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LOCK_SECONDS = 60.0


class Config(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A VPS, as it was made and last changed. `lower` are the directories of its base."""

    name: str
    id: int
    base: str
    lower: list[str]
    created: float
    init: list[str]
    #: The program is PID 1 there; else polyvisor's init is.
    own_init: bool = False
    stop_signal: int = 15
    hostname: str = ""
    restart: str = "no"
    limits: dict[str, Any] = {}
    network: dict[str, Any] | None = None


class State(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the last `start` made. Only true while the kernel has process `pid` since `start_time`
    (clock ticks after boot `boot`); it need not survive a crash of the host, as nothing in it does.
    """

    boot: str
    pid: int = 0
    start_time: int = 0
    started: float = 0.0
    network: dict[str, Any] | None = None
    restarts: int = 0
    #: It was started and nobody stopped it: the monitor may start it again.
    wanted: bool = False


def default_root() -> Path:
    """Where VPSs are: POLYVISOR_VPS_DIR, /var/lib/polyvisor/vps for root, else in XDG_DATA_HOME."""
    given = os.environ.get("POLYVISOR_VPS_DIR")
    if given:
        return Path(given).absolute()
    return _data() / "vps"


def _data() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/polyvisor")
    home = os.environ.get("XDG_DATA_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".local/share") / "polyvisor"


def check_name(name: str, field: str = "name") -> str:
    """The name, if a VPS, a snapshot or a base can have it; it is a host name. `ConfigError`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name: lower-case letters, digits and hyphens within, at most 63",
            field=field,
        )
    return name


def write(path: Path, value: msgspec.Struct, *, durable: bool) -> None:
    """Replaces a file; readers see the old or the new. `durable`: after a power failure, too."""
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, msgspec.json.encode(value))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.replace(path)


def read(path: Path, kind: type[S]) -> S | None:
    """What `write` wrote; None when there is none, `HostError` when it is damaged."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError as error:
        raise HostError(
            f"{path} is damaged ({error}); put a good copy there, or remove its directory",
            path=str(path),
        ) from None


class Lock:
    """An exclusive lock, by a file; a context manager. It ends with this process at the latest."""

    def __init__(self, path: Path, what: str, seconds: float = _LOCK_SECONDS) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = time.monotonic() + seconds
        pause = 0.0005
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    self.close()
                    raise StateMismatch(
                        f"{what} is being changed by another process for more than {seconds:g} s; "
                        f"try again when that is through"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 1.5, 0.05)
            except BaseException:
                self.close()
                raise

    def is_of(self, path: Path) -> bool:
        """The lock is of the file that is at `path` now."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Gives it back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Store:
    """The directory of VPSs at `root`, made when it is needed."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root).absolute() if root is not None else default_root()
        ids = os.environ.get("POLYVISOR_ID_DIR")
        self._ids = Path(ids).absolute() if ids else _data() / "ids"

    def names(self) -> list[str]:
        """Of all VPSs, sorted."""
        try:
            found = os.listdir(self.root)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if not name.startswith("."))

    def path(self, name: str) -> Path:
        """Where VPS `name` is, or would be."""
        return self.root / check_name(name)

    def lock(self, name: str, seconds: float = _LOCK_SECONDS) -> Lock:
        """The lock of a VPS. `StateMismatch`: there is none, or another process has it for long."""
        path = self.path(name) / "lock"
        while True:
            try:
                lock = Lock(path, f"VPS {name}", seconds)
            except FileNotFoundError:
                raise no_such(name) from None
            # While we waited it may have been deleted, and made again.
            if lock.is_of(path):
                return lock
            lock.close()

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A directory that is nobody's yet, to fill; `publish` makes it VPS `name`."""
        if self.path(name).exists():
            raise _taken(name)
        with self._registry():
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
            lock = Lock(fresh / "lock", "a new directory")
        try:
            yield fresh
        finally:
            if fresh.exists():
                files.remove(fresh)
            lock.close()

    def publish(self, fresh: Path, config: Config) -> Config:
        """Gives the VPS in `fresh` its number and its name; returns its configuration."""
        with self._registry():
            place = self.path(config.name)
            if place.exists():
                raise _taken(config.name)
            config.id = self._free_id()
            write(fresh / "config.json", config, durable=True)
            os.symlink(place, self._ids / str(config.id))
            fresh.rename(place)
        return config

    def remove(self, name: str) -> None:
        """The VPS's directory and number; the caller has its lock, and has stopped it."""
        with self._registry():
            old = Path(tempfile.mkdtemp(prefix=".old-", dir=self.root))
            self.path(name).rename(old)  # replaces the empty directory
        files.remove(old)
        self.sweep()

    def sweep(self) -> None:
        """Removes what processes that were killed had begun to make or to remove."""
        if not self.root.is_dir():
            return
        with self._registry():
            stale = []
            for name in os.listdir(self.root):
                if name.startswith((".new-", ".old-")):
                    with contextlib.suppress(StateMismatch, FileNotFoundError):
                        Lock(self.root / name / "lock", name, seconds=0).close()
                        stale.append(self.root / name)
            for number, target in self._claims():
                if not os.path.lexists(target):
                    (self._ids / str(number)).unlink(missing_ok=True)
        for path in stale:
            files.remove(path)

    def known_ids(self) -> set[int]:
        """The numbers of all VPSs of this host, whatever their root."""
        return {number for number, _ in self._claims()}

    def _registry(self) -> Lock:
        try:
            self._ids.mkdir(parents=True, exist_ok=True, mode=0o700)
            return Lock(self._ids / ".lock", f"the directory {self._ids}")
        except OSError as error:
            raise HostError(
                f"cannot keep numbers of VPSs in {self._ids}: {error.strerror}; set "
                f"POLYVISOR_ID_DIR to a directory that can be written",
                errno=error.errno or 0,
                path=str(self._ids),
            ) from error

    def _claims(self) -> list[tuple[int, str]]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._ids):
                if name.isdigit():
                    with contextlib.suppress(FileNotFoundError):
                        found.append((int(name), os.readlink(self._ids / name)))
        return found

    def _free_id(self) -> int:
        taken = set(os.listdir(self._ids))
        for number in range(1, MAX_ID):
            if str(number) not in taken:
                return number
        raise HostError(f"there are {MAX_ID - 1} VPSs on this host already; delete some")


def no_such(name: str) -> StateMismatch:
    """The exception for a VPS that is not there."""
    return StateMismatch(f"there is no VPS {name!r}; `polyvisor vps list` shows what there is")


def _taken(name: str) -> StateMismatch:
    return StateMismatch(f"there is a VPS {name!r} already; delete it, or take another name")


__all__ = [
    "MAX_ID",
    "UID_BASE",
    "UID_COUNT",
    "Config",
    "Lock",
    "State",
    "Store",
    "check_name",
    "default_root",
    "no_such",
    "read",
    "write",
]
