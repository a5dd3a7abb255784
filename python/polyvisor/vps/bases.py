"""Bases: the read-only file systems that VPSs share.

A base is "debian" or "debian-<suite>", built by mmdebstrap when it is first used; a name given by
`add`; a directory, used where it is and not to be changed while a VPS uses it; or a tar, unpacked
once. What polyvisor made or unpacked is in <root>/.bases/<name>/ with a file base.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from polyvisor.errors import ConfigError, StateMismatch
from polyvisor.vps import files
from polyvisor.vps.store import Lock, Store, check_name, read, write

Progress = Callable[[str], None]

#: What has nothing to do in a VPS: there are no devices to find, no screens, no clock to set, and
#: the network is there already.
_MASKED = (
    "systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket",
    "systemd-udev-trigger.service", "systemd-modules-load.service", "systemd-pstore.service",
    "systemd-networkd.service", "systemd-networkd.socket", "systemd-timesyncd.service",
    "getty@tty1.service", "console-getty.service", "e2scrub_reap.service", "e2scrub_all.timer",
    "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "dev-hugepages.mount", "proc-sys-fs-binfmt_misc.automount",
)  # fmt: skip
_DEBIAN = re.compile(r"debian(-[a-z]+)?")


class Base(msgspec.Struct, kw_only=True):
    """A base in the store. `origin` is what it was made of."""

    name: str
    path: str
    origin: str
    created: float
    size: int


class Init(msgspec.Struct, kw_only=True):
    """How a base's own init is started and asked to end."""

    argv: list[str]
    own: bool
    stop_signal: int


class Bases:
    """The bases of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = store.root / ".bases"

    def all(self) -> list[Base]:
        """Those in the store, by name."""
        try:
            names = sorted(name for name in os.listdir(self._root) if not name.startswith("."))
        except FileNotFoundError:
            return []
        found = (self._read(name) for name in names)
        return [base for base in found if base is not None]

    def get(self, base: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
        """The directories that are a base, made if they are not there yet.

        Raises `ConfigError` for what is no base, and what building one raises (rootfs.fetch).
        """
        text = os.fspath(base)
        if ("/" not in text and not os.path.exists(text)) or _DEBIAN.fullmatch(text):
            known = self._read(text) if re.fullmatch(r"[a-z0-9.-]+", text) else None
            if known is None and _DEBIAN.fullmatch(text):
                known = self.build(text, progress=progress)
            if known is None:
                raise ConfigError(
                    f"there is no base {text!r}: give debian, debian-SUITE, a directory, a tar, or "
                    f"one that `polyvisor vps bases list` shows",
                    field="base",
                )
            return [known.path]
        path = Path(text).absolute()
        if path.is_dir():
            return [os.path.realpath(path)]
        if path.is_file():
            found = path.stat()
            key = f"{os.path.realpath(path)}\0{found.st_size}\0{found.st_mtime_ns}"
            name = "tar-" + hashlib.sha256(key.encode()).hexdigest()[:16]
            made = self._read(name) or self.add(name, path, progress=progress)
            return [made.path]
        raise ConfigError(f"there is no directory or file {path} for a base", field="base")

    def build(
        self,
        name: str = "debian",
        *,
        packages: Sequence[str] = (),
        mirror: str = "",
        refresh: bool = False,
        progress: Progress | None = None,
    ) -> Base:
        """Builds "debian" (bookworm) or "debian-<suite>"; `refresh` gets the present packages.

        Raises `ConfigError`, `ImageError` as `rootfs.fetch` does, `StateMismatch` when the base is
        there and in use.
        """
        from polyvisor.images import rootfs

        if not _DEBIAN.fullmatch(name):
            raise ConfigError(f"{name!r}: only debian or debian-SUITE can be built", field="base")
        report = progress or (lambda text: None)
        suite = name.partition("-")[2] or "bookworm"
        made = rootfs.fetch(suite, packages, mirror=mirror, refresh=refresh, progress=progress)

        def fill(root: Path) -> None:
            report(f"unpacking Debian {suite}")
            files.unpack(Path(made.tar), root)
            units = root / "etc/systemd/system"
            for unit in _MASKED:
                with contextlib.suppress(FileExistsError):
                    os.symlink("/dev/null", units / unit)
            # Each VPS has an identity of its own, made at its first start.
            files.run("sh", "-c", f"rm -f '{root}'/etc/ssh/ssh_host_*; : >'{root}'/etc/machine-id")

        return self._make(name, f"Debian {suite}", fill)

    def add(
        self, name: str, source: str | os.PathLike[str], progress: Progress | None = None
    ) -> Base:
        """A base of a copy of a directory, or of a tar."""
        check_name(name, "base")
        path = Path(source).absolute()
        report = progress or (lambda text: None)

        def fill(root: Path) -> None:
            report(f"unpacking {path}")
            if path.is_dir():
                root.rmdir()
                files.copy(path, root)
            else:
                files.unpack(path, root)

        if not path.exists():
            raise ConfigError(f"there is no directory or file {path} for a base", field="source")
        return self._make(name, str(path), fill)

    def remove(self, name: str) -> None:
        """Removes a base. `StateMismatch`: there is none, or a VPS is on it."""
        with self._lock(name):
            base = self._read(check_name(name, "base"))
            if base is None:
                raise StateMismatch(
                    f"there is no base {name!r}; `polyvisor vps bases list` shows what there is"
                )
            self._refuse_if_used(name, base.path)
            old = Path(tempfile.mkdtemp(prefix=".old-", dir=self._root))
            (self._root / name).rename(old)
            files.remove(old)
        (self._root / f".{name}.lock").unlink(missing_ok=True)

    def users(self, path: str) -> list[str]:
        """The VPSs that are on the base at `path`."""
        from polyvisor.vps.store import Config

        found = []
        for name in self._store.names():
            config = read(self._store.path(name) / "config.json", Config)
            if config is not None and path in config.lower:
                found.append(name)
        return found

    def _make(self, name: str, origin: str, fill: Callable[[Path], None]) -> Base:
        with self._lock(name):
            self._sweep(name)
            place = self._root / name
            if place.exists():
                self._refuse_if_used(name, str(place / "root"))
            fresh = Path(tempfile.mkdtemp(prefix=f".new-{name}.", dir=self._root))
            try:
                root = fresh / "root"
                root.mkdir(mode=0o755)
                fill(root)
                base = Base(
                    name=name,
                    path=str(place / "root"),
                    origin=origin,
                    created=time.time(),
                    size=files.used(root),
                )
                write(fresh / "base.json", base, durable=True)
                if place.exists():
                    old = Path(tempfile.mkdtemp(prefix=f".old-{name}.", dir=self._root))
                    place.rename(old)
                    fresh.rename(place)
                    files.remove(old)
                else:
                    fresh.rename(place)
            finally:
                if fresh.exists():
                    files.remove(fresh)
        return base

    def _lock(self, name: str) -> Lock:
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Building takes minutes: whoever wants the same base waits for that.
        return Lock(self._root / f".{name}.lock", f"the base {name}", seconds=3600)

    def _sweep(self, name: str) -> None:
        for path in [*self._root.glob(f".new-{name}.*"), *self._root.glob(f".old-{name}.*")]:
            files.remove(path)

    def _read(self, name: str) -> Base | None:
        return read(self._root / name / "base.json", Base)

    def _refuse_if_used(self, name: str, path: str) -> None:
        users = self.users(path)
        if users:
            raise StateMismatch(
                f"the base {name} is in use by {', '.join(users[:5])}; delete them first"
            )


def find_init(lower: Sequence[str]) -> Init:
    """The init that a base brings: systemd, busybox, sysvinit; else polyvisor's, which idles."""
    top = Path(lower[0])
    link = top / "sbin/init"
    if not os.path.lexists(link) and not os.path.lexists(top / "usr/sbin/init"):
        return Init(argv=[], own=False, stop_signal=signal.SIGTERM)
    text = os.readlink(link) if link.is_symlink() else ""
    if "systemd" in text:
        halt = signal.SIGRTMIN + 3  # systemd(1), SIGNALS
    elif "busybox" in text:
        halt = signal.SIGUSR2  # busybox's init: power off
    else:
        halt = signal.SIGPWR  # as LXC does; sysvinit's powerwait
    return Init(argv=["/sbin/init"], own=True, stop_signal=int(halt))


__all__ = ["Base", "Bases", "Init", "find_init"]
