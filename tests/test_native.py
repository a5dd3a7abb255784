"""Runs every native test program that CMake knows: one pytest test per program."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

SECONDS = 300
NONE = "none"


def programs(build: Path) -> dict[str, list[str]]:
    """The command of each test in a CMake build directory; an empty one is not built."""
    listing = subprocess.run(
        ["ctest", "--test-dir", build, "--show-only=json-v1"],
        capture_output=True,
        text=True,
        check=True,
    )
    tests = json.loads(listing.stdout)["tests"]
    return {test["name"]: test.get("command", []) for test in tests}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "command" in metafunc.fixturenames:
        build: Path = metafunc.config.getoption("native_build")
        configured = (build / "CTestTestfile.cmake").is_file()
        found = (programs(build) if configured else {}) or {NONE: []}
        metafunc.parametrize("command", found.values(), ids=found.keys())


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
    if run.returncode != 0:
        pytest.fail(f"ended with status {run.returncode}:\n{tail(run.stderr)}")


def tail(output: bytes | None, lines: int = 60) -> str:
    return "\n".join((output or b"").decode(errors="replace").splitlines()[-lines:])
