"""Limits of what processes may use, kept by the kernel's cgroups, v1, v2 or both at once.

    with Cgroup.create("web", Limits(memory="256M", cpus=0.5, pids=200)) as cgroup:
        ...                        # start something in it: cgroup.fds()
        print(cgroup.stats())

A limit that the host cannot keep raises `LimitUnavailable`; there is never silently none.
docs/limits.md says what each limit does, and what it cannot.
"""

from __future__ import annotations

import errno
import os
import resource

from polyvisor import _native
from polyvisor.config import parse_size
from polyvisor.errors import ConfigError, HostError, LimitUnavailable
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

#: Microseconds of a CPU quota's period.
PERIOD = 100_000
#: What processes may do with devices when nothing else is said: the harmless ones that every
#: program expects (null, zero, full, random, urandom, tty, console, ptmx, pts, tun), as runc's.
DEFAULT_DEVICES = (
    *("c 1:3 rw", "c 1:5 rw", "c 1:7 rw", "c 1:8 rw", "c 1:9 rw"),
    *("c 5:0 rw", "c 5:1 rw", "c 5:2 rw", "c 136:* rw", "c 10:200 rw"),
)
#: Seconds that kill() and freeze() wait if nothing else is said.
PATIENCE = 10.0

_LEAST_QUOTA = 1_000  # microseconds; sched-bwc.rst: "the minimum quota allowed is 1ms"


class Limits(Record, kw_only=True):
    """What a group of processes may use together. None: as much as there is.

    `memory` and `swap` are bytes or text such as "256M"; with `memory` and without `swap` there
    is no swap. `cpus` is CPU time per time: 0.5 is half of one CPU; `cpu_burst` is how many
    seconds of it may be saved up while idle (a token bucket; at most what one period brings).
    `cpu_shares` is the weight against others when CPUs are scarce, 1024 being everybody's. `pids`
    counts processes and threads. `io_read` and `io_write` are bytes a second: of each disk, or a
    dict of device files and their rates. `cpuset` is which CPUs, as "0-1,3". `devices` are rules
    such as "c 1:3 rw", "default" for `DEFAULT_DEVICES`, or None for any; "default" is None for
    ordinary users, who can make and mount no device.

    Raises ConfigError (its `field` says which) for a value that cannot be used.
    """

    memory: int | str | None = None
    swap: int | str | None = None
    cpus: float | None = None
    cpu_shares: int | None = None
    cpu_burst: float | None = None
    pids: int | None = None
    io_read: int | str | Mapping[str, int | str] | None = None
    io_write: int | str | Mapping[str, int | str] | None = None
    cpuset: str | None = None
    devices: Sequence[str] | None = "default"

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        if self.devices is not None and not isinstance(self.devices, str):
            self.__dict__["devices"] = tuple(self.devices)  # a list cannot be hashed
        self.native()

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number."""
        return _size(self.memory, "memory", 1 << 12)

    @property
    def swap_bytes(self) -> int | None:
        """`swap` as a number; with `memory` and without it, 0."""
        return _size(0 if self.swap is None and self.memory is not None else self.swap, "swap", 0)

    def native(self, *, change: bool = False) -> _native.CgroupLimits:
        """The same for `_native`. `change`: every disk is named, so that its rate may be lifted."""
        quota, burst = self._quota()
        if self.cpu_shares is not None:
            _whole(self.cpu_shares, "cpu_shares", 2, 262_144)
        if self.pids is not None:
            _whole(self.pids, "pids", 1, 1 << 22)
        return _native.CgroupLimits(
            memory=self.memory_bytes,
            swap=_size(self.swap, "swap", 0),
            cpu_quota=quota,
            cpu_period=PERIOD,
            cpu_burst=burst,
            cpu_shares=self.cpu_shares,
            pids=self.pids,
            cpuset=_cpuset(self.cpuset),
            io=self._io(change),
            devices=_rules(self.devices),
        )

    def rlimits(self) -> list[tuple[int, int, int]]:
        """What resource limits can keep of these where there are no cgroups: `pids`, for processes
        in a user namespace of their own, whose processes the kernel counts apart (ordinary users
        only). Raises LimitUnavailable for the others: what each process may have is no limit of
        what they have together."""
        for field, controller in _CONTROLLERS.items():
            if getattr(self, field) is not None and field not in ("pids", "devices"):
                raise LimitUnavailable(
                    f"{field} cannot be limited without cgroups: run as root, or in a cgroup of "
                    "your own (systemd-run --user --scope -p Delegate=yes).",
                    controller=controller,
                )
        return [(resource.RLIMIT_NPROC, self.pids, self.pids)] if self.pids is not None else []

    def _quota(self) -> tuple[int | None, int]:
        if self.cpus is None:
            if self.cpu_burst:
                raise ConfigError("cpu_burst is saved from cpus; give cpus, too", field="cpu_burst")
            return None, 0
        quota = _microseconds(self.cpus, "cpus", PERIOD)
        burst = _microseconds(self.cpu_burst or 0.0, "cpu_burst", 1_000_000)
        if quota < _LEAST_QUOTA:
            raise ConfigError(
                f"cpus is {self.cpus}, but must be at least {_LEAST_QUOTA / PERIOD}",
                field="cpus",
            )
        if burst > quota:
            raise ConfigError(
                f"cpu_burst is {self.cpu_burst} seconds, but may be at most what one period of "
                f"{PERIOD / 1e6} seconds brings: {quota / 1e6}",
                field="cpu_burst",
            )
        return quota, burst

    def _io(self, change: bool) -> list[tuple[int, int, int | None, int | None]]:
        read = _rates(self.io_read, "io_read")
        write = _rates(self.io_write, "io_write")
        return [
            (os.major(disk), os.minor(disk), read.get(disk), write.get(disk))
            for disk in sorted({*read, *write, *(disks() if change else ())})
        ]


_CONTROLLERS = {
    "memory": "memory",
    "swap": "memory",
    "cpus": "cpu",
    "cpu_shares": "cpu",
    "pids": "pids",
    "io_read": "io",
    "io_write": "io",
    "cpuset": "cpuset",
    "devices": "devices",
}


class CgroupStats(Record):
    """What a cgroup uses and has used. None: the host has no controller that counts it."""

    memory: int | None  # bytes in use, page cache included
    memory_peak: int | None  # bytes
    memory_cache: int | None  # bytes of `memory` that are page cache
    oom_kills: int | None  # processes that were killed for want of memory
    cpu_seconds: float | None
    throttled_seconds: float | None  # in which it waited for its quota
    pids: int | None  # processes and threads
    io_read: int | None  # bytes from block devices
    io_written: int | None  # bytes to block devices


class Cgroup:
    """A group of processes with limits, in the host's cgroups; made by `create()` or `open()`.

    It outlives this process. In a with-block it is killed and removed at the end.
    """

    def __init__(self, native: _native.Cgroup) -> None:
        self._native = native

    @classmethod
    def create(
        cls,
        name: str,
        limits: Limits | None = None,
        *,
        complete: bool = True,
        tree: _native.CgroupTree | None = None,
    ) -> Cgroup:
        """Makes one. `name` is of letters, digits, - and _.

        `complete`: in every hierarchy, so that any limit may be set later and everything is
        counted; else only where `limits` need it, which is faster. Raises LimitUnavailable,
        ConfigError, and HostError (EEXIST) if the name is taken.
        """
        wanted = (limits or Limits(devices=None)).native()
        return cls(_native.Cgroup.create(tree or _tree(), name, wanted, complete))

    @classmethod
    def open(cls, name: str, *, tree: _native.CgroupTree | None = None) -> Cgroup:
        """The one of that name that stands there. Raises HostError (ENOENT) if there is none."""
        return cls(_native.Cgroup.open(tree or _tree(), name))

    @staticmethod
    def names(*, tree: _native.CgroupTree | None = None) -> list[str]:
        """The names of all of polyvisor's cgroups, whoever made them."""
        return (tree or _tree()).names()

    @property
    def name(self) -> str:
        return self._native.name

    @property
    def unified(self) -> str | None:
        """Its path in the cgroup v2 tree; None if the host has none."""
        return self._native.unified or None

    def fds(self) -> list[int]:
        """O_PATH descriptors of its directories, v2's first; they are valid as long as this."""
        return self._native.fds()

    def change(self, limits: Limits) -> None:
        """Replaces all limits while it runs. What is None becomes unlimited.

        Raises as `create()` does, and HostError (EBUSY) if more memory is in use than is allowed.
        """
        self._native.change(limits.native(change=True))

    def stats(self) -> CgroupStats:
        fields = self._native.stats()
        for name in ("cpu", "throttled"):
            used = fields.pop(f"{name}_us")
            fields[f"{name}_seconds"] = None if used is None else used / 1e6
        return CgroupStats(**fields)

    def processes(self) -> list[int]:
        """The ids of all processes in it and in cgroups below it."""
        return self._native.processes()

    def attach(self, pid: int) -> None:
        """Moves a running process into it. What it had before it came stays charged elsewhere.

        The kernel takes some milliseconds for that; a process should be started in it instead.
        """
        self._native.attach(pid)

    def delegate(self, uid: int, gid: int) -> None:
        """Lets that user make cgroups below it (v2, and systemd's in v1), but not change limits."""
        self._native.delegate(uid, gid)

    def freeze(self, timeout: float = PATIENCE) -> None:
        """Stops everything in it. Raises HostError (EBUSY) if it does not stand still in time."""
        self._freeze(True, timeout)

    def thaw(self, timeout: float = PATIENCE) -> None:
        """Lets everything in it go on."""
        self._freeze(False, timeout)

    def _freeze(self, frozen: bool, timeout: float) -> None:
        if not self._native.freeze(frozen, timeout):
            what = "stand still" if frozen else "go on"
            raise HostError(
                f"The cgroup {self.name!r} did not {what} in {timeout} seconds.", errno=errno.EBUSY
            )

    def kill(self, timeout: float = PATIENCE) -> None:
        """Kills everything in it, for certain, and waits until nothing is left.

        Raises HostError (EBUSY) if something is left after `timeout` seconds (a process in an
        uninterruptible wait of the kernel).
        """
        if not self._native.kill(timeout):
            raise HostError(
                f"Processes {self.processes()} of the cgroup {self.name!r} did not end in "
                f"{timeout} seconds after SIGKILL; they wait in the kernel, for a file system?",
                errno=errno.EBUSY,
            )

    def remove(self) -> None:
        """Removes it, with what was made below it. Nothing happens if it is gone already.

        Raises HostError (EBUSY) while there are processes in it.
        """
        self._native.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self.remove()

    def __repr__(self) -> str:
        return f"<Cgroup {self.name}>"


def disks() -> list[int]:
    """Device numbers of the host's whole disks: what `io_read` and `io_write` hold for."""
    found = []
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else []:
        if name.startswith(("ram", "loop", "zram")):
            continue
        with open(f"/sys/block/{name}/size") as size, open(f"/sys/block/{name}/dev") as number:
            if int(size.read()):
                found.append(os.makedev(*map(int, number.read().split(":"))))
    return found


_trees: dict[int, _native.CgroupTree] = {}


def _tree() -> _native.CgroupTree:
    """The host's, found once for a process."""
    pid = os.getpid()
    if pid not in _trees:
        _trees[pid] = _native.CgroupTree()
    return _trees[pid]


def _size(value: int | str | None, field: str, low: int) -> int | None:
    if value is None:
        return None
    size = parse_size(value, field)
    if not low <= size < 1 << 62:
        raise ConfigError(f"{field} is {value!r}, but must be at least {low} bytes", field=field)
    return size


def _whole(value: object, field: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{field} must be a whole number from {low} to {high}, not {value!r}", field=field
        )


def _microseconds(value: object, field: str, factor: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise ConfigError(f"{field} must be a number such as 0.5, not {value!r}", field=field)
    return round(value * factor)


def _rates(value: int | str | Mapping[str, int | str] | None, field: str) -> dict[int, int | None]:
    """Bytes a second by device number."""
    if value is None:
        return {}
    if isinstance(value, int | str):
        rate = _size(value, field, 1)
        found = disks()
        if not found:
            raise LimitUnavailable(f"{field}: this host has no disk of its own.", controller="io")
        return dict.fromkeys(found, rate)
    return {_device(path, field): _size(rate, field, 1) for path, rate in value.items()}


def _device(path: str, field: str) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ConfigError(
            f"{field}: {path!r} is no disk here: {error.strerror}", field=field
        ) from None
    if status.st_mode & 0o170000 != 0o060000:
        raise ConfigError(f"{field}: {path!r} is no block device, as /dev/sda is", field=field)
    return status.st_rdev


def cpu_numbers(text: str) -> list[int]:
    """The CPUs of a list such as "0-1,3". Raises ConfigError("cpuset")."""

    def numbers() -> Iterator[int]:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            yield from range(int(first), int(last if dash else first) + 1)

    try:
        found = sorted(set(numbers()))
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f'cpuset is {text!r}, but must be as "0-1,3"', field="cpuset")
    return found


def _cpuset(text: str | None) -> str:
    if text is None:
        return ""
    numbers = cpu_numbers(text)
    missing = set(numbers) - set(range(os.cpu_count() or 1))
    if missing:
        raise ConfigError(
            f"cpuset is {text!r}, but this host has no CPU {min(missing)}", field="cpuset"
        )
    return ",".join(map(str, numbers))


def _rules(
    devices: Sequence[str] | None,
) -> list[tuple[str, int | None, int | None, str]] | None:
    """Rules for the same devices are one, as v1 has it; v2 would want one to allow everything."""
    if devices is None or (devices == "default" and os.geteuid() != 0):
        return None
    found: dict[tuple[str, int | None, int | None], str] = {}
    for text in DEFAULT_DEVICES if devices == "default" else devices:
        kind, major, minor, access = _rule(text)
        which = (kind, major, minor)
        found[which] = found.get(which, "") + access
    return [(*which, access) for which, access in found.items()]


def _rule(text: str) -> tuple[str, int | None, int | None, str]:
    """The rule "c 1:3 rw" (`*` for any number), as (type, major, minor, access)."""
    try:
        kind, numbers, access = text.split()
        major, minor = (None if one == "*" else int(one) for one in numbers.split(":"))
    except (AttributeError, ValueError):
        kind = access = ""
        major = minor = None
    if kind not in ("b", "c") or not access or set(access) - set("rwm"):
        raise ConfigError(
            f'devices: {text!r} is no rule such as "c 1:3 rw" or "b 8:* r"', field="devices"
        )
    return kind, major, minor, access


__all__ = ["DEFAULT_DEVICES", "Cgroup", "CgroupStats", "Limits", "cpu_numbers", "disks"]
