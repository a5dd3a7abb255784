"""Claim: a guest gets at least ten times as many random bytes from virtio-rng, which is written in
Python here, as from QEMU's with TCG: same kernel, driver and command, turn by turn, by the guest's
clock.

Linux's driver asks for 64 bytes at a time, so this is the way of a request there and back.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

import polyvisor
from measure import peer, report
from polyvisor.guest.command import DEFAULT_CMDLINE
from polyvisor.images import initramfs, kernel, modules, vmlinux

LEAST_RATIO = 10.0
#: Prints the bytes, and the times before and after in seconds.
SCRIPT = """
uptime() { cut -d' ' -f1 /proc/uptime; }
before=$(uptime)
dd if=/dev/hwrng of=/dev/null bs=64k count=%d iflag=fullblock 2>/dev/null
echo "GOT %d $before $(uptime) END"
"""
_BLOCK = 1 << 16
_RESULT = re.compile(rb"GOT (\d+) ([\d.]+) ([\d.]+) END")


def script(blocks: int) -> str:
    return SCRIPT % (blocks, blocks * _BLOCK)


def _rate(said: bytes) -> float:
    """Bytes per second."""
    found = _RESULT.search(said)
    assert found, said[-500:]
    count, before, after = map(float, found.groups())
    return count / (after - before)


def ours() -> float:
    done = polyvisor.exec(
        ["sh", "-c", script(300)],
        engine="soft",
        memory="256M",
        on_machine=lambda machine: machine.add_rng(),
        check=True,
    )
    return _rate(done.stdout)


def qemu(directory: Path, limit: float = 120) -> float:
    """The same in QEMU, whose init says what the command said on the second serial port."""
    wanted = modules.fetch("cloud")[1].closure(["virtio_pci", "virtio_rng"])
    initrd = directory / "initrd"
    command = initramfs.Command(["sh", "-c", script(16)])
    initrd.write_bytes(initramfs.build(command, modules=wanted))
    line = [
        *(peer("qemu-system-x86_64"), "-M", "q35", "-accel", "tcg,thread=single", "-cpu", "max"),
        *("-m", "256", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", str(vmlinux.cached(kernel.fetch("cloud").image)), "-initrd", str(initrd)),
        *("-append", DEFAULT_CMDLINE, "-serial", "null", "-serial", "stdio"),
        *("-object", "rng-random,filename=/dev/urandom,id=r", "-device", "virtio-rng-pci,rng=r"),
    ]
    said, end = b"", time.monotonic() + limit
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            while not _RESULT.search(said) and time.monotonic() < end:
                data = process.stdout.read1(65536)
                if not data:
                    break
                said += data
        finally:
            process.kill()
    return _rate(said)


def bench_random_bytes(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    mine, theirs = [], []

    def turn() -> None:
        mine.append(ours())
        theirs.append(qemu(tmp_path))

    benchmark.pedantic(turn, rounds=3)
    own, other = statistics.median(mine), statistics.median(theirs)
    report(benchmark, own=own, tcg=other, ratio=own / other, limit=LEAST_RATIO)
    assert own >= LEAST_RATIO * other
