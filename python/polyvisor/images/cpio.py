"""Writing "newc" cpio archives, the format of an initramfs (Linux: driver-api/early-userspace).

Deterministic: no times, no inode numbers of the host, so the same content gives the same bytes.
"""

from __future__ import annotations

import stat

from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: The largest file: sizes are 32-bit.
MAX_FILE = 0xFFFF_FFFF
_HEADER = 110
_END = "TRAILER!!!"


class Archive:
    """An archive in the making. Paths are absolute or relative to the guest's root, alike."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._inode = 0
        self._directories: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Adds a directory, and its parents where they are missing."""
        name = _clean(path)
        if name in self._directories:
            return
        self._parents(name)
        self._directories.add(name)
        self._add(name, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a regular file."""
        if len(data) > MAX_FILE:
            raise ConfigError(
                f"{path!r} has {len(data)} bytes, more than a file of an initramfs can have",
                field="files",
            )
        name = _clean(path)
        self._parents(name)
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Adds a symbolic link at `path` that points to `target`."""
        name = _clean(path)
        self._parents(name)
        self._add(name, stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape"))

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Adds a character device. Needs no privilege: the guest makes the node."""
        name = _clean(path)
        self._parents(name)
        self._add(name, stat.S_IFCHR | mode, rdev=(major, minor))

    def finish(self) -> bytes:
        """The archive. More may be concatenated to it: Linux unpacks one after the other."""
        self._add(_END, 0)
        return b"".join(self._parts)

    def _parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent and parent not in self._directories:
            self.directory(parent)

    def _add(self, name: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> None:
        encoded = name.encode("utf-8", "surrogateescape") + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        self._inode += 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *rdev, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._append(header + encoded)
        self._append(data)

    def _append(self, data: bytes) -> None:
        self._size += len(data)
        padding = -self._size % 4
        self._size += padding
        self._parts += [data, bytes(padding)]


class Entry:
    """One member of an archive that was read: see `read`."""

    __slots__ = ("data", "mode", "name", "rdev")

    def __init__(self, name: str, mode: int, data: bytes, rdev: tuple[int, int]) -> None:
        self.name = name
        self.mode = mode
        self.data = data
        self.rdev = rdev


def read(archive: bytes) -> Iterator[Entry]:
    """The members of uncompressed "newc" archives, also of several that were concatenated."""
    at = 0
    while at < len(archive):
        if archive[at] == 0:  # padding between archives
            at += 1
            continue
        if archive[at : at + 6] not in (b"070701", b"070702") or at + _HEADER > len(archive):
            raise ValueError(f"not a newc cpio archive at byte {at}")
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, rdev, length = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = archive[at + _HEADER : at + _HEADER + length - 1].decode("utf-8", "surrogateescape")
        start = (at + _HEADER + length + 3) // 4 * 4
        if start + size > len(archive):
            raise ValueError(f"cpio member {name!r} is cut off")
        at = (start + size + 3) // 4 * 4
        if name != _END:
            yield Entry(name, mode, archive[start : start + size], rdev)


def _clean(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    # (The format's own end mark cannot be a file's name.)
    if not parts or ".." in parts or "\0" in path or parts == [_END]:
        raise ConfigError(f"{path!r} is no path for a file in the guest", field="files")
    return "/".join(parts)
