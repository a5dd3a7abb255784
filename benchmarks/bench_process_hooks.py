"""What it costs to look at a system call that does nothing: served in C++ and unseen, while another
call has a hook, shown to a hook in Python that lets it pass or answers it, kept as an event, and
written to a file as a line or as JSON.

Claim: who looks at other calls, or at none, costs nothing that can be measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import report
from polyvisor import Process
from process_peers import build, need_kvm, turns

TURNS = 5
COUNT = {"kvm": 5_000, "soft": 20_000}
#: More than noise between two runs of the same.
LIMIT = 1.1


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("process"))


def seconds(
    program: Path,
    engine: str,
    *,
    hook: str | None = None,
    answer: int | None = None,
    trace: Path | None = None,
    trace_json: bool = False,
    events: int = 0,
) -> float:
    """Of one call."""
    with Process(
        [program, "calls", str(COUNT[engine])],
        ro=[program],
        engine=engine,
        trace=trace,
        trace_json=trace_json,
        events=events,
    ) as process:
        if hook is not None:
            process.on_syscall(hook)(lambda call: answer)
        result = process.run(timeout=100)
    assert result.status == 0
    return int(result.text) / 1e9 / COUNT[engine]


@pytest.mark.parametrize("engine", ["kvm", "soft"])
def bench_looking_at_a_call(
    benchmark: BenchmarkFixture, program: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "kvm":
        need_kvm()
    log = tmp_path / "log"
    ways = {
        "unseen": lambda: seconds(program, engine),
        "others_hooked": lambda: seconds(program, engine, hook="openat"),
        "hooked": lambda: seconds(program, engine, hook="getppid"),
        "answered": lambda: seconds(program, engine, hook="getppid", answer=7),
        "events": lambda: seconds(program, engine, events=1000),
        "traced": lambda: seconds(program, engine, trace=log),
        "traced_json": lambda: seconds(program, engine, trace=log, trace_json=True),
    }
    found = benchmark.pedantic(lambda: turns(TURNS, *ways.values()), rounds=1)
    best = {name: min(times) for name, times in zip(ways, found, strict=True)}
    report(benchmark, **{f"{name}_us": value * 1e6 for name, value in best.items()})
    assert best["others_hooked"] < LIMIT * best["unseen"]
