"""Building images: what is refused, and what mmdebstrap's complaints become. That a built image
boots is in tests/guests/test_debian.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyvisor import images
from polyvisor.errors import ConfigError, HostError, ImageError
from polyvisor.images import extfs, rootfs


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that begins with an empty directory, and a cache of our own."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return directory


def fake_mmdebstrap(tools: Path, script: str) -> None:
    (tools / "mmdebstrap").write_text(f'#!/bin/sh\necho "$@" >>{tools}/log\n{script}\n')
    (tools / "mmdebstrap").chmod(0o755)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"suite": "../sid"}, "suite"),
        ({"packages": ["git", "--force"]}, "package"),
        ({"hostname": "a b"}, "hostname"),
        ({"hostname": "-a"}, "hostname"),
        ({"root_password": ""}, "root_password"),
        ({"root_password": "a\nb:c"}, "root_password"),
        ({"size": "big"}, "size"),
        ({"ssh_keys": ["/nonexistent.pub"]}, "ssh_keys"),
    ],
)
def test_values_that_cannot_be_used(
    tools: Path, tmp_path: Path, options: dict[str, object], field: str
) -> None:
    fake_mmdebstrap(tools, "exit 1")
    with pytest.raises(ConfigError) as caught:
        images.build(tmp_path / "x.img", **options)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert not (tools / "log").exists()
    assert not list(tmp_path.glob("*.img*"))


def test_a_private_key_is_no_key_to_hand_out(tools: Path, tmp_path: Path) -> None:
    key = tmp_path / "id"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
    with pytest.raises(ConfigError, match=r"\.pub"):
        images.build(tmp_path / "x.img", ssh_keys=[key])


def test_an_image_that_exists_is_kept(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="--force"):
        images.build(tmp_path / "x.img")
    assert (tmp_path / "x.img").read_bytes() == b"precious"


def test_no_directory_for_it(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no directory"):
        images.build(tmp_path / "none/x.img")


def test_no_mmdebstrap(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ImageError, match="apt-get install mmdebstrap") as caught:
        rootfs.fetch("bookworm")
    assert caught.value.reason == "no-mmdebstrap"


@pytest.mark.parametrize(
    ("words", "reason", "sentence"),
    [
        ("E: Unable to locate package gitt", "no-package", "no package gitt"),
        (
            "E: The repository 'http://deb.debian.org/debian none Release' does not have a Release "
            "file.",
            "no-suite",
            "no such release",
        ),
        ("E: Temporary failure resolving 'deb.debian.org'", "download", "is there a network"),
        ("dpkg: error: No space left on device", "no-space", "disk is full"),
        ("newuidmap: uid range [0-65536) not allowed", "no-namespaces", "uidmap"),
        ("E: something else", "mmdebstrap", "something else"),
    ],
)
def test_what_mmdebstrap_complains_of(
    tools: Path, tmp_path: Path, words: str, reason: str, sentence: str
) -> None:
    fake_mmdebstrap(tools, f'echo "{words}" >&2; echo "E: apt-get update failed" >&2; exit 25')
    with pytest.raises(ImageError, match=sentence) as caught:
        rootfs.fetch("bookworm")
    assert caught.value.reason == reason
    assert not list((tmp_path / "cache/rootfs").glob("1-*[0-9a-f]"))


def test_made_once_for_the_same_packages(tools: Path) -> None:
    fake_mmdebstrap(tools, 'echo "I: installing packages..." >&2; echo a tar')
    steps: list[str] = []
    first = rootfs.fetch("bookworm", ["git", "make"], progress=steps.append)
    assert steps == ["building Debian bookworm: installing packages"]
    assert Path(first.tar).read_bytes() == b"a tar\n"
    assert rootfs.fetch("bookworm", ["make", "git"]) == first
    assert len((tools / "log").read_text().splitlines()) == 1
    assert rootfs.fetch("bookworm", ["git"]).tar != first.tar
    assert rootfs.fetch("trixie", ["git", "make"]).tar != first.tar
    rootfs.fetch("bookworm", ["git", "make"], refresh=True)
    assert len((tools / "log").read_text().splitlines()) == 4


@pytest.mark.needs_root
class TestTree:
    """Files that become a file system."""

    def tree(self, tmp_path: Path) -> Path:
        import tarfile

        (tmp_path / "file").write_bytes(b"content" * 1000)
        with tarfile.open(tmp_path / "t.tar", "w") as archive:
            for name, owner in (("root.txt", 0), ("mine.txt", 1234)):
                member = archive.gettarinfo(tmp_path / "file", name)
                member.uid = member.gid = owner
                with open(tmp_path / "file", "rb") as file:
                    archive.addfile(member, file)
        return tmp_path / "t.tar"

    def test_there_and_back(self, tmp_path: Path) -> None:
        image = tmp_path / "x.img"
        with extfs.Tree() as tree:
            tree.unpack(self.tree(tmp_path))
            tree.make_image(image, 128 << 20, "label")
        assert image.stat().st_size == 128 << 20
        assert image.stat().st_blocks * 512 < 32 << 20
        reader = extfs.Reader(image)
        names = reader.names("/")
        assert names == {"root.txt": "file", "mine.txt": "file", "lost+found": "directory"}
        reader.copy("/mine.txt", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"content" * 1000
        assert sorted(path.name for path in tmp_path.glob("*img*")) == ["x.img"]

    def test_too_small(self, tmp_path: Path) -> None:
        with extfs.Tree() as tree:
            tree.unpack(self.tree(tmp_path))
            with pytest.raises(ConfigError, match=r"needs 81 MiB; give --size 100M") as caught:
                tree.make_image(tmp_path / "x.img", 64 << 20, "label")
        assert caught.value.field == "size"
        assert not list(tmp_path.glob("*img*"))

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """The limit on a file's size stands in for the disk's end, as far as mke2fs can tell."""
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with extfs.Tree() as tree:
            tree.unpack(self.tree(tmp_path))
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, before[1]))
            try:
                with pytest.raises((HostError, ImageError)):
                    tree.make_image(tmp_path / "x.img", 128 << 20, "label")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(tmp_path.glob("*img*"))

    def test_nothing_is_left_of_it(self, tmp_path: Path) -> None:
        with extfs.Tree() as tree:
            root = tree.root
            assert root.is_dir()
        assert not root.parent.exists()
