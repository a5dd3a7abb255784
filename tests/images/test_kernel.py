"""Kernels from packages, by an apt of our own making: what is asked of it, what goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyvisor.errors import ConfigError, ImageError
from polyvisor.images import kernel, packages


def test_fetched_once(fake_apt: Path) -> None:
    steps: list[str] = []
    found = kernel.fetch("cloud", progress=steps.append)
    assert found.image.read_bytes() == b"the kernel"
    assert found.package == "linux-image-6.1.0-9-cloud-amd64"
    assert found.version == "6.1.9-1"
    assert found.architecture == "amd64"
    assert [step.split()[0] for step in steps] == ["downloading", "unpacking"]
    calls = fake_apt.read_text()
    assert kernel.cached("cloud")
    assert kernel.fetch("cloud") == found
    assert fake_apt.read_text() == calls


def test_ubuntu_has_another(fake_apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_UBUNTU", "1")
    assert kernel.fetch("cloud").package == "linux-image-6.8.0-7-generic"


def test_refresh_fetches_again(fake_apt: Path) -> None:
    kernel.fetch("cloud")
    calls = fake_apt.read_text().count("download")
    kernel.fetch("cloud", refresh=True)
    assert fake_apt.read_text().count("download") == calls + 1


def test_no_network(fake_apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_OFFLINE", "1")
    with pytest.raises(ImageError, match="no network") as caught:
        kernel.fetch("cloud")
    assert caught.value.reason == "download"
    assert not kernel.cached("cloud")


def test_no_such_package(fake_apt: Path) -> None:
    with pytest.raises(ImageError, match="linux-image-amd64") as caught:
        kernel.fetch("generic")
    assert caught.value.reason == "no-package"


def test_no_such_name() -> None:
    with pytest.raises(ConfigError, match="cloud, generic, 686") as caught:
        kernel.fetch("hurd")
    assert caught.value.field == "kernel"


def test_no_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("POLYVISOR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ImageError, match="--kernel") as caught:
        kernel.fetch("cloud")
    assert caught.value.reason == "no-apt"


def test_a_damaged_package(fake_apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb = Path(os.environ["FAKE_DEB"])
    deb.write_bytes(deb.read_bytes()[:200])
    with pytest.raises(ImageError):
        kernel.fetch("cloud")


def test_unpack_only_what_is_wanted(fake_apt: Path, tmp_path: Path) -> None:
    packages.unpack(Path(os.environ["FAKE_DEB"]), tmp_path / "out", r"boot/vmlinuz")
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == ["vmlinuz-6.1.0-9"]
