"""The initramfs archive: what goes in comes out, as our reader and as the system's cpio sees it."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import ConfigError
from polyvisor.images import cpio

_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
_SPECIAL = (".", "..", "TRAILER!!!")
_PATHS = st.lists(_NAMES.filter(lambda name: name not in _SPECIAL), min_size=1, max_size=4)


@given(st.dictionaries(_PATHS.map("/".join), st.binary(max_size=300), max_size=8))
def test_files_come_back(files: dict[str, bytes]) -> None:
    archive = cpio.Archive()
    for path, data in files.items():
        archive.file(path, data, 0o640)
    members = list(cpio.read(archive.finish()))
    found = {m.name: m.data for m in members if stat.S_ISREG(m.mode)}
    assert found == files
    assert all(stat.S_IMODE(m.mode) == 0o640 for m in members if stat.S_ISREG(m.mode))


@given(st.dictionaries(_PATHS.map("/".join), st.binary(max_size=50), max_size=8))
def test_parents_come_first_and_once(files: dict[str, bytes]) -> None:
    archive = cpio.Archive()
    for path, data in files.items():
        archive.file(path, data)
    seen: set[str] = set()
    for member in cpio.read(archive.finish()):
        parent = member.name.rpartition("/")[0]
        assert not parent or parent in seen
        if stat.S_ISDIR(member.mode):
            assert member.name not in seen
            seen.add(member.name)


def test_kinds_and_concatenation() -> None:
    first, second = cpio.Archive(), cpio.Archive()
    first.directory("/tmp/", 0o1777)
    first.device("dev/console", 5, 1, 0o600)
    second.symlink("bin/sh", "/bin/busybox")
    members = {m.name: m for m in cpio.read(first.finish() + second.finish())}
    assert stat.S_ISDIR(members["tmp"].mode)
    assert stat.S_IMODE(members["tmp"].mode) == 0o1777
    assert stat.S_ISCHR(members["dev/console"].mode)
    assert members["dev/console"].rdev == (5, 1)
    assert stat.S_ISLNK(members["bin/sh"].mode)
    assert members["bin/sh"].data == b"/bin/busybox"


def test_the_same_content_gives_the_same_bytes() -> None:
    def make() -> bytes:
        archive = cpio.Archive()
        archive.file("a/b", b"data")
        return archive.finish()

    assert make() == make()


@pytest.mark.parametrize("path", ["", "/", "a/../b", "..", "a\0b", "TRAILER!!!"])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cpio.Archive().file(path, b"")
    assert caught.value.field == "files"


def test_damaged_archives_are_noticed() -> None:
    archive = cpio.Archive()
    archive.file("file", b"0123456789")
    data = archive.finish()
    with pytest.raises(ValueError, match="not a newc"):
        list(cpio.read(b"x" + data))
    with pytest.raises(ValueError, match="cut off"):
        list(cpio.read(data[:120]))


@pytest.mark.skipif(not shutil.which("busybox"), reason="needs busybox's cpio")
def test_another_cpio_reads_it() -> None:
    archive = cpio.Archive()
    archive.file("etc/motd", b"hello\n")
    archive.symlink("etc/link", "motd")
    done = subprocess.run(
        ["busybox", "cpio", "-t"], input=archive.finish(), capture_output=True, timeout=20
    )
    assert done.stdout.split() == [b"etc", b"etc/motd", b"etc/link"]
