"""A figure, as yet without a claim: how long a complete Debian takes to its login prompt on `soft`,
beside QEMU with TCG.

The same image with a throw-away overlay on virtio-blk (PCI), the same kernel (unpacked), initial
RAM disk, command line and memory in each; rounds alternate, medians are compared. Host CPU time, as
a busy host says little by the clock.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import polyvisor
from measure import peer, process_cpu, report
from polyvisor import images
from polyvisor.images import bootable

ROUNDS = 3
MEMORY_MIB = 1024
PROMPT = b"login: "
#: CPU seconds after which a round has failed.
PATIENCE = 300.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """debian.img, from the packages in the cache where they are there."""
    path = tmp_path_factory.mktemp("debian") / "debian.img"
    images.build(path, ssh_keys=[])
    return path


def by_qemu(image: Path, found: bootable.Bootable) -> float:
    """CPU seconds of QEMU to the prompt, without the devices that it adds unasked."""
    command = [
        *(peer("qemu-system-x86_64"), "-M", "q35", "-accel", "tcg,thread=single", "-cpu", "max"),
        *("-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", found.fast_kernel(), "-initrd", found.initrd, "-append", found.cmdline),
        *("-drive", f"file={image},format=raw,if=none,id=disk,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=disk", "-serial", "stdio"),
    ]
    said = b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            while PROMPT not in said:
                if process_cpu(process.pid) > PATIENCE:
                    raise TimeoutError(f"QEMU did not get to the prompt in {PATIENCE:g} CPU s")
                if select.select([process.stdout], [], [], 0.5)[0]:
                    data = os.read(process.stdout.fileno(), 65536)
                    if not data:
                        raise ChildProcessError(f"QEMU ended: {said[-300:]!r}")
                    said = said[-100:] + data
            return process_cpu(process.pid)
        finally:
            process.kill()


def bench_debian_to_the_login_prompt(benchmark: BenchmarkFixture, image: Path) -> None:
    found = bootable.find(image)
    ours: list[float] = []
    seconds: list[float] = []
    theirs: list[float] = []

    def own() -> None:
        cpu, clock = time.process_time(), time.monotonic()
        with polyvisor.Machine(memory=f"{MEMORY_MIB}M", engine="soft") as machine:
            machine.add_disk(image, snapshot=True)
            machine.load_disk(image)
            machine.start()
            machine.console.expect(PROMPT.decode(), timeout=4 * PATIENCE)
            ours.append(time.process_time() - cpu)
            seconds.append(time.monotonic() - clock)

    benchmark.pedantic(own, setup=lambda: theirs.append(by_qemu(image, found)), rounds=ROUNDS)
    report(
        benchmark,
        cpu=statistics.median(ours),
        seconds=statistics.median(seconds),
        cpu_qemu=statistics.median(theirs),
        of_qemu=statistics.median(ours) / statistics.median(theirs),
    )
