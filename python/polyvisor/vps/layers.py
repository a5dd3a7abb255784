"""The files of one VPS: layers over its base, snapshots of them, and copies for clones.

`files` is a directory with `upper` (what the VPS wrote), `work` (overlayfs's own) and, once `unify`
was there, `shared` (a read-only layer of hard links). The caller has the VPS's lock throughout, so
what else is there was left by somebody who was killed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from polyvisor.errors import StateMismatch
from polyvisor.vps import files
from polyvisor.vps.store import check_name, read, write


class Snapshot(msgspec.Struct, kw_only=True):
    """A snapshot; `created` in seconds since 1970, `size` in bytes on the disk."""

    name: str
    created: float
    size: int


def create(place: Path) -> None:
    """An empty upper layer."""
    for name in ("", "upper", "work"):
        (place / "files" / name).mkdir(mode=0o755)


def lower(place: Path, base: list[str]) -> list[str]:
    """The layers below `upper`, the topmost first."""
    shared = place / "files" / "shared"
    return [str(shared), *base] if shared.is_dir() else base


def copy(source: Path, target: Path) -> None:
    """Copies layers: `files` of a VPS or a snapshot to a place that does not exist yet."""
    target.mkdir(mode=0o755)
    files.copy(source / "upper", target / "upper")
    (target / "work").mkdir(mode=0o755)
    if (source / "shared").is_dir():
        from polyvisor.vps import unify

        unify.copy_layer(source / "shared", target / "shared")


def snapshots(place: Path) -> list[Snapshot]:
    """Those of a VPS, the oldest first."""
    try:
        names = [name for name in os.listdir(place / "snapshots") if not name.startswith(".")]
    except FileNotFoundError:
        return []
    found = (read(place / "snapshots" / name / "snapshot.json", Snapshot) for name in names)
    return sorted((one for one in found if one is not None), key=lambda one: one.created)


def snapshot_path(place: Path, name: str) -> Path:
    """The layers of a snapshot. `StateMismatch` when there is none of that name."""
    path = place / "snapshots" / check_name(name, "snapshot") / "files"
    if not path.is_dir():
        known = ", ".join(one.name for one in snapshots(place)) or "none"
        raise StateMismatch(f"there is no snapshot {name!r} of VPS {place.name}; it has {known}")
    return path


def take(place: Path, name: str) -> Snapshot:
    """Keeps a copy of the layers under a name. `StateMismatch` when the name is taken."""
    folder = place / "snapshots"
    folder.mkdir(exist_ok=True, mode=0o700)
    _sweep(folder)
    if (folder / check_name(name, "snapshot")).exists():
        raise StateMismatch(f"VPS {place.name} has a snapshot {name!r} already")
    fresh = folder / f".new-{name}"
    fresh.mkdir(mode=0o700)
    try:
        copy(place / "files", fresh / "files")
        taken = Snapshot(name=name, created=time.time(), size=files.used(fresh))
        write(fresh / "snapshot.json", taken, durable=True)
        fresh.rename(folder / name)
    finally:
        if fresh.exists():
            files.remove(fresh)
    return taken


def drop(place: Path, name: str) -> None:
    """Removes a snapshot."""
    path = snapshot_path(place, name).parent
    old = path.with_name(f".old-{name}")
    path.rename(old)
    files.remove(old)


def restore(place: Path, name: str) -> None:
    """Makes the layers what they were at a snapshot; the VPS does not run."""
    source = snapshot_path(place, name)
    repair(place)
    copy(source, place / ".new-files")
    (place / "files").rename(place / ".old-files")
    (place / ".new-files").rename(place / "files")
    files.remove(place / ".old-files")


def repair(place: Path) -> None:
    """Ends what a `restore` that was killed had begun: before the exchange it did not happen, after
    it did."""
    if not (place / "files").exists() and (place / ".old-files").exists():
        (place / ".old-files").rename(place / "files")
    for left in (".new-files", ".old-files"):
        if (place / left).exists():
            files.remove(place / left)


def _sweep(folder: Path) -> None:
    for name in os.listdir(folder):
        if name.startswith("."):
            files.remove(folder / name)


__all__ = [
    "Snapshot", "copy", "create", "drop", "lower", "repair", "restore",
    "snapshot_path", "snapshots", "take",
]  # fmt: skip
