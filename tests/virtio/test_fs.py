"""Shared folders: what each operation does, with requests as the guest's kernel would send them."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from fuse_client import Entry, FuseClient, entry

from polyvisor.errors import ConfigError, HostError
from polyvisor.virtio import fuse
from polyvisor.virtio.fs import Fs, parse
from polyvisor.virtio.fuse import Op

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["inline", "threads"])
def client(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FuseClient]:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_bytes(b"deeper")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    with FuseClient(tmp_path, inline=request.param == "inline") as client:
        yield client


def name(text: str) -> bytes:
    return os.fsencode(text) + b"\0"


def test_what_is_there(client: FuseClient) -> None:
    assert client.names() == {"file", "folder", "link", "fifo"}
    file = client.lookup("file")
    assert stat.S_ISREG(file.mode)
    assert (file.size, file.uid) == (7, 0)
    assert stat.S_ISLNK(client.lookup("link").mode)
    assert client.call(Op.READLINK, client.lookup("link").node) == b"/etc/passwd"
    assert client.walk("folder/inner").size == 6
    assert client.error(Op.LOOKUP, 1, name("nothing")) == "ENOENT"
    assert client.lookup("file").node == file.node
    assert client.error(Op.READLINK, file.node) == "EINVAL"
    assert client.error(Op.LOOKUP, file.node, name("x")) == "ENOTDIR"


def test_readdirplus_looks_up(client: FuseClient, tmp_path: Path) -> None:
    for n in range(60):
        (tmp_path / "folder" / f"entry-{n:04}").write_bytes(b"x" * n)
    folder = client.lookup("folder").node
    handle = client.opendir(folder)
    sizes: dict[str, int] = {}
    offset = 0
    while data := client.call(Op.READDIRPLUS, folder, fuse.READ_IN.pack(handle, offset, 2000, 0)):
        at = 0
        while at < len(data):
            found = entry(data[at:])
            at += fuse.ENTRY_SIZE
            _, offset, length, _ = fuse.DIRENT.unpack_from(data, at)
            text = data[at + 24 : at + 24 + length].decode()
            at += 24 + (length + 7 & ~7)
            assert (found.node == 0) == (text in (".", ".."))
            sizes[text] = found.size
            if found.node:
                assert client.fs.tree.nodes[found.node].lookups == 1
    assert sizes["entry-0033"] == 33
    assert len(sizes) == 63


def test_many_folders_are_read_at_a_time(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"folder{n}").mkdir()
        (tmp_path / f"folder{n}" / f"file{n}").touch()
    with FuseClient(tmp_path) as client:
        folders = [client.lookup(f"folder{n}").node for n in range(100)]
        handles = [client.opendir(node) for node in folders]
        for offset in range(3):
            for n, (node, handle) in enumerate(zip(folders, handles, strict=True)):
                data = client.call(Op.READDIR, node, fuse.READ_IN.pack(handle, offset, 40, 0))
                if offset == 2:
                    assert data[24:].startswith(b"file%d\0" % n)
        kept = [h for h in client.fs.tree.handles.values() if h.entries is not None]
        assert len(kept) <= 65


def test_data(client: FuseClient, tmp_path: Path) -> None:
    node, handle = client.create("new", mode=0o751)
    assert (tmp_path / "new").stat().st_mode == 0o100751
    assert node.mode == 0o100751
    data = os.urandom(200_000)
    assert client.write(handle, data) == len(data)
    assert client.write(handle, b"tail", 300_000) == 4
    expected = data + bytes(100_000) + b"tail"
    assert (tmp_path / "new").read_bytes() == expected
    for offset, size in ((0, 10), (199_990, 20), (299_999, 100), (400_000, 5), (7, 300_000)):
        assert client.read(handle, offset, size) == expected[offset : offset + size]
    data_in = fuse.LSEEK_IN.pack(handle, 0, os.SEEK_HOLE, 0)
    assert fuse.LSEEK_OUT.unpack(client.call(Op.LSEEK, node.node, data_in))[0] >= 200_000
    client.call(Op.FSYNC, node.node, fuse.FSYNC_IN.pack(handle, 1, 0))
    client.call(Op.FALLOCATE, node.node, fuse.FALLOCATE_IN.pack(handle, 0, 4096, 3, 0))
    assert (tmp_path / "new").read_bytes()[:4097] == bytes(4096) + data[4096:4097]
    other, target = client.create("copy")
    copy = fuse.COPY_IN.pack(handle, 8192, other.node, target, 100, 5000, 0)
    assert fuse.WRITE_OUT.unpack(client.call(Op.COPY_FILE_RANGE, node.node, copy))[0] == 5000
    assert (tmp_path / "copy").read_bytes() == bytes(100) + data[8192:13192]
    client.call(Op.RELEASE, node.node, fuse.RELEASE_IN.pack(handle) + bytes(16))
    assert client.error(Op.READ, 1, fuse.READ_IN.pack(handle, 0, 10, 0) + bytes(16)) == "EBADF"
    again = client.open(node.node, os.O_WRONLY | os.O_TRUNC)
    assert (tmp_path / "new").read_bytes() == b""
    assert client.error(Op.READ, 1, fuse.READ_IN.pack(again, 0, 10, 0) + bytes(16)) == "EBADF"


@pytest.mark.parametrize("how", ["restart", "reset_queue", "pause"])
def test_a_reset_waits_for_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing is written to the guest's memory any more when it returns."""
    (tmp_path / "file").write_bytes(b"content")
    reading, read = threading.Event(), threading.Event()
    preadv = os.preadv

    def slowly(fd: int, views: list[memoryview], offset: int) -> int:
        reading.set()
        time.sleep(0.1)
        read.set()
        return preadv(fd, views, offset)

    with FuseClient(tmp_path, inline=False) as client:
        handle = client.open(client.lookup("file").node)
        monkeypatch.setattr(os, "preadv", slowly)
        data = fuse.READ_IN.pack(handle, 0, 100, 0) + bytes(16)
        header = fuse.IN_HEADER.pack(40 + len(data), Op.READ, 9, 1, 0, 0, 1, 0)
        client.guest.offer(1, header + data, 116)
        client.guest.kick(1)
        assert reading.wait(10)
        if how == "reset_queue":
            client.guest.reset_queue(1)
        else:
            getattr(client.guest, how)()
        assert read.is_set()
        assert client.fs._under_way == 0
        if how == "pause":
            client.guest.resume()
            used = client.guest.wait(1)
            assert used is not None
            assert used[1].endswith(b"content")


def test_append(client: FuseClient, tmp_path: Path) -> None:
    handle = client.open(client.lookup("file").node, os.O_WRONLY | os.O_APPEND)
    client.write(handle, b" more", 0)
    assert (tmp_path / "file").read_bytes() == b"content more"


def setattr_in(valid: int, **fields: int) -> bytes:
    order = ("handle", "size", "owner", "atime", "mtime", "ctime", "atime_ns", "mtime_ns",
             "ctime_ns", "mode", "_", "uid", "gid", "__")  # fmt: skip
    return fuse.SETATTR_IN.pack(valid, 0, *(fields.get(field, 0) for field in order))


def test_attributes(client: FuseClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = client.lookup("file").node
    client.call(Op.SETATTR, file, setattr_in(fuse.SET_SIZE, size=3))
    assert path.read_bytes() == b"con"
    client.call(Op.SETATTR, file, setattr_in(fuse.SET_MODE, mode=0o106755))
    assert stat.S_IMODE(path.stat().st_mode) == 0o755, "no set-user-ID"
    before = path.stat()
    valid = fuse.SET_UID | fuse.SET_GID | fuse.SET_MTIME
    client.call(Op.SETATTR, file, setattr_in(valid, uid=7, gid=8, mtime=12345, mtime_ns=678))
    after = path.stat()
    assert after.st_mtime_ns == 12345_000000678
    assert (after.st_uid, after.st_atime_ns) == (before.st_uid, before.st_atime_ns)
    old = (1 << 64) - 100  # 1969
    client.call(Op.SETATTR, file, setattr_in(fuse.SET_ATIME, atime=old))
    assert path.stat().st_atime_ns == -100 * 10**9
    client.call(Op.SETATTR, file, setattr_in(fuse.SET_ATIME | fuse.SET_ATIME_NOW, atime=5))
    assert path.stat().st_atime_ns > before.st_mtime_ns - 10**9
    link = client.lookup("link").node
    assert client.error(Op.SETATTR, link, setattr_in(fuse.SET_MODE, mode=0)) == "ENOTSUP"
    assert client.error(Op.SETATTR, link, setattr_in(fuse.SET_SIZE)) == "ELOOP"
    passwd = os.stat("/etc/passwd")
    client.call(Op.SETATTR, link, setattr_in(fuse.SET_MTIME, mtime=1))
    assert os.stat("/etc/passwd") == passwd
    assert os.lstat(tmp_path / "link").st_mtime == 1


def test_names(client: FuseClient, tmp_path: Path) -> None:
    made = entry(client.call(Op.MKDIR, 1, fuse.MKDIR_IN.pack(0o750, 0) + name("made")))
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o750
    client.call(Op.SYMLINK, made.node, name("pointer") + name("../../etc"))
    assert os.readlink(tmp_path / "made" / "pointer") == "../../etc"
    fifo = fuse.MKNOD_IN.pack(stat.S_IFIFO | 0o622, 0, 0, 0)
    client.call(Op.MKNOD, made.node, fifo + name("pipe"))
    assert (tmp_path / "made" / "pipe").is_fifo()
    device = fuse.MKNOD_IN.pack(stat.S_IFCHR | 0o666, 0x103, 0, 0)
    assert client.error(Op.MKNOD, made.node, device + name("null")) == "EPERM"
    file = client.lookup("file").node
    client.call(Op.LINK, made.node, fuse.LINK_IN.pack(file) + name("hard"))
    assert client.lookup("hard", made.node).node == file
    assert (tmp_path / "file").stat().st_nlink == 2
    client.call(Op.LINK, 1, fuse.LINK_IN.pack(client.lookup("link").node) + name("link2"))
    assert os.readlink(tmp_path / "link2") == "/etc/passwd"
    move = fuse.RENAME_IN.pack(made.node)
    client.call(Op.RENAME, 1, move + name("file") + name("moved"))
    assert (tmp_path / "made" / "moved").read_bytes() == b"content"
    keep = fuse.RENAME2_IN.pack(1, 1, 0)
    assert client.error(Op.RENAME2, 1, keep + name("link") + name("link2")) == "EEXIST"
    swap = fuse.RENAME2_IN.pack(1, 2, 0)
    client.call(Op.RENAME2, 1, swap + name("link") + name("made"))
    assert os.readlink(tmp_path / "made") == "/etc/passwd"
    assert client.lookup("moved", made.node).node == file
    assert client.error(Op.RMDIR, 1, name("link")) == "ENOTEMPTY"
    assert client.error(Op.UNLINK, 1, name("link")) == "EISDIR"
    client.call(Op.UNLINK, made.node, name("moved"))
    client.call(Op.UNLINK, made.node, name("hard"))
    assert client.call(Op.GETATTR, file, fuse.GETATTR_IN.pack(0, 0, 0)), "unlinked, not forgotten"
    assert client.error(Op.STATFS, 1) == ""


def test_extended_attributes(client: FuseClient, tmp_path: Path) -> None:
    file = client.lookup("file").node
    with contextlib.suppress(OSError):
        os.setxattr(tmp_path / "file", "trusted.secret", b"!")
    client.call(Op.SETXATTR, file, fuse.SETXATTR_IN.pack(5, 0) + name("user.one") + b"first")
    assert os.getxattr(tmp_path / "file", "user.one") == b"first"
    get = fuse.GETXATTR_IN.pack(100, 0)
    assert client.call(Op.GETXATTR, file, get + name("user.one")) == b"first"
    size = client.call(Op.GETXATTR, file, fuse.GETXATTR_IN.pack(0, 0) + name("user.one"))
    assert fuse.GETXATTR_OUT.unpack(size)[0] == 5
    small = fuse.GETXATTR_IN.pack(2, 0)
    assert client.error(Op.GETXATTR, file, small + name("user.one")) == "ERANGE"
    assert client.error(Op.GETXATTR, file, get + name("user.two")) == "ENODATA"
    assert client.error(Op.GETXATTR, file, get + name("trusted.secret")) == "ENOTSUP"
    assert client.call(Op.LISTXATTR, file, get) == b"user.one\0"
    client.call(Op.REMOVEXATTR, file, name("user.one"))
    assert client.call(Op.LISTXATTR, file, get) == b""
    long = fuse.SETXATTR_IN.pack(50, 0) + name("user.x") + b"short"
    assert client.error(Op.SETXATTR, file, long) == "EINVAL"


def test_forgetting(client: FuseClient) -> None:
    tree = client.fs.tree
    for _ in range(5):
        file = client.lookup("file").node
    inner = client.walk("folder/inner").node

    def forget(op: int, node: int, data: bytes) -> None:
        header = fuse.IN_HEADER.pack(40 + len(data), op, 9, node, 0, 0, 1, 0)
        assert client.guest.request(0, header + data) == b""

    forget(Op.FORGET, file, fuse.FORGET.pack(4))
    assert file in tree.nodes
    pairs = fuse.FORGET_ONE.pack(file, 1) + fuse.FORGET_ONE.pack(inner, 1)
    forget(Op.BATCH_FORGET, 0, fuse.BATCH_FORGET.pack(2, 0) + pairs)
    assert file not in tree.nodes
    assert inner not in tree.nodes
    forget(Op.FORGET, 1, fuse.FORGET.pack(1 << 40))
    assert client.error(Op.GETATTR, file, fuse.GETATTR_IN.pack(0, 0, 0)) == "ESTALE"
    assert client.lookup("file").node not in (file, inner)


def test_more_nodes_than_descriptors(tmp_path: Path) -> None:
    """Descriptors are closed and found again by name; what was replaced meanwhile is stale."""
    for n in range(100):
        (tmp_path / f"folder{n}").mkdir()
        (tmp_path / f"folder{n}" / "file").write_bytes(b"%d" % n)
    with FuseClient(tmp_path) as client:
        client.fs.tree.most = 20
        before = len(os.listdir("/proc/self/fd"))
        nodes = [client.walk(f"folder{n}/file").node for n in range(100)]
        assert len(os.listdir("/proc/self/fd")) <= before + 20
        for n, node in enumerate(nodes):
            handle = client.open(node)
            assert client.read(handle) == b"%d" % n
            client.call(Op.RELEASE, node, fuse.RELEASE_IN.pack(handle) + bytes(16))
        (tmp_path / "folder3" / "file").unlink()
        (tmp_path / "folder3" / "other").write_bytes(b"other")
        (tmp_path / "folder3" / "file").symlink_to("/etc/passwd")
        (tmp_path / "folder4").rename(tmp_path / "moved")
        (tmp_path / "folder4").symlink_to("/")
        for n in (3, 4):
            assert client.error(Op.OPEN, nodes[n], fuse.OPEN_IN.pack(0, 0)) in ("ESTALE", "ENOTDIR")
        deep = 1
        for _ in range(1100):  # as deep as no call stack is
            deep = entry(client.call(Op.MKDIR, deep, fuse.MKDIR_IN.pack(0o755, 0) + name("d"))).node
        for node in list(client.fs.tree._open):
            os.close(node.fd)
            node.fd = -1
        client.fs.tree._open.clear()
        assert client.call(Op.GETATTR, deep, fuse.GETATTR_IN.pack(0, 0, 0))
        handles = []
        while not client.error(Op.OPEN, nodes[0], fuse.OPEN_IN.pack(0, 0)):
            handles.append(1)
        assert client.error(Op.OPEN, nodes[0], fuse.OPEN_IN.pack(0, 0)) == "EMFILE"
        assert len(handles) == 20
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for pytest to clean up


def test_negotiation(client: FuseClient) -> None:
    major, minor, readahead, flags, *_ = fuse.INIT_OUT.unpack(client.init)
    assert (major, minor, readahead) == (7, 31, 1 << 17)
    assert flags & fuse.MAX_PAGES
    assert client.error(Op.INIT, 0, fuse.INIT_IN.pack(7, 8, 0, 0)) == "EPROTO"
    assert client.error(36000, 1) == "ENOSYS"
    assert client.guest.read_config(0, 40) == b"tag".ljust(36, b"\0") + b"\1\0\0\0"


@pytest.mark.parametrize("packed", [False, True])
def test_snapshots_have_the_open_files(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"content")
    with FuseClient(tmp_path, packed=packed) as client:
        node: Entry = client.walk("folder/file")
        handle = client.open(node.node, os.O_RDWR)
        client.write(handle, b"C")
        client.guest.pause()
        state = client.guest.save()
        client.guest.restore(state)
        client.guest.resume()
        assert client.read(handle) == b"Content"
        assert client.walk("folder/file").node == node.node


def test_read_only_means_read_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    before = tmp_path.stat(), (tmp_path / "file").stat()
    with FuseClient(tmp_path, read_only=True) as client:
        file = client.lookup("file").node
        handle = client.open(file)
        assert client.read(handle) == b"content"
        write = fuse.WRITE_IN.pack(handle, 0, 1, 0) + bytes(16)
        attempts: list[tuple[int, int, bytes]] = [
            (Op.OPEN, file, fuse.OPEN_IN.pack(os.O_WRONLY, 0)),
            (Op.OPEN, file, fuse.OPEN_IN.pack(os.O_RDWR, 0)),
            (Op.OPEN, file, fuse.OPEN_IN.pack(os.O_TRUNC, 0)),
            (Op.CREATE, 1, fuse.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + name("new")),
            (Op.WRITE, file, write + b"x"),
            (Op.SETATTR, file, setattr_in(fuse.SET_SIZE)),
            (Op.SETATTR, file, setattr_in(fuse.SET_MODE)),
            (Op.SETATTR, file, setattr_in(0)),
            (Op.MKDIR, 1, fuse.MKDIR_IN.pack(0o755, 0) + name("new")),
            (Op.MKNOD, 1, fuse.MKNOD_IN.pack(0o100644, 0, 0, 0) + name("new")),
            (Op.SYMLINK, 1, name("new") + name("target")),
            (Op.LINK, 1, fuse.LINK_IN.pack(file) + name("new")),
            (Op.UNLINK, 1, name("file")),
            (Op.RMDIR, 1, name("folder")),
            (Op.RENAME, 1, fuse.RENAME_IN.pack(1) + name("file") + name("new")),
            (Op.RENAME2, 1, fuse.RENAME2_IN.pack(1, 2, 0) + name("file") + name("folder")),
            (Op.SETXATTR, file, fuse.SETXATTR_IN.pack(1, 0) + name("user.x") + b"x"),
            (Op.REMOVEXATTR, file, name("user.x")),
            (Op.FALLOCATE, file, fuse.FALLOCATE_IN.pack(handle, 0, 100, 0, 0)),
            (Op.COPY_FILE_RANGE, file, fuse.COPY_IN.pack(handle, 0, file, handle, 9, 1, 0)),
            (Op.ACCESS, file, fuse.ACCESS_IN.pack(os.W_OK, 0)),
        ]
        for op, node, data in attempts:
            assert client.error(op, node, data) == "EROFS", Op(op)
        assert client.error(Op.ACCESS, file, fuse.ACCESS_IN.pack(os.R_OK, 0)) == ""
    after = tmp_path.stat(), (tmp_path / "file").stat()
    assert [(s.st_mtime_ns, s.st_ctime_ns, s.st_mode) for s in before] == [
        (s.st_mtime_ns, s.st_ctime_ns, s.st_mode) for s in after
    ]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("./src:/mnt/src", ("./src", "/mnt/src", True)),
        ("./src:/mnt/src:ro", ("./src", "/mnt/src", True)),
        ("/a:b:/mnt:rw", ("/a:b", "/mnt", False)),
    ],
)
def test_shares_on_the_command_line(text: str, expected: tuple[str, str, bool]) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", "src", "src:", ":/mnt", "src:mnt", "src:rw", "/src:ro:rx"])
def test_shares_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:GUEST"):
        parse(text)


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        Fs(tmp_path / "nothing", "tag")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError, match="Not a directory"):
        Fs(tmp_path / "file", "tag")
    for tag in ("", "x" * 37, "a\0b"):
        with pytest.raises(ConfigError, match="1 to 36 bytes"):
            Fs(tmp_path, tag)
