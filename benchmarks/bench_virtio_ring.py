"""Claim, from virtio_ring.cpp: a virtqueue pops and pushes chains of one and of three descriptors
at least half as fast as the least code that does so and checks nothing, split and packed.

Both are functions that are called for each chain and give its buffers; ours also shows the driver
its progress after sixteen chains, and marks the ring's pages dirty. CPU time, the best of turns.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import peer, report

NATIVE = Path(__file__).parent.parent / "native"
RINGS = ("queue", "split_queue", "packed_queue", "chain", "fake_driver")
LEAST_RATIO = 0.5


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Chains per second by kind of ring and length of chain, ours and the loop's."""
    program = tmp_path_factory.mktemp("ring") / "virtio_ring"
    rings = [NATIVE / "virtio" / f"{name}.cpp" for name in RINGS]
    below = [part for name in ("memory", "base") for part in sorted((NATIVE / name).glob("*.cpp"))]
    flags = ["-std=gnu++20", "-O2", "-fPIC", "-DNDEBUG", "-fno-tree-slp-vectorize", f"-I{NATIVE}"]
    source = Path(__file__).with_name("virtio_ring.cpp")
    command = [peer("c++"), *flags, "-o", program, source, *rings, *below, "-pthread"]
    subprocess.run(command, check=True, timeout=300)
    run = subprocess.run([program], check=True, capture_output=True, text=True, timeout=300)
    found: dict[str, dict[str, float]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("kind", ["split-1", "split-3", "packed-1", "packed-3"])
def bench_ring(benchmark: BenchmarkFixture, rates: dict[str, dict[str, float]], kind: str) -> None:
    ours, loop = benchmark.pedantic(lambda: (rates[kind]["ours"], rates[kind]["loop"]), rounds=1)
    report(benchmark, chains=ours, loop=loop, ratio=ours / loop, limit=LEAST_RATIO)
    assert ours >= LEAST_RATIO * loop
