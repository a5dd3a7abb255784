"""Claims: start and end of a static program that does nothing, in all namespaces, with limits of
memory, CPU time and processes and with a system call filter, takes at most 0.5 of what bubblewrap
takes (without limits and filter), 0.1 of runc, and 1.3 of a bare unshare. Two at a time there are
at least 400 a second. To enter a running one takes at most 3 ms.

Medians of wall time, in turns with the peers; without root there are no limits."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from measure import peer, report
from polyvisor import _native, sandbox
from process_peers import bubblewrap, median_ratio, spawn, turns

TURNS = 60
RUNC_TURNS = 10
SECONDS = 3.0
LIMITS = {"memory": "256M", "cpus": 1.0, "pids": 100} if os.geteuid() == 0 else {}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sandbox")
    path = folder / "true"
    subprocess.run(
        [peer("cc"), "-O2", "-static", "-x", "c", "-o", path, "-"],
        input=b"int main(void) { return 0; }",
        check=True,
    )
    return path


def start(program: Path) -> float:
    """Wall seconds."""
    before = time.perf_counter()
    result = sandbox(["/tmp/true"], ro=[(program, "/tmp/true")], **LIMITS)  # type: ignore[arg-type]
    after = time.perf_counter()
    assert result.status == 0
    return after - before


def bench_start(benchmark: BenchmarkFixture, program: Path) -> None:
    start(program)
    unshare = [peer("unshare"), *(["-r"] if os.geteuid() else []), "-mpfuin", program]
    with bubblewrap(filtered=False) as (wrapped, _):
        ours, bwrap, bare = benchmark.pedantic(
            lambda: turns(
                TURNS,
                lambda: start(program),
                lambda: spawn([*wrapped, program]),
                lambda: spawn(unshare),
            ),
            rounds=1,
        )
    of_bwrap, of_unshare = median_ratio(ours, bwrap), median_ratio(ours, bare)
    report(
        benchmark,
        sandbox_ms=statistics.median(ours) * 1e3,
        bubblewrap_ms=statistics.median(bwrap) * 1e3,
        unshare_ms=statistics.median(bare) * 1e3,
        of_bubblewrap=of_bwrap,
        of_unshare=of_unshare,
    )
    assert of_bwrap <= 0.5
    assert of_unshare <= 1.3


@pytest.mark.needs_root
def bench_runc(benchmark: BenchmarkFixture, program: Path) -> None:
    bundle = program.parent / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    subprocess.run(["cp", program, bundle / "rootfs/true"], check=True)
    subprocess.run([peer("runc"), "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["/true"]}
    (bundle / "config.json").write_text(json.dumps(config))
    command: list[str | Path] = [peer("runc"), "run", "--bundle", bundle, f"bench-{os.getpid()}"]
    trial = subprocess.run(command, capture_output=True, text=True)
    if trial.returncode != 0:
        pytest.skip(f"runc does not work here: {trial.stderr.strip()}")
    start(program)
    ours, runc = benchmark.pedantic(
        lambda: turns(RUNC_TURNS, lambda: start(program), lambda: spawn(command)), rounds=1
    )
    ratio = median_ratio(ours, runc)
    report(benchmark, runc_ms=statistics.median(runc) * 1e3, of_runc=ratio)
    assert ratio <= 0.1


def bench_two_at_a_time(benchmark: BenchmarkFixture, program: Path) -> None:
    start(program)

    def work(counts: list[int], end: float) -> None:
        count = 0
        while time.perf_counter() < end:
            start(program)
            count += 1
        counts.append(count)

    def run() -> float:
        counts: list[int] = []
        end = time.perf_counter() + SECONDS
        threads = [threading.Thread(target=work, args=(counts, end)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / SECONDS

    rate = benchmark.pedantic(run, rounds=1)
    report(benchmark, per_second=rate)
    assert rate >= 400


def bench_enter(benchmark: BenchmarkFixture, program: Path) -> None:
    ids = [(os.geteuid(), os.geteuid(), 1)], [(os.getegid(), os.getegid(), 1)]
    common = {"uid": os.geteuid(), "gid": os.getegid(), "uid_map": ids[0], "gid_map": ids[1]}
    mounts = [
        _native.Mount("tmpfs", target="/tmp"),
        _native.Mount("bind", str(program), "/tmp/true"),
        _native.Mount("proc", target="/proc"),
    ]
    idle = _native.LaunchSpec([], read_only_root=True, mounts=mounts, **common)  # type: ignore[arg-type]
    entering = _native.LaunchSpec(["/tmp/true"], **common)  # type: ignore[arg-type]

    def enter(running: _native.Launched) -> float:
        before = time.perf_counter()
        with _native.attach(running.pidfd, entering) as attached:
            attached.go()
            assert attached.wait(30) == 0
        return time.perf_counter() - before

    with _native.launch(idle) as running:
        running.go()
        enter(running)
        [times] = benchmark.pedantic(lambda: turns(TURNS, lambda: enter(running)), rounds=1)
    found = statistics.median(times)
    report(benchmark, enter_ms=found * 1e3)
    assert found <= 3e-3
