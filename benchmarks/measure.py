"""What the benchmarks share: host CPU time of other processes and threads, peers that may be
missing, and how a figure is reported."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

#: The command line tool of the environment that runs the benchmarks.
POLYVISOR = Path(sys.executable).with_name("polyvisor")


def children_cpu() -> float:
    """Seconds of host CPU time of all children that were waited for, user and system.

    As the timer of a benchmark this measures what a command costs, whatever else the host is doing:
    @pytest.mark.benchmark(timer=children_cpu) around a subprocess.run().
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def process_cpu(pid: int) -> float:
    """Seconds of host CPU time of another process so far, to the nanosecond.

    The kernel makes the number of such a clock from the process id (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def thread_cpu(name: str) -> float:
    """Seconds of host CPU time of the thread of this process with that name."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return time.clock_gettime((~int(task.name) << 3) | 6)
    raise LookupError(f"there is no thread {name!r}")


def peer(program: str) -> str:
    """The path of a program to compare with; skips the benchmark, saying so, when it is missing."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"the peer {program} is not installed")
    return path


#: What `report` was told, for the end of the run.
FIGURES: list[tuple[str, dict[str, object]]] = []


def report(benchmark: BenchmarkFixture, **figures: object) -> None:
    """Keeps figures with the benchmark's result (in the saved JSON its extra_info), and for the
    summary at the end of the run."""
    figures = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }
    benchmark.extra_info.update(figures)
    FIGURES.append((benchmark.name, figures))
