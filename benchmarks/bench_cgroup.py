"""Claim: to make a cgroup with limits of memory, CPU and processes, and to remove it, takes at most
1.5 times what the kernel does for the same directories and values, asked by bare system calls.

CPU time of this process, as other load would count otherwise; it is all the kernel's and ours."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import report
from polyvisor.vps.limits import Cgroup, Limits
from process_peers import turns

LIMIT = 1.5
TURNS = 300
FILES = {  # v1 and v2: whichever are there
    "memory.limit_in_bytes": "268435456",
    "memory.memsw.limit_in_bytes": "268435456",
    "memory.max": "268435456",
    "memory.swap.max": "0",
    "cpu.cfs_quota_us": "50000",
    "cpu.max": "50000 100000",
    "pids.max": "200",
}


def cpu(call: Callable[[], None]) -> float:
    before = time.process_time_ns()
    call()
    return (time.process_time_ns() - before) / 1e9


def ours() -> None:
    limits = Limits(memory="256M", cpus=0.5, pids=200, devices=None)
    Cgroup.create("bench", limits, complete=False).remove()


@pytest.mark.needs_root
def bench_create_and_remove(benchmark: BenchmarkFixture) -> None:
    with Cgroup.create(
        "bench", Limits(memory="256M", cpus=0.5, pids=200, devices=None), complete=False
    ) as model:
        places = [Path(f"/proc/self/fd/{fd}").resolve() for fd in model.fds()]
        writes = [
            (place.with_name("bare") / name, value.encode())
            for place in places
            for name, value in FILES.items()
            if (place / name).exists()
        ]
    bare_places = [place.with_name("bare") for place in places]

    def bare() -> None:
        for place in bare_places:
            os.mkdir(place)
        for path, value in writes:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, value)
            os.close(fd)
        for place in bare_places:
            os.rmdir(place)

    found = benchmark.pedantic(lambda: turns(TURNS, lambda: cpu(ours), lambda: cpu(bare)), rounds=1)
    made, floor = (statistics.median(times) for times in found)
    report(benchmark, cgroup_us=made * 1e6, bare_us=floor * 1e6, ratio=made / floor, limit=LIMIT)
    assert made <= LIMIT * floor
