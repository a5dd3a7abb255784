"""Files that polyvisor fetched or made, kept between runs.

A cache entry is a directory that appears complete or not at all (it is made beside its place and
renamed), with a manifest of sizes, times and SHA-256 sums that is checked on every use: an entry
that was cut off or changed is made again. Two processes that want the same entry make it once; the
second waits for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from polyvisor.errors import HostError

_MANIFEST = "manifest.json"


def root() -> Path:
    """The cache's directory: POLYVISOR_CACHE, or polyvisor in XDG_CACHE_HOME (~/.cache)."""
    given = os.environ.get("POLYVISOR_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "polyvisor"


def entry(
    name: str, make: Callable[[Path], None], *, refresh: bool = False, large: bool = False
) -> Path:
    """The directory of entry `name`; `make(directory)` fills it when it is missing or damaged.

    The files of a `large` entry are only summed again when their times have changed: reading them
    all each time would cost more than keeping them saves.
    Raises `HostError` when the cache cannot be written, and whatever `make` raises; nothing is left
    behind then.
    """
    place = root() / name
    if not refresh and _intact(place, large):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_name(place.name + ".lock")):
            if not refresh and _intact(place, large):  # another process made it meanwhile
                return place
            _make(place, make)
    except OSError as error:
        raise HostError(
            f"cannot keep {place} in polyvisor's cache: {error.strerror or error}; make room there "
            f"or set POLYVISOR_CACHE to a directory that can be written",
            errno=error.errno or 0,
            path=str(place),
        ) from error
    return place


def file_sum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(place: Path, make: Callable[[Path], None]) -> None:
    fresh = Path(tempfile.mkdtemp(prefix=place.name + ".new-", dir=place.parent))
    try:
        fresh.chmod(0o755)
        make(fresh)
        manifest = {}
        for path in sorted(fresh.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(fresh))
                found = path.stat()
                manifest[name] = {
                    "size": found.st_size,
                    "time": found.st_mtime_ns,
                    "sha256": file_sum(path),
                }
        (fresh / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        old = fresh.with_name(fresh.name + ".old")
        if place.exists():
            place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _intact(place: Path, large: bool) -> bool:
    try:
        manifest = json.loads((place / _MANIFEST).read_text())
        for name, expected in manifest.items():
            path = place / name
            found = path.stat()
            if found.st_size != expected["size"]:
                return False
            if large and found.st_mtime_ns == expected["time"]:
                continue
            if file_sum(path) != expected["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(manifest)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
