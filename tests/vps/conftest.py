"""A store of its own for each test, and the smallest base there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvisor import Vps
from polyvisor.vps.store import Store


@pytest.fixture
def vps_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where VPSs are in this test; numbers stay the host's, as cgroups are. All are gone at its
    end."""
    monkeypatch.setenv("POLYVISOR_VPS_DIR", str(tmp_path / "vps"))
    yield tmp_path / "vps"
    for vps in Vps.all():
        vps.delete(force=True)
    Store().sweep()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of Debian's busybox-static and nothing else."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.fail("busybox is missing; install the package busybox-static")
    base = tmp_path_factory.mktemp("base")
    for name in ("bin", "etc", "root", "tmp"):
        (base / name).mkdir()
    shutil.copy(busybox, base / "bin/busybox")
    for name in (
        "sh",
        "cat",
        "id",
        "hostname",
        "ls",
        "ps",
        "sleep",
        "true",
        "false",
        "touch",
        "rm",
    ):
        (base / "bin" / name).symlink_to("busybox")
    return base
