"""Runs every native test program that CMake knows: one pytest test per program.

Exit status 0 is a pass; 77 means that it cannot run here, and the last line of stdout says why.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SECONDS = 300
NONE = "none"
SKIPPED = 77


def programs(build: Path) -> dict[str, tuple[list[str], list[str]]]:
    """The command and labels of each test in a CMake build directory; no command: not built."""
    listing = subprocess.run(
        ["ctest", "--test-dir", build, "--show-only=json-v1"],
        capture_output=True,
        text=True,
        check=True,
    )
    tests = json.loads(listing.stdout)["tests"]
    return {test["name"]: (test.get("command", []), labels(test)) for test in tests}


def labels(test: dict[str, Any]) -> list[str]:
    found = {entry["name"]: entry["value"] for entry in test.get("properties", [])}
    return found.get("LABELS", [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "command" in metafunc.fixturenames:
        build: Path = metafunc.config.getoption("native_build")
        configured = (build / "CTestTestfile.cmake").is_file()
        found = (programs(build) if configured else {}) or {NONE: ([], [])}
        marks = {"kvm": [pytest.mark.kvm_native]}
        metafunc.parametrize(
            "command",
            [
                pytest.param(command, id=name, marks=marks.get(" ".join(folder), []))
                for name, (command, folder) in found.items()
            ],
        )


@pytest.mark.timeout(SECONDS + 20)
def test_program(command: list[str], native_build: Path, tmp_path: Path) -> None:
    if not command or not Path(command[0]).is_file():
        pytest.fail(f"no such program in {native_build}; run 'make build-all' first")
    try:
        run = subprocess.run(
            command,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"still running after {SECONDS} s:\n{tail(error.stderr)}")
    if run.returncode == SKIPPED:
        pytest.skip(tail(run.stdout.rstrip(), 1) or "it gave no reason")
    if run.returncode != 0:
        pytest.fail(f"ended with status {run.returncode}:\n{tail(run.stderr)}")


def tail(output: bytes | None, lines: int = 60) -> str:
    return "\n".join((output or b"").decode(errors="replace").splitlines()[-lines:])
