"""FUSE requests, well-formed or not, to a shared folder: what the guest's kernel would send."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from polyvisor.virtio import fuse
from polyvisor.virtio.fs import Fs
from polyvisor.virtio.fuse import Op
from polyvisor.virtio.testing import FakeGuest

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

REQUESTS = 1  # the queue


class Entry(NamedTuple):
    node: int
    mode: int
    size: int
    uid: int
    inode: int


def entry(answer: bytes) -> Entry:
    node = struct.unpack_from("<Q", answer)[0]
    fields = fuse.ATTR.unpack_from(answer, fuse.ENTRY_OUT.size)
    return Entry(node, fields[9], fields[1], fields[11], fields[0])


class FuseClient:
    """A mounted share without a kernel. Calls give the answer, or raise OSError as a program would
    see it."""

    def __init__(
        self,
        path: Path | str,
        *,
        read_only: bool = False,
        inline: bool = True,
        packed: bool = False,
        mount: bool = True,
    ) -> None:
        self.fs = Fs(path, "tag", read_only=read_only, inline=inline)
        self.guest = FakeGuest(self.fs, memory="8M", packed=packed)
        self.unique = 1
        if mount:
            self.init = self.call(Op.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0xFFFFFFFF))

    def call(self, op: int, node: int, data: bytes = b"", *more: bytes, room: int = 65536) -> bytes:
        self.unique += 1
        length = fuse.IN_HEADER.size + len(data) + sum(map(len, more))
        header = fuse.IN_HEADER.pack(length, op, self.unique, node, 0, 0, 1, 0)
        answer = self.guest.request(REQUESTS, [header, data, *more], fuse.OUT_HEADER.size + room)
        length, status, unique = fuse.OUT_HEADER.unpack_from(answer)
        assert unique == self.unique
        assert length == len(answer)
        if status:
            assert -4096 < status < 0
            raise OSError(-status, os.strerror(-status))
        return answer[fuse.OUT_HEADER.size :]

    def error(self, op: int, node: int, data: bytes = b"", *more: bytes) -> str:
        """The name of the error of a call; "" when there is none."""
        try:
            self.call(op, node, data, *more)
        except OSError as caught:
            return errno.errorcode[caught.errno or 0]
        return ""

    def lookup(self, name: str | bytes, folder: int = fuse.ROOT) -> Entry:
        return entry(self.call(Op.LOOKUP, folder, os.fsencode(name) + b"\0"))

    def walk(self, path: str) -> Entry:
        at = Entry(fuse.ROOT, 0, 0, 0, 0)
        for name in path.split("/"):
            at = self.lookup(name, at.node)
        return at

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        answer = self.call(Op.OPEN, node, fuse.OPEN_IN.pack(flags, 0))
        return int(fuse.OPEN_OUT.unpack(answer)[0])

    def opendir(self, node: int = fuse.ROOT) -> int:
        answer = self.call(Op.OPENDIR, node, fuse.OPEN_IN.pack(0, 0))
        return int(fuse.OPEN_OUT.unpack(answer)[0])

    def create(self, name: str, folder: int = fuse.ROOT, mode: int = 0o644) -> tuple[Entry, int]:
        arguments = fuse.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o100000 | mode, 0, 0)
        answer = self.call(Op.CREATE, folder, arguments + os.fsencode(name) + b"\0")
        return entry(answer), fuse.OPEN_OUT.unpack_from(answer, fuse.ENTRY_SIZE)[0]

    def read(self, handle: int, offset: int = 0, size: int = 65536) -> bytes:
        data = fuse.READ_IN.pack(handle, offset, size, 0) + bytes(16)
        return self.call(Op.READ, 1, data, room=max(size, 1))

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        head = fuse.WRITE_IN.pack(handle, offset, len(data), 0) + bytes(16)
        return int(fuse.WRITE_OUT.unpack(self.call(Op.WRITE, 1, head, data))[0])

    def names(self, node: int = fuse.ROOT) -> set[str]:
        handle = self.opendir(node)
        found: set[str] = set()
        offset = 0
        while data := self.call(Op.READDIR, node, fuse.READ_IN.pack(handle, offset, 512, 0)):
            at = 0
            while at < len(data):
                _, offset, length, _ = fuse.DIRENT.unpack_from(data, at)
                found.add(os.fsdecode(data[at + 24 : at + 24 + length]))
                at += 24 + (length + 7 & ~7)
        self.call(Op.RELEASEDIR, node, fuse.RELEASE_IN.pack(handle) + bytes(16))
        return found - {".", ".."}

    def __enter__(self) -> FuseClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.guest.close()
