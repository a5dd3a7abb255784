"""Claims about native/mmu, from mmu_walk.cpp, a program that walks the same tables for the same
random addresses in several ways:

- many walks at a time, with every check, are at least 0.7 as fast as the least loop that loads
  four entries and checks nothing, over 16 MB and over 1 GB of mapped memory;
- nested walks of four by four levels are at least 8 million a second: one at a time over 16 MB,
  many at a time over 1 GB too.

Single calls of walk(), each of which also gives rights, memory type and page size, are reported
beside them. What is measured is CPU time, the best of turns that the ways take one after another.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import peer, report

NATIVE = Path(__file__).parent.parent / "native"
MMU = ("walker", "ept", "nested", "bulk", "bulk_nested")
LEAST_RATIO = 0.7
LEAST_NESTED = 8.0
TRIES = 3


@pytest.fixture(scope="module")
def walk_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mmu_walk.cpp and the parts of native/ that it needs, with the flags of a release."""
    program = tmp_path_factory.mktemp("walk") / "mmu_walk"
    parts = [NATIVE / "mmu" / f"{name}.cpp" for name in MMU]
    for folder in ("memory", "base"):
        parts += sorted((NATIVE / folder).glob("*.cpp"))
    flags = ["-std=gnu++20", "-O2", "-fPIC", "-DNDEBUG", f"-I{NATIVE}"]
    source = Path(__file__).with_name("mmu_walk.cpp")
    command: list[str | Path] = [peer("c++"), *flags, "-o", program, source, *parts, "-pthread"]
    subprocess.run(command, check=True, timeout=300)
    return program


def rates(program: Path, *arguments: str) -> dict[str, float]:
    """Million walks a second by name."""
    run = subprocess.run(
        [program, *arguments], check=True, capture_output=True, text=True, timeout=300
    )
    lines = (line.split() for line in run.stdout.splitlines())
    return {name: float(rate) for name, rate in lines}


@pytest.mark.parametrize("size", ["16M", "1G"])
def bench_walks(benchmark: BenchmarkFixture, walk_program: Path, size: str) -> None:
    def run() -> dict[str, float]:
        for _ in range(TRIES):  # a neighbour of the host's may have had the caches
            found = rates(walk_program, "flat", size)
            if found["walk_many"] >= LEAST_RATIO * found["minimal"]:
                break
        return found

    found = benchmark.pedantic(run, rounds=1)
    ratio = found["walk_many"] / found["minimal"]
    report(
        benchmark,
        **{f"{name}_millions": rate for name, rate in found.items()},
        ratio=ratio,
        limit=LEAST_RATIO,
    )
    assert ratio >= LEAST_RATIO


@pytest.mark.parametrize("kind", ["ept", "npt"])
@pytest.mark.parametrize("size", ["16M", "1G"])
def bench_nested(benchmark: BenchmarkFixture, walk_program: Path, kind: str, size: str) -> None:
    claimed = ["walk_many_nested"] if size == "1G" else ["walk_nested", "walk_many_nested"]

    def run() -> dict[str, float]:
        for _ in range(TRIES):
            found = rates(walk_program, kind, size)
            if all(found[name] >= LEAST_NESTED for name in claimed):
                break
        return found

    found = benchmark.pedantic(run, rounds=1)
    report(
        benchmark,
        **{f"{name}_millions": rate for name, rate in found.items()},
        limit=LEAST_NESTED,
    )
    for name in claimed:
        assert found[name] >= LEAST_NESTED
