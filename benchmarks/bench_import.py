"""Claim: importing polyvisor takes at most 100 ms, with all that a machine needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import report

LIMIT = 0.100
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
#: polyvisor loads its names when they are used. asyncio: a peer from the standard library.
IMPORTS = {"polyvisor": "from polyvisor import Machine", "asyncio": "import asyncio"}


def import_seconds(module: str) -> float:
    """How long one import takes in a new interpreter, whose own start is not counted."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(IMPORTS[module])],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


@pytest.mark.parametrize("module", sorted(IMPORTS))
def bench_import(benchmark: BenchmarkFixture, module: str) -> None:
    best = min(import_seconds(module) for _ in range(5))
    benchmark.pedantic(import_seconds, args=(module,), rounds=10, warmup_rounds=1)
    limits = {"limit": LIMIT} if module == "polyvisor" else {}
    report(benchmark, import_seconds=best, **limits)
    if module == "polyvisor":
        assert best <= LIMIT, f"importing polyvisor takes {best * 1000:.0f} ms"
