"""What conftest.py makes of the markers for KVM, on hosts of three kinds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.kvm
def test_kvm(): pass

@pytest.mark.kvm_fast
def test_fast(): pass

def test_small(engine): assert engine in ("soft", "kvm")

def test_large(fast_engine): assert fast_engine in ("soft", "kvm")

def test_any(): pass

def test_skipped_for_another_reason(): pytest.skip("another")
"""
HOST = """
from polyvisor.kvm_probe import Kvm

kvm_probe.probe = lambda measure=True: Kvm(reason={reason!r}, sentence="no such thing", mips={mips})
"""


@pytest.mark.parametrize(
    ("reason", "mips", "passed", "lines"),
    [
        ("missing", None, 3, ["KVM tests skipped: 4 (no such thing)"]),
        (
            "",
            2.0,
            5,
            ["KVM tests skipped: 2 (this /dev/kvm emulates ring 0, which is slower than the soft "
             "engine)"],
        ),
        ("", 400.0, 7, []),
    ],
    ids=["none", "emulated", "hardware"],
)  # fmt: skip
def test_skips_are_told_and_counted(
    reason: str, mips: float | None, passed: int, lines: list[str], root: Path, tmp_path: Path
) -> None:
    conftest = (root / "tests" / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest + HOST.format(reason=reason, mips=mips))
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-disable"),
            *("-c", root / "pyproject.toml", "--rootdir", tmp_path, tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("KVM tests")] == lines
    assert f" {passed} passed, {8 - passed} skipped" in done.stdout
