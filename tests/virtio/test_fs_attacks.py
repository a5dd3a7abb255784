"""Guests that try to get out of a shared folder, or to break who serves it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import stat
import threading
from typing import TYPE_CHECKING

import pytest
from fuse_client import FuseClient, entry

from polyvisor.virtio import fuse
from polyvisor.virtio.fuse import Op

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = b"not for the guest"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the share, which looks the same at the end."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET)
    (folder / "inner").mkdir()
    before = picture(folder)
    yield folder
    assert picture(folder) == before


def picture(folder: Path) -> list[tuple[object, ...]]:
    """All that can be seen of a folder, but when it was read."""
    result: list[tuple[object, ...]] = []
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files, "."):
            path = os.path.join(at, name)
            info = os.lstat(path)
            content = b""
            if stat.S_ISREG(info.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            kept = (info.st_mode, info.st_nlink, info.st_mtime_ns, info.st_ctime_ns)
            result.append((path, content, *kept))
    return sorted(result)


@pytest.fixture
def share(tmp_path: Path, outside: Path) -> Path:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(b"content")
    (share / "folder").mkdir()
    (share / "folder" / "secret").write_bytes(b"harmless")
    (share / "absolute").symlink_to(outside)
    (share / "relative").symlink_to("../outside")
    (share / "to-secret").symlink_to("../outside/secret")
    (share / "proc").symlink_to("/proc/self/root")
    return share


BAD_NAMES = [b"", b".", b"..", b"../outside", b"folder/secret", b"/etc", b"a/", b"/", b"x" * 256]


def name_requests(client: FuseClient, name: bytes) -> Iterator[tuple[int, bytes]]:
    """Every request that takes a name."""
    text = name + b"\0"
    good = b"good\0"
    file = client.lookup("file").node
    yield Op.LOOKUP, text
    yield Op.MKDIR, fuse.MKDIR_IN.pack(0o755, 0) + text
    yield Op.MKNOD, fuse.MKNOD_IN.pack(0o100644, 0, 0, 0) + text
    yield Op.SYMLINK, text + b"target\0"
    yield Op.CREATE, fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + text
    yield Op.LINK, fuse.LINK_IN.pack(file) + text
    yield Op.UNLINK, text
    yield Op.RMDIR, text
    yield Op.RENAME, fuse.RENAME_IN.pack(1) + text + good
    yield Op.RENAME, fuse.RENAME_IN.pack(1) + b"file\0" + text
    yield Op.RENAME2, fuse.RENAME2_IN.pack(1, 2, 0) + b"file\0" + text


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere(share: Path, outside: Path, name: bytes) -> None:
    with FuseClient(share) as client:
        before = picture(share)
        for op, data in name_requests(client, name):
            assert client.error(op, 1, data) in ("EINVAL", "ENAMETOOLONG"), Op(op)
            assert client.error(op, 1, data.rstrip(b"\0")), "not terminated"
        assert picture(share) == before


def test_symbolic_links_are_not_followed(share: Path, outside: Path) -> None:
    with FuseClient(share) as client:
        for name in ("absolute", "relative", "to-secret", "proc"):
            link = client.lookup(name)
            assert stat.S_ISLNK(link.mode)
            for op, data in name_requests(client, b"secret"):
                if op not in (Op.RENAME, Op.RENAME2):
                    assert client.error(op, link.node, data) == "ENOTDIR", Op(op)
            move = fuse.RENAME_IN.pack(link.node) + b"file\0new\0"
            assert client.error(Op.RENAME, 1, move) == "ENOTDIR"
            assert client.error(Op.OPEN, link.node, fuse.OPEN_IN.pack(0, 0)) == "ELOOP"
            assert client.error(Op.OPENDIR, link.node, fuse.OPEN_IN.pack(0, 0)) == "ENOTDIR"
            get = fuse.GETXATTR_IN.pack(100, 0) + b"user.x\0"
            assert client.error(Op.GETXATTR, link.node, get) == "ENOTSUP"
            create = fuse.CREATE_IN.pack(os.O_RDWR | os.O_TRUNC, 0o644, 0, 0)
            assert client.error(Op.CREATE, 1, create + os.fsencode(name) + b"\0") == "ELOOP"
        # A hard link to a link is that link, not its target.
        client.call(Op.LINK, 1, fuse.LINK_IN.pack(client.lookup("to-secret").node) + b"again\0")
        assert os.readlink(share / "again") == "../outside/secret"


def test_special_files_are_never_opened(share: Path, outside: Path) -> None:
    os.mkfifo(share / "fifo")
    specials = ["fifo"]
    with contextlib.suppress(PermissionError):
        os.mknod(share / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        specials.append("zero")
    with FuseClient(share) as client:  # (an open of a FIFO would never return)
        for name in specials:
            node = client.lookup(name).node
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
                assert client.error(Op.OPEN, node, fuse.OPEN_IN.pack(flags, 0)) == "EACCES"
            size = fuse.SETATTR_IN.pack(fuse.SET_SIZE, 0, *[0] * 14)
            assert client.error(Op.SETATTR, node, size) == "EACCES"
            create = fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + name.encode() + b"\0"
            assert client.error(Op.CREATE, 1, create) == "EACCES"


@pytest.mark.parametrize("evict", [False, True])
def test_folders_that_change_places(share: Path, outside: Path, evict: bool) -> None:
    """A thread of the host's swaps a folder with a link to the outside, as fast as it can."""
    (share / "swap").symlink_to(outside)
    libc = ctypes.CDLL(None)
    over = threading.Event()

    def swap() -> None:
        folder, link = bytes(share / "folder"), bytes(share / "swap")
        while not over.is_set():
            libc.renameat2(-100, folder, -100, link, 2)

    thread = threading.Thread(target=swap)
    thread.start()
    seen: set[bytes | str] = set()
    try:
        with FuseClient(share) as client:
            tree = client.fs.tree
            for n in range(20_000):
                if n >= 700 and b"harmless" in seen:  # the thread has had its turns, too
                    break
                if evict:
                    for node in list(tree._open):
                        os.close(node.fd)
                        node.fd = -1
                    tree._open.clear()
                try:
                    folder = client.lookup("folder").node
                    secret = client.lookup("secret", folder).node
                    if evict and n % 2:
                        tree.fd(tree.nodes[secret])
                    handle = client.open(secret)
                    seen.add(client.read(handle))
                    client.call(Op.RELEASE, secret, fuse.RELEASE_IN.pack(handle) + bytes(16))
                    made, handle = client.create(f"new{n}", folder)
                    client.call(Op.RELEASE, 1, fuse.RELEASE_IN.pack(handle) + bytes(16))
                    client.call(Op.MKDIR, folder, fuse.MKDIR_IN.pack(0o755, 0) + b"d%d\0" % n)
                    client.call(Op.UNLINK, folder, b"new%d\0" % n)
                    assert made.node
                except OSError as error:
                    seen.add(error.strerror)
    finally:
        over.set()
        thread.join()
    assert SECRET not in seen
    assert b"harmless" in seen
    assert "Not a directory" in seen, "the race was never lost"


@pytest.mark.parametrize(("seed", "inline"), [(1, True), (2, True), (3, False)])
def test_requests_that_make_no_sense(share: Path, outside: Path, seed: int, inline: bool) -> None:
    """Random operations on random nodes and handles with random arguments, cut anywhere."""
    rng = random.Random(seed)
    names = [b"file", b"folder", b"absolute", b"..", b"secret", b"a", b"b/c", b"", b"\xff\xfe"]
    wild = [0, 1, 2, 3, 4, 5, 0x80000000, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

    def argument(size: int) -> bytes:
        words = [rng.choice(wild) if rng.random() < 0.5 else rng.randrange(40) for _ in range(size)]
        return b"".join((w & (1 << 64) - 1).to_bytes(8, "little") for w in words)

    descriptors = len(os.listdir("/proc/self/fd"))
    errors: set[str] = set()
    with FuseClient(share, inline=inline) as client:
        for _ in range(15000):
            op = rng.choice([*Op, 0, 7, 99])
            if op in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.SYNCFS):
                continue
            if op in (Op.DESTROY, Op.INIT) and rng.random() < 0.98:
                continue
            data = bytearray(argument(rng.randrange(8)))
            if rng.random() < 0.7:  # the sizes that there are
                data = data[: rng.choice([0, 8, 16, 24, 40, 56, 88])]
                data += rng.choice(names) + b"\0" + rng.choice(names) + b"\0"
            if len(data) > 4 and rng.random() < 0.5:
                data[:4] = rng.choice([0, 1, 2, 0o100644, 0o40755]).to_bytes(4, "little")
            room = rng.choice([0, 8, 100, 5000])
            try:
                client.call(op, rng.choice(wild), bytes(data), room=room)
            except OSError as error:
                errors.add(os.strerror(error.errno or 0))
        assert not client.guest.needs_reset
        assert client.names() >= set()
        # Headers that are cut, and answers without room for one.
        for _ in range(200):
            out = rng.randbytes(rng.randrange(1, 60))
            client.guest.request(rng.randrange(2), out, into=rng.randrange(20))
        assert not client.guest.needs_reset
    del client
    assert {"Invalid argument", "Stale file handle", "Function not implemented"} <= errors
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_a_guest_cannot_release_what_is_being_read(share: Path) -> None:
    """A descriptor that is in use is closed when it is not any more: its number may be that of
    another file by then."""
    with FuseClient(share) as client:
        tree = client.fs.tree
        node = client.lookup("file").node
        number = client.open(node)
        with tree.using(number) as handle:
            client.call(Op.RELEASE, node, fuse.RELEASE_IN.pack(number) + bytes(16))
            assert os.pread(handle.fd, 10, 0) == b"content"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pread(handle.fd, 10, 0)


def test_what_a_guest_makes_is_its_own_size(share: Path) -> None:
    with FuseClient(share) as client:
        node, handle = client.create("huge")
        big = fuse.SETATTR_IN.pack(fuse.SET_SIZE, 0, 0, 1 << 63, *[0] * 12)
        assert client.error(Op.SETATTR, node.node, big) == "EINVAL"
        write = fuse.WRITE_IN.pack(handle, 0, 0xFFFFFFFF, 0) + bytes(16)
        answer = client.call(Op.WRITE, node.node, write, b"abc")
        assert fuse.WRITE_OUT.unpack(answer)[0] == 3, "no more than was sent"
        read = fuse.READ_IN.pack(handle, 0, 0xFFFFFFFF, 0) + bytes(16)
        assert client.call(Op.READ, node.node, read, room=2) == b"ab"
        folder = entry(client.call(Op.MKDIR, 1, fuse.MKDIR_IN.pack(0o2755, 0) + b"inherits\0"))
        assert folder.mode & stat.S_ISGID
