"""Files that polyvisor fetched or made, kept between runs.

A cache entry is a directory that appears complete or not at all (it is made beside its place and
renamed), with a manifest of sizes, times and SHA-256 sums. Sizes and times are checked on every
use, the sum of a file whose time has changed (summing all of them each time would cost more than
keeping some of them saves): an entry that was cut off or changed is made again. Two processes that
want the same entry make it once; the second waits for the first.
"""

from __future__ import annotations

import os

from polyvisor.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    #: Of a file: size, time of the last change in ns since 1970, SHA-256 sum.
    Known: TypeAlias = tuple[int, int, str]

#: A line for each file, with what is `Known` of it and its name.
_MANIFEST = "manifest"


def root() -> Path:
    """The cache's directory: POLYVISOR_CACHE, or polyvisor in XDG_CACHE_HOME (~/.cache)."""
    from pathlib import Path

    return Path(root_path())


def root_path() -> str:
    """`root`, as text: nothing that only finds something in the cache should have to wait for
    pathlib."""
    given = os.environ.get("POLYVISOR_CACHE")
    if given:
        return given
    base = os.environ.get("XDG_CACHE_HOME")
    if not base or not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "polyvisor")


def entry(name: str, make: Callable[[Path], None], *, refresh: bool = False) -> Path:
    """The directory of entry `name`; `make(directory)` fills it when it is missing or damaged.

    Raises `HostError` when the cache cannot be written, and whatever `make` raises; nothing is left
    behind then.
    """
    from pathlib import Path

    return Path(entry_path(name, make, refresh=refresh))


def entry_path(name: str, make: Callable[[Path], None], *, refresh: bool = False) -> str:
    """`entry`, as text."""
    found = os.path.join(root_path(), name)
    if refresh or not _intact(found):
        _make_alone(found, make, refresh)
    return found


def _make_alone(found: str, make: Callable[[Path], None], refresh: bool) -> None:
    """Makes an entry, unless another process does so meanwhile."""
    # Only here: importing these takes longer than finding what is there.
    import fcntl
    from pathlib import Path

    place = Path(found)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(f"{found}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if refresh or not _intact(found):
                _make(place, make)
        finally:
            os.close(lock)
    except OSError as error:
        raise HostError(
            f"cannot keep {place} in polyvisor's cache: {error.strerror or error}; make room there "
            f"or set POLYVISOR_CACHE to a directory that can be written",
            errno=error.errno or 0,
            path=found,
        ) from error


def file_sum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, as hexadecimal text; what the cache knows of its own files is believed."""
    name = os.fspath(path)
    if name.startswith(os.path.join(root_path(), "")):
        directory, base = os.path.split(name)
        known = _manifest(directory).get(base)
        if known is not None and _unchanged(name, known):
            return known[2]
    return _sum(name)


def _sum(path: str) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(place: Path, make: Callable[[Path], None]) -> None:
    import shutil
    import tempfile
    from pathlib import Path

    fresh = Path(tempfile.mkdtemp(prefix=place.name + ".new-", dir=place.parent))
    try:
        fresh.chmod(0o755)
        make(fresh)
        lines = []
        for path in sorted(fresh.rglob("*")):
            if path.is_file():
                found = path.stat()
                lines.append(
                    f"{found.st_size} {found.st_mtime_ns} {_sum(str(path))} "
                    f"{path.relative_to(fresh)}\n"
                )
        (fresh / _MANIFEST).write_text("".join(lines))
        old = fresh.with_name(fresh.name + ".old")
        if place.exists():
            place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _intact(place: str) -> bool:
    manifest = _manifest(place)
    return bool(manifest) and all(
        _unchanged(os.path.join(place, name), known) for name, known in manifest.items()
    )


def _manifest(place: str) -> dict[str, Known]:
    """What is known of an entry's files; empty when that cannot be read."""
    found: dict[str, Known] = {}
    try:
        with open(os.path.join(place, _MANIFEST), encoding="utf-8") as file:
            for line in file:
                size, time, digest, name = line.removesuffix("\n").split(" ", 3)
                found[name] = int(size), int(time), digest
    except (OSError, ValueError):
        return {}
    return found


def _unchanged(path: str, known: Known) -> bool:
    size, time, digest = known
    try:
        found = os.stat(path)
        return found.st_size == size and (found.st_mtime_ns == time or _sum(path) == digest)
    except OSError:
        return False
