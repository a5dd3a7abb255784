"""What a system call costs that does nothing: in a process VM, where it leaves the vCPU and is
served in C++, and for the same program on the host, under `strace -f`, and in bubblewrap with a
filter.

There is no limit to hold: leaving a vCPU costs what the host's KVM takes for it, about a
microsecond on hardware and tens of them where it runs below another hypervisor. A filter is much
cheaper than either, and leaves the program to the host's kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import report
from polyvisor import Process
from process_peers import bubblewrap, build, need_kvm, output_of, turns, under_strace

TURNS = 5
COUNT = {"native": 200_000, "strace": 5_000, "bubblewrap": 200_000, "kvm": 10_000, "soft": 50_000}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("process"))


def process_vm(program: Path, engine: str) -> float:
    """Seconds of one call."""
    arguments = [program, "calls", str(COUNT[engine])]
    with Process(arguments, ro=[program], engine=engine) as process:
        result = process.run(timeout=100)
    assert result.status == 0
    assert result.system_calls["getppid"][0] == COUNT[engine]
    return int(result.text) / 1e9 / COUNT[engine]


def compare(
    benchmark: BenchmarkFixture, ours: Callable[[], float], peers: dict[str, Callable[[], float]]
) -> None:
    def run() -> list[list[float]]:
        return turns(TURNS, ours, *peers.values())

    found = benchmark.pedantic(run, rounds=1)
    names = ("process_vm_us", *(f"{name}_us" for name in peers))
    report(
        benchmark,
        **{name: min(times) * 1e6 for name, times in zip(names, found, strict=True)},
    )


@pytest.mark.parametrize("engine", ["kvm", "soft"])
def bench_call(benchmark: BenchmarkFixture, program: Path, engine: str) -> None:
    if engine == "kvm":
        need_kvm()

    def run(count: str, before: list[str | Path], **more: object) -> float:
        arguments = [*before, program, "calls", str(COUNT[count])]
        return int(output_of(arguments, **more)) / 1e9 / COUNT[count]

    with bubblewrap(filtered=True) as (wrapped, more):
        compare(
            benchmark,
            lambda: process_vm(program, engine),
            {
                "native": lambda: run("native", []),
                "strace": lambda: run("strace", under_strace()),
                "bubblewrap": lambda: run("bubblewrap", wrapped, **more),
            },
        )
