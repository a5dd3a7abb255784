"""Files that polyvisor fetched or made, kept between runs.

A cache entry is a directory that appears complete or not at all (it is made beside its place and
renamed), with a manifest of sizes, times and SHA-256 sums. Sizes and times are checked on every
use, the sum of a file whose time has changed (summing all of them each time would cost more than
keeping some of them saves): an entry that was cut off or changed is made again. Two processes that
want the same entry make it once; the second waits for the first.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyvisor.errors import HostError

_MANIFEST = "manifest.json"


def root() -> Path:
    """The cache's directory: POLYVISOR_CACHE, or polyvisor in XDG_CACHE_HOME (~/.cache)."""
    given = os.environ.get("POLYVISOR_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "polyvisor"


def entry(name: str, make: Callable[[Path], None], *, refresh: bool = False) -> Path:
    """The directory of entry `name`; `make(directory)` fills it when it is missing or damaged.

    Raises `HostError` when the cache cannot be written, and whatever `make` raises; nothing is left
    behind then.
    """
    place = root() / name
    if not refresh and _intact(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_name(place.name + ".lock")):
            if not refresh and _intact(place):  # another process made it meanwhile
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
    """SHA-256 of a file, as hexadecimal text; what the cache knows of its own files is believed."""
    if root() in path.parents:
        known = _manifest(path.parent).get(path.name)
        if known is not None and _unchanged(path, known):
            return str(known["sha256"])
    return _sum(path)


def _sum(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(place: Path, make: Callable[[Path], None]) -> None:
    # Only here: importing these takes longer than finding what is there.
    import shutil
    import tempfile

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
                    "sha256": _sum(path),
                }
        (fresh / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        old = fresh.with_name(fresh.name + ".old")
        if place.exists():
            place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _intact(place: Path) -> bool:
    manifest = _manifest(place)
    return bool(manifest) and all(
        _unchanged(place / name, expected) for name, expected in manifest.items()
    )


def _manifest(place: Path) -> dict[str, Any]:
    """What is known of an entry's files; empty when that cannot be read."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _unchanged(path: Path, expected: Any) -> bool:
    try:
        found = path.stat()
        if found.st_size != expected["size"]:
            return False
        return bool(found.st_mtime_ns == expected["time"] or _sum(path) == expected["sha256"])
    except (OSError, KeyError, TypeError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
