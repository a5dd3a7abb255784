"""Files out of Debian's and Ubuntu's packages, by the host's own apt: no root, nothing installed.

The host's package lists are used when they know the package. Otherwise, and for a foreign
architecture, lists are fetched into a temporary directory with the host's sources and keys; the
system's own state is never touched. apt checks the signatures, all the way from its keys.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from polyvisor.errors import ImageError
from polyvisor.images import cache

Progress = Callable[[str], None]

_TIMEOUT = 900  # seconds for one run of apt, on a slow network
_ENVIRONMENT = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def fetch(
    package: str,
    architecture: str,
    keep: Callable[[Path, Path], None],
    progress: Progress | None = None,
) -> Path:
    """The cached files of a package: `keep(unpacked, directory)` copies what is wanted of it."""

    def make(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="polyvisor-apt-") as scratch:
            apt = Apt(architecture, Path(scratch), progress or _silent)
            deb = apt.download(apt.find([package]).real)
            unpacked = Path(scratch) / "unpacked"
            unpack(deb, unpacked)
            keep(unpacked, directory)

    return cache.entry(f"packages/{package}-{architecture}", make)


class Found(msgspec.Struct, frozen=True):
    """`name` is what was asked for, `real` the package with the files, in `version`."""

    name: str
    real: str
    version: str


class Apt:
    """apt's tools for one architecture, writing only below `scratch`."""

    def __init__(self, architecture: str, scratch: Path, progress: Progress) -> None:
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise ImageError(
                "kernels come from Debian's or Ubuntu's packages, but this host has no apt-get and "
                "dpkg-deb; give a kernel file of your own with --kernel",
                reason="no-apt",
            )
        self._architecture = architecture
        self._scratch = scratch
        self._progress = progress
        self._options: list[str] = []
        self._private = False
        if architecture != _native_architecture():
            self._use_private_lists()

    def find(self, names: Sequence[str]) -> Found:
        """The first of the packages that there is, seen through to what it depends on of its kind.

        A metapackage such as linux-image-cloud-amd64 has no files; it depends on the package of the
        current version, whose name is longer.
        """
        for attempt in range(2):
            for name in names:
                record = self._show(name)
                if record is None:
                    continue
                real = _successor(name, record)
                if real is not None:
                    deeper = self._show(real)
                    if deeper is None:
                        continue
                    return Found(name, real, deeper.get("Version", ""))
                return Found(name, name, record.get("Version", ""))
            if attempt == 0 and not self._private:
                self._use_private_lists()
        raise ImageError(
            f"none of the packages {', '.join(names)} ({self._architecture}) is in this host's "
            f"package sources; add Debian's or Ubuntu's main archive to them, or give a file of "
            f"your own with --kernel",
            reason="no-package",
        )

    def download(self, package: str) -> Path:
        """The .deb, below the scratch directory; lists that are out of date are refreshed once."""
        self._progress(f"downloading {package}")
        target = self._scratch / "debs"
        target.mkdir(exist_ok=True)
        try:
            self._run("apt-get", "download", package, cwd=target)
        except ImageError:
            if self._private:
                raise
            self._use_private_lists()
            self._run("apt-get", "download", package, cwd=target)
        debs = sorted(target.glob("*.deb"))
        if not debs:
            raise ImageError(f"apt-get downloaded no {package}", reason="download")
        return debs[-1]

    def _show(self, name: str) -> dict[str, str] | None:
        try:
            text = self._run("apt-cache", "show", "--no-all-versions", name)
        except ImageError:
            return None
        record: dict[str, str] = {}
        for line in text.split("\n\n")[0].splitlines():
            key, separator, value = line.partition(": ")
            if separator and not line.startswith(" "):
                record[key] = value
        return record or None

    def _use_private_lists(self) -> None:
        """Fetches package lists of its own, leaving the system's alone."""
        self._progress(f"fetching package lists ({self._architecture})")
        state = self._scratch / "apt"
        for name in ("lists/partial", "cache/archives/partial"):
            (state / name).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        settings = {
            "Dir::State": state,
            "Dir::State::lists": state / "lists",
            "Dir::State::status": state / "status",
            "Dir::Cache": state / "cache",
            "APT::Architecture": self._architecture,
            "APT::Architectures": self._architecture,
            "APT::Sandbox::User": "root",  # whoever we are: _apt cannot read a private directory
            "Acquire::Languages": "none",
            "Acquire::Retries": 3,
        }
        self._options = [f"-o{name}={value}" for name, value in settings.items()]
        self._private = True
        try:
            self._run("apt-get", "update")
        except ImageError:
            # One source that fails (a third party's, without this architecture) says nothing about
            # the others: go on with what arrived.
            if not any((state / "lists").glob("*Packages*")):
                raise

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [program, "-q", *self._options, *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=cwd or self._scratch,
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise ImageError(
                f"{program} {arguments[0]} did not end within {_TIMEOUT} s", reason="download"
            ) from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            reason = (errors or done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise ImageError(
                f"{program} {' '.join(arguments)} failed: {reason.removeprefix('E: ')}",
                reason="download",
            )
        return done.stdout


def save_tar(deb: Path, target: Path) -> None:
    """Stores a .deb's files as a tar without compression; `ImageError` for a damaged one."""
    with target.open("wb") as file:
        done = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", deb],
            stdout=file,
            stderr=subprocess.PIPE,
            check=False,
            timeout=_TIMEOUT,
        )
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ImageError(f"{deb.name} is corrupt: {reason}", reason="corrupt")


def unpack(deb: Path, target: Path, wanted: str | None = None) -> None:
    """Unpacks a .deb's regular files; with `wanted` (a regular expression of "boot/vmlinuz-6.1")
    only those.

    Stops reading as soon as files that match have all come by: a kernel's package has gigabytes of
    modules behind its few megabytes of kernel.
    """
    import tarfile

    pattern = re.compile(wanted) if wanted else None
    target.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    seen = False
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if not member.isfile() or ".." in name.split("/"):
                    continue
                if pattern is None or pattern.match(name):
                    content = archive.extractfile(member)
                    assert content is not None
                    path = target / name.lstrip("/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    seen = True
                elif seen:
                    break
    except tarfile.TarError as error:
        raise ImageError(f"{deb.name} is corrupt: {error}", reason="corrupt") from error
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _successor(name: str, record: dict[str, str]) -> str | None:
    """The package that a metapackage stands for: a dependency whose name continues its own."""
    stem = "-".join(name.split("-")[:2])  # linux-image
    for dependency in re.split(r"[,|]", record.get("Depends", "")):
        candidate = dependency.split("(")[0].strip()
        if re.match(rf"{re.escape(stem)}-(unsigned-)?\d", candidate) and candidate != name:
            return candidate
    return None


def _native_architecture() -> str:
    done = subprocess.run(
        ["dpkg", "--print-architecture"], capture_output=True, text=True, check=False, timeout=20
    )
    return done.stdout.strip()


def _silent(text: str) -> None:
    pass
