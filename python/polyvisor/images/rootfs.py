"""A Debian root file system as a tar, by mmdebstrap, kept in the cache.

tar = rootfs.fetch("bookworm", ["git"]).tar
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from polyvisor.errors import ConfigError, ImageError
from polyvisor.images import cache, packages

#: What every image has on top of Debian's essential packages: an init, a login, a network, ssh.
PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libpam-systemd",
    "netbase",
    "openssh-server",
    "systemd",
    "systemd-sysv",
    "udev",
)
_LAYOUT = 1  # goes into the cache's key: raise it when PACKAGES or the options change
_TAR, _INFO = "rootfs.tar", "info.json"
_TIMEOUT = 3600


class RootFs(msgspec.Struct, frozen=True):
    """A root file system in the cache. `date` is when it was made, seconds since 1970."""

    tar: str
    suite: str
    packages: list[str]
    date: int


def fetch(
    suite: str,
    extra: Sequence[str] = (),
    *,
    mirror: str = "",
    refresh: bool = False,
    progress: packages.Progress | None = None,
) -> RootFs:
    """The root file system of a Debian release with PACKAGES and `extra`, made on first use.

    `mirror` is the archive to take it from ("": Debian's own, with updates and security fixes).
    Raises `ImageError` when mmdebstrap is missing or fails, and `ConfigError` for names that no
    release or package can have.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", suite):
        raise ConfigError(f"{suite!r} is no name of a Debian release", field="suite")
    for name in extra:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*(:[a-z0-9]+)?", name):
            raise ConfigError(f"{name!r} is no name of a package", field="package")
    wanted = sorted({*PACKAGES, *extra})
    report = progress or (lambda text: None)

    def make(directory: Path) -> None:
        import time

        date = int(time.time())
        _mmdebstrap(suite, wanted, mirror, directory / _TAR, report)
        info = {"suite": suite, "packages": wanted, "date": date}
        (directory / _INFO).write_bytes(msgspec.json.encode(info))

    import hashlib

    key = hashlib.sha256("\0".join([suite, mirror, *wanted]).encode()).hexdigest()[:16]
    place = cache.entry_path(f"rootfs/{_LAYOUT}-{suite}-{key}", make, refresh=refresh)
    with open(os.path.join(place, _INFO), "rb") as file:
        info = msgspec.json.decode(file.read())
    return RootFs(os.path.join(place, _TAR), info["suite"], info["packages"], info["date"])


def _mmdebstrap(
    suite: str, wanted: Sequence[str], mirror: str, tar: Path, report: packages.Progress
) -> None:
    program = shutil.which("mmdebstrap")
    if program is None:
        raise ImageError(
            "building an image needs mmdebstrap; install it with `apt-get install mmdebstrap` "
            "(and uidmap, when not root)",
            reason="no-mmdebstrap",
        )
    command = [
        program,
        "--variant=minbase",
        "--include=" + ",".join(wanted),
        # What was unpacked halfway is thrown away anyway: no need to wait for the disk.
        "--dpkgopt=force-unsafe-io",
        "--format=tar",
        suite,
        "-",
        *([mirror] if mirror else []),
    ]
    with tar.open("wb") as output, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            text=True,
            errors="replace",
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                log.write(line)
                step = re.match(r"I: ((?:download|extract|install|creat)ing .*?)\.*$", line)
                if step:
                    report(f"building Debian {suite}: {step[1]}")
            status = process.wait(_TIMEOUT)
        except BaseException:
            process.terminate()  # which it answers by cleaning up
            process.wait()
            raise
        finally:
            process.stderr.close()
        if status:
            log.seek(0)
            raise _failure(log.read(), suite)


def _failure(log: str, suite: str) -> ImageError:
    """The exception for what mmdebstrap said, which is much."""
    for pattern, reason, sentence in _COMPLAINTS:
        found = re.search(pattern, log, re.MULTILINE)
        if found:
            return ImageError(
                f"cannot build Debian {suite}: {sentence.format(*found.groups())}", reason=reason
            )
    errors = re.findall(r"^E: (?!mmdebstrap|apt-get|run_chroot|setup|env )(.+)$", log, re.MULTILINE)
    last = (errors or log.strip().splitlines() or ["it gave no reason"])[0]
    return ImageError(f"cannot build Debian {suite}: mmdebstrap says: {last}", reason="mmdebstrap")


#: In this order: the first that is found is the cause of what follows it.
_COMPLAINTS = (
    (r"No space left on device", "no-space", "the disk is full where the temporary directory is; "
     "make room there or set TMPDIR"),
    (r"E: Unable to locate package (\S+)", "no-package", "it has no package {0}"),
    (r"E: Package '?([^' ]+)'? has no installation candidate", "no-package",
     "it has no package {0}"),
    (r"(?:does not have a Release file|Release' is not signed|404 +Not Found)", "no-suite",
     "the archive has no such release; --suite takes names such as bookworm or trixie"),
    (r"(?:Temporary failure resolving|Could not resolve|Could not connect|Network is unreachable|"
     r"Connection (?:failed|timed out)) ?'?([^'\s]*)", "download",
     "the archive cannot be reached; is there a network?"),
    (r"(?:newuidmap|/etc/subuid|unshare: |Operation not permitted|cannot create user namespace)",
     "no-namespaces", "without root it needs user namespaces; install uidmap, give this user a "
     "range in /etc/subuid and /etc/subgid, or run it as root"),
)  # fmt: skip


__all__ = ["PACKAGES", "RootFs", "fetch"]
