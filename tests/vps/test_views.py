"""polyvisor.vps.views: /proc inside agrees with the limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.vps import views
from polyvisor.vps.limits import CgroupStats, Limits

HOST = Path("/proc/meminfo").read_text()
CPUS = "".join(
    f"processor\t: {number}\nmodel name\t: some\nflags\t\t: fpu\n\n" for number in range(8)
)


def fields(text: str) -> dict[str, int]:
    return {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()}


def stats(memory: int | None, cache: int | None) -> CgroupStats:
    return CgroupStats(memory, None, cache, None, None, None, None, None, None)


@given(
    st.integers(1 << 12, 1 << 50),
    st.none() | st.integers(0, 1 << 50),
    st.none() | st.integers(0, 1 << 50),
)
def test_memory_adds_up(limit: int, used: int | None, cache: int | None) -> None:
    found = fields(views.meminfo(HOST, Limits(memory=limit), stats(used, cache)))
    host = fields(HOST)
    assert found["MemTotal"] == min(limit >> 10, host["MemTotal"])
    assert 0 <= found["MemFree"] <= found["MemTotal"]
    assert found["MemFree"] + found["Cached"] <= found["MemTotal"]
    assert (
        found["MemFree"] <= found["MemAvailable"] or found["MemAvailable"] == host["MemAvailable"]
    )
    assert found["SwapTotal"] == found["SwapFree"] == 0


def test_memory_in_use_is_not_free() -> None:
    found = fields(views.meminfo(HOST, Limits(memory="8M"), stats(5 << 20, 2 << 20)))
    assert found == found | {
        "MemTotal": 8 << 10,
        "MemFree": 3 << 10,
        "MemAvailable": 5 << 10,
        "Cached": 2 << 10,
    }


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        (Limits(), 8),
        (Limits(cpus=0.5), 1),
        (Limits(cpus=2), 2),
        (Limits(cpus=2.1), 3),
        (Limits(cpus=100), 8),
        (Limits(cpuset="0"), 1),
        (Limits(cpuset="0", cpus=4), 1),
    ],
)
def test_cpus(limits: Limits, count: int) -> None:
    found = views.cpuinfo(CPUS, limits)
    assert found == CPUS[: len(found)]
    assert found.count("processor") == count


def test_own_files(tmp_path: Path) -> None:
    limits = Limits(memory="16M", cpus=1)
    found = views.mounts(limits, tmp_path, lxcfs="/nowhere")
    assert {(mount.source, mount.target, mount.read_only) for mount in found} == {
        (str(tmp_path / name), f"/proc/{name}", True) for name in ("meminfo", "cpuinfo")
    }
    before = os.stat(tmp_path / "meminfo").st_ino
    views.refresh(limits, stats(1 << 20, 0), tmp_path)
    assert os.stat(tmp_path / "meminfo").st_ino == before  # what is bound stays bound
    assert fields((tmp_path / "meminfo").read_text())["MemFree"] == 15 << 10
    assert (tmp_path / "cpuinfo").read_text().count("processor") == 1
    assert views.mounts(Limits(), tmp_path, lxcfs="/nowhere") == []


def test_lxcfs_has_them_all(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    for name in ("meminfo", "uptime"):
        (tmp_path / "proc" / name).touch()
    found = views.mounts(Limits(), tmp_path / "unused", lxcfs=str(tmp_path))
    assert {mount.target for mount in found} == {"/proc/meminfo", "/proc/uptime"}
