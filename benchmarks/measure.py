"""What the benchmarks share: host CPU time of child processes, and peers that may be missing."""

from __future__ import annotations

import resource
import shutil

import pytest


def children_cpu() -> float:
    """Seconds of host CPU time of all children that were waited for, user and system.

    As the timer of a benchmark this measures what a command costs, whatever else the host is doing:
    @pytest.mark.benchmark(timer=children_cpu) around a subprocess.run().
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peer(program: str) -> str:
    """The path of a program to compare with; skips the benchmark, saying so, when it is missing."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"the peer {program} is not installed")
    return path
