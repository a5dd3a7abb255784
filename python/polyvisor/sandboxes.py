"""One command in namespaces of its own, on the host's own files: `polyvisor.sandbox()`.

The command sees the host's root read-only, as the user that called; a /tmp, /var/tmp and /run of
its own, empty; a /proc and /dev of its own; no network, and no other processes. It has no
capability, may not get one, and a system call filter denies what endangers the kernel.
docs/sandbox.md tells what that keeps in, and what not. Nothing of it is left when it has ended.
"""

from __future__ import annotations

import itertools
import os

from polyvisor import _native
from polyvisor.errors import ConfigError, ProcessTimeout
from polyvisor.process_streams import streams
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Literal

    from polyvisor.vps.limits import Cgroup

    Path = str | os.PathLike[str]
    #: A path of the host's, or that and its place in the sandbox.
    Place = Path | tuple[Path, Path]

#: Of /proc and /sys: what tells about the host, and what changes it. Docker's and runc's lists.
MASKED = [
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
    *("/sys/firmware", "/sys/devices/virtual/powercap"),
]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
#: Folders that a sandbox has of its own: other programs' sockets are there.
PRIVATE = ("/tmp", "/var/tmp", "/run")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_numbers = itertools.count()


class SandboxResult(Record, kw_only=True):
    """How a command ended in a sandbox."""

    argv: tuple[str, ...]
    #: Its exit status; 128 + n when signal n ended it.
    status: int
    #: The signal that ended it, 0 for none.
    signal: int
    #: What it wrote, b"" when that went elsewhere.
    stdout: bytes
    stderr: bytes
    #: "memory" if the kernel ended something in it for its memory.
    limits: tuple[str, ...]

    @property
    def text(self) -> str:
        """`stdout` as text."""
        return self.stdout.decode("utf-8", "replace")


def sandbox(
    argv: Sequence[str | os.PathLike[str]],
    *,
    ro: Iterable[Place] = (),
    rw: Iterable[Place] = (),
    net: Literal["none", "host"] = "none",
    memory: int | str | None = None,
    cpus: float | None = None,
    pids: int | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    hostname: str = "sandbox",
    stdin: bytes | int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> SandboxResult:
    """Runs a command on the host's files without letting it change any, and waits for its end.

    `ro` and `rw` are more paths of the host's, or pairs of one and its place in the sandbox; what
    is in `rw` can be written to. `memory` (bytes, or text such as "256M"), `cpus` (0.5 is half of
    one) and `pids` limit all its processes together; `timeout` is in seconds. Its environment is
    PATH, HOME=/tmp, LANG and TERM, and `env`. It starts in `cwd`: by default in the caller's folder
    if that is there in the sandbox, else in /tmp. `stdin` is bytes or a descriptor; `stdout` and
    `stderr` are descriptors, and collected when they are None.

    Raises ConfigError for an option that makes no sense, LimitUnavailable for a limit that this
    user or host cannot set, ProcessTimeout, and HostError for a command that cannot be executed
    (its `errno` is ENOENT when there is none) or a host that forbids user namespaces.
    """
    command = [os.fspath(word) for word in argv]
    if not command or not command[0]:
        raise ConfigError("a sandbox needs a command to run", field="argv")
    if timeout is not None and timeout <= 0:
        raise ConfigError(f"timeout must be more than 0 seconds, not {timeout:g}", field="timeout")
    given = [*_mounts(ro, read_only=True), *_mounts(rw, read_only=False)]
    collected: dict[str, int] = {}
    try:
        with (
            streams(collected, stdin, stdout, stderr) as standard,
            _Limited(memory, cpus, pids) as limited,
        ):
            spec = _spec(
                command,
                given,
                net=net,
                env=env or {},
                cwd=cwd,
                hostname=hostname,
                cgroups=limited.fds(),
                standard=standard,
            )
            status = _native.run(spec, timeout)
            limits = limited.met()
        out, err = (_read_all(collected.get(name, -1)) for name in ("stdout", "stderr"))
    finally:
        for descriptor in collected.values():
            os.close(descriptor)
    if status is None:
        assert timeout is not None
        raise ProcessTimeout(
            f"{command[0]} did not end within {timeout:g} s and was killed",
            seconds=timeout,
            stdout=out,
            stderr=err,
        )
    code = os.waitstatus_to_exitcode(status)
    return SandboxResult(
        argv=tuple(command),
        status=code if code >= 0 else 128 - code,
        signal=max(-code, 0),
        stdout=out,
        stderr=err,
        limits=limits,
    )


def _spec(
    command: list[str],
    given: list[_native.Mount],
    *,
    net: str,
    env: Mapping[str, str],
    cwd: Path | None,
    hostname: str,
    cgroups: list[int],
    standard: tuple[int, int, int],
) -> _native.LaunchSpec:
    if net not in ("none", "host"):
        raise ConfigError(f"net must be none or host, not {net!r}", field="net")
    uid, gid = os.geteuid(), os.getegid()
    mount = _native.Mount
    private = [
        mount("tmpfs", "tmpfs", path, options="mode=755" if path == "/run" else "mode=1777")
        for path in PRIVATE
        if os.path.isdir(path) and not os.path.islink(path)
    ]
    environment = {"PATH": PATH, "HOME": "/tmp"}
    environment |= {name: os.environ[name] for name in ("LANG", "TERM") if name in os.environ}
    environment |= env
    directory = os.path.abspath(cwd) if cwd is not None else _directory(given)
    return _native.LaunchSpec(
        command,
        env=[f"{name}={value}" for name, value in environment.items()],
        cwd=directory,
        read_only_root=True,
        mounts=[
            *private,
            mount("proc", "proc", "/proc", noexec=True),
            mount("dev", "dev", "/dev"),
            *given,
        ],
        masked=MASKED,
        read_only_paths=READ_ONLY,
        namespaces=_namespaces(net),
        uid_map=[(uid, uid, 1)],
        gid_map=[(gid, gid, 1)],
        hostname=hostname,
        uid=uid,
        gid=gid,
        cgroups=cgroups,
        stdin=standard[0],
        stdout=standard[1],
        stderr=standard[2],
    )


def _namespaces(net: str) -> int:
    every, network = 0x7E020080, 0x40000000  # CLONE_NEW*: of all eight kinds, and CLONE_NEWNET
    return every & ~network if net == "host" else every


def _mounts(places: Iterable[Place], *, read_only: bool) -> Iterator[_native.Mount]:
    for place in places:
        host, inside = place if isinstance(place, tuple) else (place, place)
        source = os.path.abspath(host)
        if not os.path.exists(source):
            raise ConfigError(
                f"{os.fspath(host)!r} is to be in the sandbox, but is not on the host", field="path"
            )
        yield _native.Mount(
            "bind", os.path.realpath(source), os.path.abspath(inside), read_only=read_only
        )


def _directory(given: list[_native.Mount]) -> str:
    """The caller's, if it is there in the sandbox."""
    here = os.getcwd()

    def within(folder: str) -> bool:
        return here == folder or here.startswith(folder.rstrip("/") + "/")

    hidden = any(within(folder) for folder in (*PRIVATE, "/dev", "/proc"))
    shown = any(within(mount.target) for mount in given)
    return here if shown or not hidden else "/tmp"


def _read_all(descriptor: int) -> bytes:
    """What is in a file in memory; b"" for none."""
    if descriptor < 0:
        return b""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


class _Limited:
    """A cgroup for as long as the sandbox runs, if there is a limit."""

    def __init__(self, memory: int | str | None, cpus: float | None, pids: int | None) -> None:
        self._cgroup: Cgroup | None = None
        if memory is None and cpus is None and pids is None:
            return
        from polyvisor.vps.limits import Cgroup, Limits

        # (Devices are the user namespace's affair, where none can be made.)
        limits = Limits(memory=memory, cpus=cpus, pids=pids, devices=None)
        name = f"sandbox-{os.getpid()}-{next(_numbers)}"
        self._cgroup = Cgroup.create(name, limits, complete=False)

    def fds(self) -> list[int]:
        return self._cgroup.fds() if self._cgroup else []

    def met(self) -> tuple[str, ...]:
        return ("memory",) if self._cgroup and self._cgroup.stats().oom_kills else ()

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cgroup:
            self._cgroup.kill()  # what an interrupted run left there; at once when it is empty
            self._cgroup.remove()
