"""Modules from a kernel's package: which, in which order, and what goes wrong."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

import polyvisor
from polyvisor.errors import ConfigError
from polyvisor.images import cpio, initramfs, kernel, modules

pytestmark = pytest.mark.usefixtures("fake_apt")


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        (["virtio_ring"], ["virtio_ring"]),
        (["virtio-disk"], ["virtio_ring", "virtio", "virtio_disk"]),
        (["virtio_disk", "virtio_ring"], ["virtio_ring", "virtio", "virtio_disk"]),
        (["vfat"], ["fat", "sum_generic", "vfat"]),
        (["fs-vfat", "fat"], ["fat", "sum_generic", "vfat"]),
        (["ext4", "serial_core", "fs-ext4"], []),
        ([], []),
    ],
)
def test_what_is_loaded_in_which_order(asked: list[str], order: list[str]) -> None:
    _, found = modules.fetch("cloud")
    assert [module.name for module in found.closure(asked)] == order


def test_content_and_place() -> None:
    _, found = modules.fetch("cloud")
    assert len(found.names) == 8
    for module in found.closure(["vfat", "virtio_disk"]):
        assert f"the code of {module.name}".encode() in module.data
        assert module.path.startswith("lib/modules/6.1.0-9/kernel/")
        assert module.path.endswith(".ko")


@pytest.mark.parametrize(("name", "near"), [("virtio_dsk", "virtio_disk"), ("exd4", "ext4")])
def test_no_such_module(name: str, near: str) -> None:
    _, found = modules.fetch("cloud")
    with pytest.raises(ConfigError, match=f"no module '{name}'; there is .*{near}") as caught:
        found.closure([name])
    assert caught.value.field == "modules"


def test_fetched_once(fake_apt: Path) -> None:
    modules.fetch("cloud")
    calls = fake_apt.read_text()
    assert calls.count("download") == 2
    assert "download linux-image-6.1.0-9-cloud-amd64=6.1.9-1" in calls
    modules.fetch("cloud")
    assert fake_apt.read_text() == calls


def test_a_kernel_that_the_archive_no_longer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules cannot be had any more, so kernel and modules are both the present ones."""
    kernel.fetch("cloud")
    monkeypatch.setenv("FAKE_GONE", "6.1.9-1")
    monkeypatch.setenv("FAKE_VERSION", "6.1.10-1")
    found, _ = modules.fetch("cloud")
    assert found.version == "6.1.10-1"
    assert kernel.fetch("cloud").version == "6.1.10-1"


def test_in_the_initramfs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = modules.fetch("cloud")
    chosen = found.closure(["virtio_disk"])
    command = initramfs.Command(["true"])
    image = initramfs.build(command, modules=chosen)
    members = {member.name: member.data for member in cpio.read(image)}
    records = members[".polyvisor/command"]
    assert records.endswith(initramfs.encode(command))
    paths = [record[1:].decode() for record in records.split(b"\0") if record[:1] == b"m"]
    assert paths == [f"/{module.path}" for module in chosen]
    assert [members[path.lstrip("/")] for path in paths] == [module.data for module in chosen]


def test_a_kernel_file_has_no_modules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cloud, generic, 686") as caught:
        polyvisor.exec(["true"], kernel=tmp_path / "vmlinuz", modules=["fat"])
    assert caught.value.field == "modules"


def test_names_in_one_string() -> None:
    with pytest.raises(ConfigError, match="list of names"):
        polyvisor.exec(["true"], modules="fat")


def test_compressed_ones_are_unpacked_once() -> None:
    _, found = modules.fetch("cloud")
    with pytest.raises(lzma.LZMAError):
        lzma.decompress(found.closure(["fat"])[0].data)
