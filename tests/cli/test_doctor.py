"""`polyvisor doctor`, and what /dev/kvm is found to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyvisor import doctor, kvm_probe

POLYVISOR = [sys.executable, "-m", "polyvisor.cli"]


def polyvisor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*POLYVISOR, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_json_and_text_agree() -> None:
    done = polyvisor("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["engine"] == "soft"
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert engines["soft"]["verdict"] == "good"
    assert engines["soft"]["values"]["mips"] > 10
    assert engines["kvm"]["values"]["available"] is False
    text = polyvisor("doctor").stdout
    assert "--engine auto takes soft" in text
    for finding in report["engines"] + report["tools"]:
        assert finding["name"] in text
    assert "\x1b" not in text  # no colours where no terminal is


def test_every_complaint_has_advice() -> None:
    report = doctor.examine()
    for finding in report.tools:
        assert finding.verdict == "good" or finding.advice or finding.name == "kernel", finding


def test_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvm_probe, "PATH", str(tmp_path / "kvm"))
    found = kvm_probe.probe()
    assert found.reason == "missing"
    assert "nested virtualization" in found.advice
    engine = doctor.kvm_engine()
    assert engine.verdict == "missing"
    assert engine.advice


def test_kvm_without_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, os.strerror(13))

    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o600)
    monkeypatch.setattr(kvm_probe, "PATH", str(device))
    monkeypatch.setattr(kvm_probe.os, "open", refuse)
    found = kvm_probe.probe()
    assert found.reason == "permission"
    assert "chmod" in found.advice
    device.chmod(0o660)
    monkeypatch.setattr(kvm_probe.grp, "getgrgid", lambda gid: ("virt",) * 4)
    monkeypatch.setattr(
        kvm_probe.grp, "getgrgid", lambda gid: type("Group", (), {"gr_name": "virt"})
    )
    assert "usermod -aG virt" in kvm_probe.probe().advice


def test_a_file_that_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm_probe, "PATH", str(tmp_path / "kvm"))
    assert kvm_probe.probe().reason == "broken"


def test_kvm_as_it_is_here() -> None:
    """Whatever this host has: an answer soon, and with a number when it works."""
    start = time.monotonic()
    found = kvm_probe.probe()
    assert time.monotonic() - start < 20
    if found.reason:
        assert found.mips is None
        assert found.sentence
    else:
        assert found.mips is not None
        assert found.mips > 0


def test_the_measurement_is_of_the_loop() -> None:
    """A loop twice as long takes longer, not the same: the machine is not what is measured."""
    assert doctor.measure_soft(2_000_000) > 1


def test_version_and_help() -> None:
    version = polyvisor("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("polyvisor 0.")
    for arguments in (["--help"], ["exec", "--help"], ["run", "--help"], ["doctor", "--help"]):
        done = polyvisor(*arguments)
        assert done.returncode == 0
        assert "Usage" in done.stdout
    assert "Examples" in polyvisor("exec", "--help").stdout
    assert polyvisor("nonsense").returncode == 2


def test_importing_is_quick() -> None:
    # In CPU time, which other tests on this host do not change much.
    code = "import time; t = time.process_time(); import polyvisor; print(time.process_time() - t)"
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(float(done.stdout))
    assert min(times) < 0.1
