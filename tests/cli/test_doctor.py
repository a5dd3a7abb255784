"""`polyvisor doctor`, and what /dev/kvm is found to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from polyvisor import _native, doctor, kvm_probe
from polyvisor.errors import HostError

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
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert engines["soft"]["verdict"] == "good"
    assert engines["soft"]["values"]["mips"] > 10
    kvm = engines["kvm"]
    assert kvm["values"]["available"] is (kvm["verdict"] != "missing")
    assert report["engine"] == ("kvm" if kvm["verdict"] == "good" else "soft")
    text = polyvisor("doctor").stdout
    assert "--engine auto takes " in text
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
    assert found.sentence == f"there is no {tmp_path / 'kvm'}"
    assert "nested virtualization" in found.advice
    engine = doctor.kvm_engine()
    assert engine.verdict == "missing"
    assert engine.advice == found.advice
    assert engine.values == {"device": "missing", "available": False}


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("group", "mode", "advice"), [(54321, 0o660, "54321"), (0, 0o600, "chgrp")]
)
def test_kvm_without_permission(
    monkeypatch: pytest.MonkeyPatch, group: int, mode: int, advice: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path is root's alone
        os.chmod(directory, 0o755)
        device = Path(directory, "kvm")
        device.touch()
        os.chown(device, 0, group)
        device.chmod(mode)
        monkeypatch.setattr(kvm_probe, "PATH", str(device))
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.setresuid(65534, 65534, 65534)
                found = kvm_probe.probe()
                os.write(write, f"{found.reason}|{found.advice}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        reason, _, said = os.read(read, 4096).decode().partition("|")
        os.close(read)
    assert reason == "permission"
    assert advice in said


def test_a_file_that_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    for path in (str(tmp_path / "kvm"), "/dev/null"):
        monkeypatch.setattr(kvm_probe, "PATH", path)
        assert kvm_probe.probe().reason == "broken"


def test_what_emulates_ring_0_is_poor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by measurement, against the engine that would take its place."""
    speeds = {"soft": 900.0}
    monkeypatch.setattr(_native, "engine_speed", speeds.__getitem__)
    monkeypatch.setattr(_native, "probe_kvm", lambda path, measure: ("", "KVM", 1.5))
    poor = doctor.kvm_engine()
    assert poor.verdict == "poor"
    assert "1.5 million" in poor.text
    assert "emulates" in poor.text
    assert poor.advice
    assert poor.values == {"device": "works", "available": True, "api_version": 12, "mips": 1.5}
    monkeypatch.setattr(_native, "probe_kvm", lambda path, measure: ("", "KVM", 3000.0))
    good = doctor.kvm_engine()
    assert good.verdict == "good"
    assert "emulates" not in good.text


def test_a_host_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, measure: bool) -> tuple[str, str, float]:
        raise HostError("KVM_CREATE_VM failed: Too many open files", errno=24, path="")

    monkeypatch.setattr(_native, "probe_kvm", fail)
    assert "Too many open files" in kvm_probe.probe().sentence


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


def test_measured_once() -> None:
    """The figure is kept, so that all of a process agree about it."""
    assert _native.engine_speed("soft") == _native.engine_speed("soft") > 1


@pytest.mark.parametrize("engine", ["auto", "soft"])
def test_kvm_that_is_passed_over_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """Where there is a KVM that auto does not take, and only then: one line with the reason."""
    monkeypatch.delenv("POLYVISOR_ENGINE")
    (tmp_path / "vmlinuz").write_bytes(bytes(100))
    stderr = polyvisor("run", "--kernel", str(tmp_path / "vmlinuz"), "--engine", engine).stderr
    passed_over = kvm_probe.probe(measure=False).reason != "missing"
    expected = engine == "auto" and passed_over and doctor.taken_by_auto() == "soft"
    assert stderr.count("polyvisor: engine auto takes soft: ") == expected


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
