"""Claim: `polyvisor exec --engine kvm -- true` reaches the guest's /init in at most 0.8 times the
wall time that QEMU takes with KVM, from the start of the process on.

The same kernel, initrd and command line in both, everything cached; rounds alternate, medians are
compared. It wants a KVM with nothing else going on beside it: `make bench-kvm` runs it in the rig.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import peers
from measure import report
from polyvisor import kvm_probe

LIMIT = 0.8
ROUNDS = 3
#: In an emulated PC on a host that is busy, a boot may take a minute.
PATIENCE = 300.0

#: Million instructions per second at ring 0; less is no hardware, and a boot takes an hour.
HARDWARE = 50.0


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> peers.Guest:
    """What both boot; skips where there is no KVM that is worth its name."""
    found = kvm_probe.probe()
    if found.reason:
        pytest.skip(found.sentence)
    if (found.mips or 0) < HARDWARE:
        pytest.skip("this /dev/kvm emulates ring 0; `make bench-kvm` has a better one")
    return peers.guest(tmp_path_factory.mktemp("guest"))


#: The program `polyvisor`, as installers make it of the entry in pyproject.toml. (A wheel that is
#: only unpacked has none.)
PROGRAM = "import sys\nfrom polyvisor.cli import main\nsys.exit(main())\n"


class Exec:
    """`polyvisor exec --engine kvm -- echo ...`, again and again.

    From outside /init cannot be seen. What can is the first output of the command, which init
    starts: that is later, to our disadvantage.
    """

    SAID = b"there"

    def __init__(self, directory: Path, *options: str) -> None:
        program = directory / "polyvisor"
        program.write_text(PROGRAM)
        command = [sys.executable, str(program), "exec", "--engine", "kvm"]
        self.command = [*command, *options, "--", "echo", self.SAID.decode()]
        self.to_init: list[float] = []

    def __call__(self) -> None:
        start, said = time.monotonic(), b""
        with subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdout is not None
                while self.SAID not in said:
                    left = start + PATIENCE - time.monotonic()
                    if not select.select([process.stdout], [], [], max(left, 0))[0]:
                        raise TimeoutError(f"polyvisor did not get to /init in {PATIENCE:g} s")
                    data = os.read(process.stdout.fileno(), 4096)
                    if not data:
                        raise ChildProcessError("polyvisor ended before /init")
                    said += data
                self.to_init.append(time.monotonic() - start)
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()


@pytest.mark.parametrize("image", ["unpacked", "bzimage"])
@pytest.mark.timeout(8 * PATIENCE)
def bench_kvm_boot_beside_qemu(
    benchmark: BenchmarkFixture, guest: peers.Guest, image: str, tmp_path: Path
) -> None:
    """`unpacked`: QEMU is given the kernel that exec unpacks by itself, once; `bzimage`: both have
    the guest unpack it."""
    path: Path = getattr(guest, image)
    ours = Exec(tmp_path, *(() if image == "unpacked" else ("--kernel", str(path))))
    theirs: list[float] = []

    def qemu() -> None:
        theirs.append(peers.qemu_kvm(guest, path, PATIENCE))

    # Once each, so that every file is in memory.
    qemu()
    ours()
    theirs.clear()
    ours.to_init.clear()
    benchmark.pedantic(ours, setup=qemu, rounds=ROUNDS)
    own, qemus = statistics.median(ours.to_init), statistics.median(theirs)
    report(
        benchmark,
        wall_to_init=own,
        qemu_wall_to_init=qemus,
        ratio=own / qemus,
        limit=LIMIT,
    )
    assert own <= LIMIT * qemus, f"{own:.2f} s to /init, QEMU {qemus:.2f} s"
