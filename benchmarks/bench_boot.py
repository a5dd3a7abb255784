"""Claim: `polyvisor exec -- true` on `soft` takes at most 2.5 times the host CPU time to the
guest's /init that QEMU takes with TCG, and Bochs takes at least 5 times ours.

The same kernel, initramfs, command line and memory in each; rounds alternate, medians are compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import peers
from measure import POLYVISOR, children_cpu, report

QEMU_LIMIT = 2.5
BOCHS_FACTOR = 5.0
ROUNDS = 5
#: CPU seconds after which Bochs is stopped; the factor is then a lower bound.
BOCHS_PATIENCE = 60.0


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> peers.Guest:
    return peers.guest(tmp_path_factory.mktemp("guest"))


class Exec:
    """`polyvisor exec -- true`, again and again."""

    def __init__(self, *options: str) -> None:
        self.command = [
            str(POLYVISOR),
            "exec",
            "--engine",
            "soft",
            "--json",
            *options,
            "--",
            "true",
        ]
        self.to_init: list[float] = []
        self.whole: list[float] = []

    def __call__(self) -> None:
        before = children_cpu()
        done = subprocess.run(
            self.command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120
        )
        result = json.loads(done.stdout)
        self.whole.append(children_cpu() - before)
        # From the start of the process to its end, without what came between init and the
        # command's end. What the process's own end costs is in it, to our disadvantage.
        after_init = result["cpu_seconds"] - result["boot_cpu_seconds"]
        self.to_init.append(self.whole[-1] - after_init)


@pytest.mark.benchmark(timer=children_cpu)
@pytest.mark.parametrize("image", ["unpacked", "bzimage"])
def bench_boot_beside_qemu(benchmark: BenchmarkFixture, guest: peers.Guest, image: str) -> None:
    """`unpacked` is what exec does by itself; `bzimage` has the guest unpack its kernel."""
    path: Path = getattr(guest, image)
    ours = Exec() if image == "unpacked" else Exec("--kernel", str(path))
    theirs: list[float] = []

    def qemu() -> None:
        boot = peers.qemu(guest, path)
        assert boot.ready, f"QEMU did not get to /init in {boot.cpu:.1f} CPU seconds"
        theirs.append(boot.cpu)

    benchmark.pedantic(ours, setup=qemu, rounds=ROUNDS)
    own, qemus = statistics.median(ours.to_init), statistics.median(theirs)
    report(
        benchmark,
        cpu_to_init=own,
        cpu_whole_command=statistics.median(ours.whole),
        qemu_cpu_to_init=qemus,
        ratio=own / qemus,
        limit=QEMU_LIMIT,
    )
    assert own <= QEMU_LIMIT * qemus, f"{own:.2f} CPU seconds to /init, QEMU {qemus:.2f}"


@pytest.mark.benchmark(timer=children_cpu)
def bench_boot_beside_bochs(
    benchmark: BenchmarkFixture, guest: peers.Guest, tmp_path: Path
) -> None:
    ours = Exec("--kernel", str(guest.bzimage))
    theirs: list[peers.Boot] = []

    def bochs() -> None:
        if not theirs:
            theirs.append(peers.bochs(guest, tmp_path, BOCHS_PATIENCE))

    benchmark.pedantic(ours, setup=bochs, rounds=3)
    boot, own = theirs[0], statistics.median(ours.to_init)
    report(
        benchmark,
        cpu_to_init=own,
        bochs_cpu=boot.cpu,
        bochs_reached_init=boot.ready,
        factor=boot.cpu / own,
        limit=BOCHS_FACTOR,
    )
    if not boot.ready:
        assert boot.cpu >= BOCHS_PATIENCE, f"Bochs ended early; its console:\n{boot.console}"
    assert boot.cpu >= BOCHS_FACTOR * own, f"Bochs {boot.cpu:.1f} CPU seconds, ours {own:.2f}"


def bench_exec_true(benchmark: BenchmarkFixture) -> None:
    """Wall time from the shell's point of view; no limit of its own, and subject to other load."""
    ours = Exec()
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    report(benchmark, cpu_whole_command=statistics.median(ours.whole[1:]))
