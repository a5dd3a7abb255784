"""`unify` for file systems whose files share extents (btrfs, XFS), by ioctl_fideduperange(2).

The kernel locks both files, compares them, and makes the second one consist of the first one's
extents. Each stays a file of its own with all that belongs to it, and is copied on write by the
file system; so VPSs that run take part, and files need not be alike in anything but contents.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import defaultdict
from pathlib import Path

from polyvisor.vps.unify import UnifyReport, digest, opened, walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyvisor.vps.unify import Tree

_FIDEDUPERANGE = 0xC0189436  # linux/fs.h
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_FLAG_SYNC = 1
_SAME = 0  # FILE_DEDUPE_RANGE_SAME
#: File systems cut requests off at this.
_LONGEST = 16 << 20
#: Smaller files are in the metadata of btrfs, where nothing can be shared.
_SMALLEST = 4096
_EXTENTS = 16  # that are looked at


def unify(trees: Sequence[Tree]) -> UnifyReport:
    """`polyvisor.vps.unify.unify` with the method "extents"."""
    sizes: dict[int, dict[int, Path]] = defaultdict(dict)  # by size, then by inode
    for tree in trees:
        for path, status in walk(tree.upper):
            if status.st_size >= _SMALLEST:
                sizes[status.st_size].setdefault(status.st_ino, path)
    unified = saved = 0
    for alike in sizes.values():
        if len(alike) < 2:
            continue
        first: dict[str, Path] = {}
        for path in alike.values():
            try:
                source = first.setdefault(digest(path), path)
                freed = 0 if source is path else _share(source, path)
            except OSError:  # it vanished, or is immutable, or is not what it was
                continue
            unified += freed > 0
            saved += freed
    return UnifyReport(
        method="extents",
        files=sum(map(len, sizes.values())),
        unified=unified,
        saved_bytes=saved,
        skipped=(),
    )


def _share(source: Path, target: Path) -> int:
    """Makes `target` consist of `source`'s extents; how many bytes of its own it had."""
    with opened(source) as first, opened(target) as second:
        size = os.fstat(second).st_size
        before = _extents(second)
        if before == _extents(first):
            return 0
        offset = freed = 0
        while offset < size:
            length = min(_LONGEST, size - offset)
            request = bytearray(
                struct.pack("=QQHHIqQQiI", offset, length, 1, 0, 0, second, offset, 0, 0, 0)
            )
            fcntl.ioctl(first, _FIDEDUPERANGE, request)
            done, status = struct.unpack_from("=Qi", request, 40)
            if status != _SAME or not done:
                break
            offset += done
            freed += done
        return freed


def _extents(descriptor: int) -> bytes:
    """Where the beginning of a file is on the disk: the same for files that share it."""
    request = bytearray(32 + 56 * _EXTENTS)
    struct.pack_into("=QQIIII", request, 0, 0, 2**64 - 1, _FIEMAP_FLAG_SYNC, 0, _EXTENTS, 0)
    fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, request)
    (count,) = struct.unpack_from("=I", request, 20)
    places = [struct.unpack_from("=QQQ", request, 32 + 56 * index) for index in range(count)]
    return repr(places).encode()
