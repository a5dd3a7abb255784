"""Sandboxes as root and as an ordinary user: the tests here run as both, where they can."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sandbox_runs import Run, Sandbox

NOBODY = 65534
PACKAGE = Path(__file__).resolve().parents[2] / "python"


def as_user(uid: int | None) -> dict[str, Any]:
    """Of subprocess.run()."""
    return {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}


@pytest.fixture(params=["caller", "ordinary user"])
def uid(request: pytest.FixtureRequest) -> int | None:
    """Whom to be; None for who runs the tests."""
    if request.param == "caller":
        return None
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    if not _nobody_finds_python():
        pytest.skip(f"{sys.executable} or {PACKAGE} is out of an ordinary user's reach")
    return NOBODY


@cache
def _nobody_finds_python() -> bool:
    """The tests may run in a folder that only root may look into, such as /root."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import polyvisor.cli, polyvisor._native"],
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            timeout=60,
            check=False,
            **as_user(NOBODY),
        )
    except OSError:
        return False
    return done.returncode == 0


@pytest.fixture
def sandbox(uid: int | None) -> Sandbox:
    """`polyvisor sandbox` with these arguments; skips where the kernel forbids it this user."""

    def call(*arguments: str | Path, input: str = "", timeout: float = 60) -> Run:  # noqa: A002
        done = subprocess.run(
            [sys.executable, "-m", "polyvisor.cli", "sandbox", *arguments],
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path])},
            **as_user(uid),
        )
        if done.returncode == 125 and "makes no process in new namespaces" in done.stderr:
            pytest.skip(done.stderr.strip())
        return Run(done.returncode, done.stdout, done.stderr)

    return call
