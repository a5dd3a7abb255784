"""Identical files of different VPSs become one on the disk, as Linux-VServer's vhashify had it.

Nothing that a VPS sees changes, and when it writes to such a file it has its own again: that is the
file system's doing where it shares extents (`unify_extents`: btrfs, XFS), and overlayfs's doing
elsewhere, from whose lower layers files are copied up when they are written (`unify_layers`).
docs/unify.md tells how, and what remains to be seen of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from polyvisor.errors import HostError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _typeshed import StrPath

_FICLONE = 0x40049409  # linux/fs.h
_CHUNK = 1 << 20
#: Attributes of overlayfs, of mounts of root and of users, have these names.
OVERLAY = ("trusted.overlay.", "user.overlay.")


class Tree(Record):
    """The files of one VPS: `upper` is its overlay's upper directory; `shared` a directory beside
    it, which is the topmost of its lower layers if it exists. `running`: it is mounted."""

    name: str
    upper: Path
    shared: Path
    running: bool


class UnifyReport(Record, kw_only=True):
    """What one run of `unify` did."""

    #: "extents" (the file system shares them) or "layers" (hard links in read-only layers).
    method: str
    #: Files that were looked at, and those of them that are another's now.
    files: int
    unified: int
    #: Bytes of the disk that this run freed, less what it took for directories.
    saved_bytes: int
    #: Names of VPSs that were left alone as they run.
    skipped: tuple[str, ...]


def unify(trees: Sequence[Tree], store: StrPath) -> UnifyReport:
    """Makes files of `trees` one where they are identical: in contents, and with "layers" also in
    mode, owner, time of modification and extended attributes.

    `store` is a directory for what they have in common, made if need be, on the same file system.
    The caller keeps every tree that is not `running` from starting meanwhile. Only one at a time
    works on a store; another waits. It may be killed at any moment: what a VPS sees is the same
    after every step, and the next run goes on from there.

    Raises:
        HostError: a system call failed; `path` is what it was about.
    """
    from polyvisor.vps import unify_extents, unify_layers

    with _locked(Path(store)) as place:
        if _shares_extents(place):
            return unify_extents.unify(trees)
        return unify_layers.unify(trees, place)


def copy_layer(source: StrPath, target: StrPath) -> None:
    """Copies a `shared` layer, for a clone or a snapshot: directories, with all that belongs to
    them, and hard links to the files, which nobody writes to. `target` must not exist.

    Raises:
        HostError: a system call failed.
    """
    with host_errors():
        os.mkdir(target, 0o755)
        for directory, names, files in os.walk(source):
            to = os.path.join(target, os.path.relpath(directory, source))
            for name in names:
                os.mkdir(os.path.join(to, name), 0o755)
            for name in files:
                os.link(os.path.join(directory, name), os.path.join(to, name))
            for attribute in os.listxattr(directory):
                os.setxattr(to, attribute, os.getxattr(directory, attribute))


@contextmanager
def host_errors() -> Iterator[None]:
    """OSError becomes HostError."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"unify stopped at {error.filename} ({error.strerror}); nothing is lost, and it can be "
            "run again",
            errno=error.errno or 0,
            path=str(error.filename or ""),
        ) from error


@contextmanager
def opened(path: StrPath) -> Iterator[int]:
    """A descriptor to read the regular file `path`, whose time of access stays as it is if this
    user may ask for that."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def digest(path: StrPath, *, heading: bytes = b"") -> str:
    """SHA-256 of `heading` and the contents of `path`, in hexadecimal."""
    found = hashlib.sha256(heading)
    with opened(path) as descriptor:
        while chunk := os.read(descriptor, _CHUNK):
            found.update(chunk)
    return found.hexdigest()


def walk(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every regular file below `top` with its status, in the order of names; without following
    links or leaving the file system. What vanishes meanwhile is left out."""
    device = os.lstat(top).st_dev
    folders = [top]
    while folders:
        try:
            entries = sorted(os.scandir(folders.pop()), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_dev != device:
                continue
            if stat.S_ISDIR(status.st_mode):
                folders.append(Path(entry.path))
            elif stat.S_ISREG(status.st_mode):
                yield Path(entry.path), status


@contextmanager
def _locked(store: Path) -> Iterator[Path]:
    with host_errors():
        store.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield store
        finally:
            os.close(descriptor)


def _shares_extents(store: Path) -> bool:
    """Whether the file system of `store` can make a file out of another's extents."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        source = os.open(store, flags, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return False
        raise
    try:
        os.write(source, bytes(4096))
        target = os.open(store, flags, 0o600)
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError:
            return False
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True
