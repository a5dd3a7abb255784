"""`unify` for file systems that cannot share extents (ext4): by a read-only layer for each VPS.

Between a VPS's upper directory and its base lies a layer, `shared`, of hard links to objects in a
store. A file of that layer is not written to: when the VPS writes, overlayfs copies it to the upper
directory first. So the objects of the store never change, and what a plain hard link would do (one
VPS writes and another one's file changes) cannot happen.

Every step leaves what the VPS sees as it was, so that it may end after any of them:

1. What the upper directory hides of `shared` (a file that was written again or removed) goes.
2. A directory that is needed in `shared` is made. If the upper one is opaque then the layer's is
   made so first, and then the upper one stops being it: the base is hidden as before.
3. Of the first file of its kind: the file moves from the upper directory to the layer, where it is
   seen as before; then it is linked into the store.
4. Of every other one: the object is linked into the layer, under the file that hides it; and after
   all that is on the disk, the file is removed from the upper directory.
5. Objects of which nobody has a link go.

In one VPS no two names are links to one object, which would show (as equal inode numbers): for the
second copy of a file there is a second object, ``<digest>-1``. Files with several names, empty
ones, and those that overlayfs has marked for reasons of its own stay where they are.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import stat
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from polyvisor.vps.unify import OVERLAY, UnifyReport, digest, opened, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polyvisor.vps.unify import Tree

    #: What must be equal of two files' status to look further.
    Kind = tuple[int, int, int, int, int]

_SECTOR = 512  # the unit of st_blocks
_COMPARED = 1 << 20
_MOST_LINKS = 60_000  # ext4 has 65,000
#: Marks of overlayfs that say nothing about what is seen.
_HARMLESS = tuple(prefix + name for prefix in OVERLAY for name in ("origin", "impure", "uuid"))
_OPAQUE = tuple(prefix + "opaque" for prefix in OVERLAY)


def unify(trees: Sequence[Tree], store: Path) -> UnifyReport:
    """`polyvisor.vps.unify.unify` with the method "layers"; the caller has locked `store`."""
    with suppress(FileNotFoundError):
        os.unlink(store / _Layer.FRESH)
    layers = [_Layer(tree, store) for tree in trees if not tree.running]
    for layer in layers:
        layer.prune()
    files = [(layer, path, status) for layer in layers for path, status in layer.candidates()]
    # To read a file is the dear part: only those that may have a double are.
    kinds: dict[Kind, set[_Layer]] = defaultdict(set)
    for layer, _, status in files:
        kinds[_kind(status)].add(layer)
    known = {_kind(status) for _, status in walk(store)}
    names: dict[str, list[tuple[_Layer, Path, os.stat_result]]] = defaultdict(list)
    for layer, path, status in files:
        kind = _kind(status)
        if kind in known or len(kinds[kind]) > 1:
            names[_name(layer.tree.upper / path)].append((layer, path, status))
    for name, alike in names.items():
        if len({layer for layer, _, _ in alike}) > 1 or (store / f"{name}-0").exists():
            for layer, path, status in alike:
                layer.add(path, status, name)
    _sync(store)
    for layer in layers:
        layer.finish()
    freed = sum(layer.freed for layer in layers)
    for path, status in walk(store):
        if status.st_nlink == 1:
            os.unlink(path)
            freed += status.st_blocks * _SECTOR
    return UnifyReport(
        method="layers",
        files=len(files),
        unified=sum(layer.unified for layer in layers),
        saved_bytes=freed,
        skipped=tuple(tree.name for tree in trees if tree.running),
    )


class _Layer:
    """One VPS's `shared` layer, while files are moved there from its upper directory."""

    #: A link in the store on its way into a layer.
    FRESH = "fresh"

    def __init__(self, tree: Tree, store: Path) -> None:
        self.tree, self.store = tree, store
        self.freed = 0
        self.unified = 0
        self.inodes: set[int] = set()
        self.usable: dict[Path, bool] = {}  # directories, relative
        self.moved: list[Path] = []  # in the layer, but not in the store
        self.doubles: list[Path] = []  # in upper, over the same in the layer
        self.times: dict[Path, tuple[int, int]] = {}

    def prune(self) -> None:
        """Removes what the upper directory hides of the layer, and directories left empty."""
        if self.tree.shared.is_dir():
            self._prune(Path())
            _sync(self.store)
        for path in self.moved:
            self._register(path)

    def _prune(self, relative: Path) -> None:
        hidden = _opaque(self.tree.upper / relative) is not None
        for entry in sorted(os.scandir(self.tree.shared / relative), key=lambda one: one.name):
            inside = relative / entry.name
            above = _lstat(self.tree.upper / inside)
            folder = entry.is_dir(follow_symlinks=False)
            if hidden or (above and not (folder and stat.S_ISDIR(above.st_mode))):
                self._remove(Path(entry.path), folder=folder)
            elif folder:
                if above:
                    self._prune(inside)
                if _opaque(entry.path) is None and not os.listdir(entry.path):
                    self._remove(Path(entry.path), folder=True)
            else:
                self.inodes.add(entry.inode())
                if entry.stat(follow_symlinks=False).st_nlink == 1:
                    self.moved.append(Path(entry.path))

    def _register(self, path: Path) -> None:
        """Goes on with step 3 where a run that was killed left it, or an object was removed."""
        name, status = _name(path), os.lstat(path)
        for target, there in self._objects(name):
            if there is None:
                os.link(path, target)
                return
            if _same(path, target):
                self._link(target, path)
                self.inodes.add(there.st_ino)
                self.freed += status.st_blocks * _SECTOR
                return

    def _objects(self, name: str) -> Iterator[tuple[Path, os.stat_result | None]]:
        """The objects of that name that this VPS has no link to, then where a new one would be."""
        for number in itertools.count():
            target = self.store / f"{name}-{number}"
            there = _lstat(target)
            if there is None or there.st_ino not in self.inodes:
                yield target, there
            if there is None:
                return

    def _remove(self, path: Path, *, folder: bool) -> None:
        if not folder:
            self._unlink(path)
            return
        for entry in os.scandir(path):
            self._remove(Path(entry.path), folder=entry.is_dir(follow_symlinks=False))
        self.freed += os.lstat(path).st_blocks * _SECTOR
        os.rmdir(path)

    def _unlink(self, path: Path) -> None:
        status = os.lstat(path)
        os.unlink(path)
        if status.st_nlink == 1:
            self.freed += status.st_blocks * _SECTOR

    def candidates(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of the upper directory that may be in the layer instead, relative."""
        for path, status in walk(self.tree.upper):
            if status.st_nlink == 1 and status.st_size and _plain(path):
                yield path.relative_to(self.tree.upper), status

    def add(self, path: Path, status: os.stat_result, name: str) -> None:
        """Step 2, and 3 or the first half of 4, for the file `path` (relative)."""
        upper, shared = self.tree.upper / path, self.tree.shared / path
        # An immutable file is neither moved nor linked, not even by root.
        with suppress(PermissionError):
            if not self._directory(path.parent) or shared.is_dir():
                return
            for target, there in self._objects(name):
                if there is None:
                    os.rename(upper, shared)
                    self.inodes.add(status.st_ino)
                    os.link(shared, target)
                    return
                if there.st_nlink < _MOST_LINKS and _same(upper, target):
                    self._link(target, shared)
                    self.inodes.add(there.st_ino)
                    self.doubles.append(upper)
                    return

    def _link(self, target: Path, shared: Path) -> None:
        # Into the store first, to replace what is there in one step.
        fresh = self.store / self.FRESH
        os.link(target, fresh)
        os.rename(fresh, shared)

    def _directory(self, path: Path) -> bool:
        """Makes the directory `path` (relative) of the layer; False if it cannot be there."""
        if path not in self.usable:
            self.usable[path] = (path == Path() or self._directory(path.parent)) and self._make(
                path
            )
        return self.usable[path]

    def _make(self, path: Path) -> bool:
        upper, shared = self.tree.upper / path, self.tree.shared / path
        status = os.lstat(upper)
        if any(name.startswith(OVERLAY) and not name.startswith(_HARMLESS + _OPAQUE)
               for name in os.listxattr(upper)):  # fmt: skip
            return False  # a directory that was renamed, or a layer inside a layer
        opaque = _opaque(upper)
        if opaque is not None and os.getxattr(upper, opaque) != b"y":
            return False
        self.times[upper] = (status.st_atime_ns, status.st_mtime_ns)
        if not shared.is_dir():
            os.mkdir(shared, 0o755)
            self.freed -= os.lstat(shared).st_blocks * _SECTOR
        if opaque is not None:
            os.setxattr(shared, opaque, b"y")
            os.removexattr(upper, opaque)
        return True

    def finish(self) -> None:
        """The second half of step 4; all before it is on the disk."""
        for path in self.doubles:
            self._unlink(path)
        self.unified = len(self.doubles)
        for path, times in self.times.items():
            os.utime(path, ns=times)


def _kind(status: os.stat_result) -> Kind:
    owner = status.st_uid, status.st_gid
    return (status.st_size, status.st_mode, *owner, status.st_mtime_ns)


def _attributes(path: Path) -> list[tuple[str, bytes]]:
    names = sorted(name for name in os.listxattr(path) if not name.startswith(OVERLAY))
    return [(name, os.getxattr(path, name)) for name in names]


def _name(path: Path) -> str:
    """What files have in common that can be one."""
    return digest(path, heading=repr((_kind(os.lstat(path)), _attributes(path))).encode())


def _same(one: Path, other: Path) -> bool:
    """Whether two files are identical, whatever their digests: an object may have been damaged."""
    if _kind(os.lstat(one)) != _kind(os.lstat(other)) or _attributes(one) != _attributes(other):
        return False
    with opened(one) as first, opened(other) as second:
        while True:
            chunk = os.read(first, _COMPARED)
            if chunk != os.read(second, _COMPARED):
                return False
            if not chunk:
                return True


def _plain(path: Path) -> bool:
    """Whether overlayfs has no mark on the file `path` that means something."""
    marks = (name for name in os.listxattr(path) if name.startswith(OVERLAY))
    return all(name in _HARMLESS for name in marks)


def _opaque(path: os.PathLike[str] | str) -> str | None:
    """The name of the attribute that makes a directory hide those below it, if it has one."""
    try:
        return next((name for name in os.listxattr(path) if name in _OPAQUE), None)
    except FileNotFoundError:
        return None


def _sync(store: Path) -> None:
    """Puts all of the file system on the disk: a link that is not yet there would be gone with the
    power, and a file that was removed because of it, too."""
    descriptor = os.open(store, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ctypes.CDLL(None).syncfs(descriptor)
    finally:
        os.close(descriptor)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
