"""What a disk image boots, found in file systems that mke2fs made."""

from __future__ import annotations

import os
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from polyvisor.errors import ConfigError, HostError, ImageError
from polyvisor.images import bootable, extfs

_MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))


def file_system(directory: Path, boot: dict[str, bytes], kind: str = "ext4") -> Path:
    """A file system of 8 MiB whose /boot has these files."""
    tree = directory / "tree"
    (tree / "boot").mkdir(parents=True)
    for name, content in boot.items():
        (tree / "boot" / name).write_bytes(content)
    image = directory / "fs.img"
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-F", "-t", kind, "-d", tree, image, "8M"],
        check=True,
        capture_output=True,
    )
    return image


def with_gpt(image: Path, number: int) -> Path:
    """The same behind a GPT, as its partition `number`, 3 MiB from the start."""
    header = bytearray(512)
    header[:8] = b"EFI PART"
    struct.pack_into("<QII", header, 72, 2, 128, 128)
    entries = bytearray(128 * 128)
    entry = struct.pack("<16s16sQQ", uuid.uuid4().bytes_le, uuid.uuid4().bytes_le, 3 * 2048, 0)
    entries[128 * (number - 1) :][: len(entry)] = entry
    entries[128 * (number - 1) : 128 * (number - 1) + len(entry)] = entry
    disk = image.with_name("gpt.img")
    disk.write_bytes((bytes(512) + header + entries).ljust(3 * _MIB, b"\0") + image.read_bytes())
    return disk


def with_mbr(image: Path, number: int) -> Path:
    """The same behind an MBR."""
    record = bytearray(512)
    entry = struct.pack("<8xII", 2048, 16384)
    record[446 + 16 * (number - 1) : 462 + 16 * (number - 1)] = b"\0\0\0\0\x83" + entry[5:]
    record[510:] = b"\x55\xaa"
    disk = image.with_name("mbr.img")
    disk.write_bytes(bytes(record).ljust(_MIB, b"\0") + image.read_bytes())
    return disk


OURS = {"vmlinuz-6.1.0-9-cloud": b"kernel 9", "polyvisor-initrd-6.1.0-9-cloud": b"our initrd"}
DEBIAN = {
    "vmlinuz-6.1.0-9-cloud": b"kernel 9",
    "initrd.img-6.1.0-9-cloud": b"initrd 9",
    "vmlinuz-6.1.0-10-cloud": b"kernel 10",
    "initrd.img-6.1.0-10-cloud": b"initrd 10",
    "vmlinuz-6.12.0-1": b"kernel without an initrd",
    "config-6.1.0-10-cloud": b"",
}


def content(found: bootable.Bootable) -> tuple[bytes, bytes]:
    return Path(found.kernel).read_bytes(), Path(found.initrd).read_bytes()


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_our_own_image(tmp_path: Path, kind: str) -> None:
    found = bootable.find(file_system(tmp_path, OURS, kind))
    assert content(found) == (b"kernel 9", b"our initrd")
    assert (found.ours, found.root, found.release) == (True, "vda", "6.1.0-9-cloud")
    assert "root=/dev/vda rw" in found.cmdline


def test_a_kernel_that_was_installed_later(tmp_path: Path) -> None:
    """It has modules of its own, and the distribution's initial RAM disk for them."""
    found = bootable.find(file_system(tmp_path, {**OURS, **DEBIAN}))
    assert content(found) == (b"kernel 10", b"initrd 10")
    assert not found.ours


@pytest.mark.parametrize(
    ("wrap", "number", "root"),
    [(with_gpt, 1, "vda1"), (with_gpt, 15, "vda15"), (with_mbr, 2, "vda2")],
)
def test_a_partitioned_disk_has_its_newest_kernel(
    tmp_path: Path, wrap: object, number: int, root: str
) -> None:
    assert callable(wrap)
    found = bootable.find(wrap(file_system(tmp_path, DEBIAN), number))
    assert content(found) == (b"kernel 10", b"initrd 10")
    assert (found.ours, found.root) == (False, root)
    assert f"root=/dev/{root} rw" in found.cmdline


def test_qcow2(tmp_path: Path) -> None:
    raw, image = file_system(tmp_path, DEBIAN), tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    assert content(bootable.find(image)) == (b"kernel 10", b"initrd 10")


def test_found_again_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = file_system(tmp_path, OURS)
    found = bootable.find(image)
    with monkeypatch.context() as patch:
        patch.setattr(extfs.Reader, "names", None)
        assert bootable.find(image) == found
    other = tmp_path / "other"
    other.mkdir()
    os.replace(file_system(other, {**OURS, "polyvisor-initrd-6.1.0-9-cloud": b"a new one"}), image)
    assert content(bootable.find(image)) == (b"kernel 9", b"a new one")


@pytest.mark.parametrize(
    ("boot", "reason"), [({}, "no-kernel"), ({"vmlinuz-6.1": b"alone"}, "no-kernel")]
)
def test_nothing_to_boot(tmp_path: Path, boot: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ImageError, match="--kernel") as caught:
        bootable.find(file_system(tmp_path, boot))
    assert caught.value.reason == reason


@pytest.mark.parametrize("data", [b"", b"text", bytes(_MIB), b"\xff" * _MIB])
def test_no_file_system(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="no ext2, ext3 or ext4") as caught:
        bootable.find(path)
    assert caught.value.reason == "no-filesystem"


def test_a_damaged_file_system(tmp_path: Path) -> None:
    image = file_system(tmp_path, OURS)
    data = bytearray(image.read_bytes())
    data[1024 + 60 :] = os.urandom(len(data) - 1024 - 60)
    image.write_bytes(data)
    with pytest.raises(ImageError):
        bootable.find(image)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        bootable.find(tmp_path / "none.img")


def test_shared_folders_on_the_command_line() -> None:
    shares = [("/src", "/mnt/src", True), (".", "/out", False)]
    assert bootable.share_options(shares, ours=True) == [
        "polyvisor.share=share0:/mnt/src:ro",
        "polyvisor.share=share1:/out:rw",
    ]
    assert bootable.share_options(shares[:1], ours=False) == [
        "systemd.mount-extra=share0:/mnt/src:virtiofs:ro"
    ]
    with pytest.raises(ConfigError, match="command line"):
        bootable.share_options([(".", "/a b", True)], ours=True)
