"""What `Machine.add_disk` takes and refuses, and which format an image has. No guest runs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyvisor.errors import ConfigError, HostError, ImageError, StateMismatch
from polyvisor.images import disk
from polyvisor.machine import Machine

needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-img"), reason="needs qemu-img (package qemu-utils)"
)
KIB = 1024


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory="16M", engine="soft", standard_devices=False) as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * KIB))
    return path


@pytest.mark.parametrize(
    ("name", "given", "contents", "found"),
    [
        ("disk.img", None, b"", "raw"),
        ("disk", None, b"\x55\xaa", "raw"),
        ("disk.qcow2", None, b"", "qcow2"),
        ("DISK.QCOW2", None, b"", "qcow2"),
        ("disk.vmdk", None, b"", "vmdk"),
        ("disk.qcow2", "raw", b"QFI\xfb", "raw"),
        ("disk.img", "qcow2", b"", "qcow2"),
        ("disk.img", "raw", b"QFI\xfb", "raw"),
    ],
)
def test_format(tmp_path: Path, name: str, given: Any, contents: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(contents)
    assert disk.format_of(tmp_path / name, given) == found


def test_a_raw_disk_cannot_become_qcow2(tmp_path: Path, machine: Machine) -> None:
    """A guest may write a header into its raw disk that names any file of the host."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb" + bytes(64 * KIB - 4))
    with pytest.raises(ConfigError, match="begins as a qcow2 image") as caught:
        machine.add_disk(path)
    assert caught.value.field == "format"
    assert machine.add_disk(path, format="raw").format == "raw"


class Bytes:
    """A disk in Python that cannot be written to."""

    def __init__(self, size: int = 64 * KIB) -> None:
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)


class Writable(Bytes):
    def write(self, offset: int, data: bytes) -> None:
        pass


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"cache": "none of these"}, "cache"),
        ({"io": "none of these"}, "io"),
        ({"format": "none of these"}, "format"),
        ({"transport": "none of these"}, "transport"),
        ({"serial": "x" * 21}, "serial"),
        ({"queues": 0}, "queues"),
        ({"queues": 65}, "queues"),
        ({"bytes_per_second": 0}, "bytes_per_second"),
        ({"operations_per_second": -1}, "operations_per_second"),
    ],
)
def test_bad_arguments(machine: Machine, image: Path, how: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        machine.add_disk(image, **how)
    assert caught.value.field == field
    machine.add_disk(image)  # nothing holds the image


@pytest.mark.parametrize("thing", [object(), b"disk.img", Bytes(0), Bytes(1000)])
def test_no_disk(machine: Machine, thing: Any) -> None:
    with pytest.raises(ConfigError):
        machine.add_disk(thing)


def test_files_that_are_none(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file") as caught:
        machine.add_disk(tmp_path / "nothing")
    assert (caught.value.errno, caught.value.path) == (errno.ENOENT, str(tmp_path / "nothing"))
    for path, error in ((tmp_path, "directory"), (Path("/dev/zero"), "no disk image")):
        with pytest.raises(HostError, match=error):
            machine.add_disk(path)
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="is empty"):
        machine.add_disk(tmp_path / "empty")


def test_attributes(machine: Machine, image: Path) -> None:
    made = machine.add_disk(image, queues=2, transport="mmio", io="threads")
    assert (made.path, made.format, made.size, made.io) == (str(image), "raw", 64 * KIB, "threads")
    assert not made.read_only
    assert made.native.transport == "mmio"
    assert made.statistics()["read"] == {"requests": 0, "bytes": 0, "errors": 0}
    assert machine.add_disk(Bytes()).read_only
    assert machine.add_disk(Writable(), read_only=True).read_only
    python = machine.add_disk(Writable())
    assert (python.format, python.path, python.io) == ("python", "Writable", "threads")
    assert not python.read_only
    assert not machine.add_disk(Bytes(), snapshot=True).read_only
    with pytest.raises(StateMismatch, match="cannot change its size"):
        python.resize(KIB)
    made.resize(128 * KIB)
    assert (made.size, image.stat().st_size) == (128 * KIB, 128 * KIB)
    os.truncate(image, 32 * KIB)
    made.refresh()
    assert made.size == 32 * KIB
    with pytest.raises(ConfigError, match="512"):
        made.resize(1000)


def test_one_writer(machine: Machine, image: Path) -> None:
    machine.add_disk(image)
    with (
        Machine(memory="16M", engine="soft", standard_devices=False) as other,
        pytest.raises(HostError, match="in use") as caught,
    ):
        other.add_disk(image)
    assert caught.value.errno == errno.EBUSY
    machine.close()
    with Machine(memory="16M", engine="soft", standard_devices=False) as other:
        other.add_disk(image, snapshot=True)
        other.add_disk(image, read_only=True)


def test_missing_programs(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.qcow2").write_bytes(bytes(KIB))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="qemu-utils"):
        machine.add_disk(tmp_path / "disk.qcow2")
    with pytest.raises(ImageError, match="qemu-utils") as caught:
        disk.info(tmp_path / "disk.qcow2")
    assert caught.value.reason == "missing"


@needs_qemu
def test_images(machine: Machine, tmp_path: Path) -> None:
    for name in ("a.img", "a.qcow2", "a.vmdk", "odd,name:.qcow2"):
        path = tmp_path / name
        disk.create(path, "1M")
        found = disk.info(path)
        assert (found.format, found.size) == (disk.format_of(path), 1 << 20)
        assert found.allocated < 1 << 20
        assert machine.add_disk(path).size == 1 << 20
        with pytest.raises(HostError, match="exists"):
            disk.create(path, "1M")
    with pytest.raises(ConfigError):
        disk.create(tmp_path / "b.img", 1000)
    with pytest.raises(ImageError):
        disk.overlay(tmp_path / "over.qcow2", tmp_path / "nothing.img")
    with pytest.raises(ImageError):
        disk.convert(tmp_path / "nothing.qcow2", tmp_path / "c.img")
    assert not (tmp_path / "over.qcow2").exists()
    assert not (tmp_path / "c.img").exists()


@needs_qemu
def test_what_qemu_says(machine: Machine, image: Path) -> None:
    with pytest.raises(HostError, match="not in qcow2 format"):
        machine.add_disk(image, format="qcow2")
    with pytest.raises(ImageError, match="not in qcow2 format"):
        disk.info(image, "qcow2")
