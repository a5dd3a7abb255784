"""Claim: what a program computes in a process VM on kvm takes at most 1/0.97 of what it takes on
the host: SHA-256, sorting, products of matrices.

The same program takes turns here and there on one CPU; what is compared is CPU time, all of it:
with the start of either, and the system calls."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import report
from polyvisor import Process
from process_peers import build, cpu_of, median_ratio, need_kvm, one_cpu, turns

LIMIT = 0.97
TURNS = 7
#: About a second of CPU time each.
WORK = {"sha256": "1800", "sort": "10", "float": "700"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_kvm()
    return build(tmp_path_factory.mktemp("process"))


@pytest.mark.parametrize("kind", WORK)
def bench_compute(benchmark: BenchmarkFixture, program: Path, kind: str) -> None:
    def ours() -> float:
        with Process([program, kind, WORK[kind]], ro=[program], engine="kvm") as process:
            result = process.run(timeout=100)
        assert result.status == 0
        return result.cpu_seconds

    def native() -> float:
        return cpu_of([program, kind, WORK[kind]])

    with one_cpu():
        here, there = benchmark.pedantic(lambda: turns(TURNS, native, ours), rounds=1)
    ratio = median_ratio(here, there)
    report(
        benchmark,
        native_s=statistics.median(here),
        process_vm_s=statistics.median(there),
        ratio=ratio,
        limit=LIMIT,
    )
    assert ratio >= LIMIT
