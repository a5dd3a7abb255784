"""A disk that is written to at random until its machine's process is killed, again and again; and
whether all that was flushed is there.

Run as a program it does that for a gigabyte: `python tests/virtio/disk_crash.py [MEGABYTES]`.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SLOT, SECTOR, DEPTH = 16384, 512, 8
_MASK = (1 << 64) - 1


def build(directory: Path) -> Path:
    """disk_load for a guest."""
    program = directory / "disk_load"
    subprocess.run(["gcc", "-O2", "-static", "-o", program, HERE / "disk_load.c"], check=True)
    return program


class _Writes:
    """The slots of the writes with one seed, as disk_load.c chooses them."""

    def __init__(self, slots: int, seed: int) -> None:
        self.state = 0x9E3779B97F4A7C15 ^ (seed << 1 & _MASK)
        self.slots = slots

    def _next(self) -> int:
        state = self.state
        state ^= state << 13 & _MASK
        state ^= state >> 7
        state ^= state << 17 & _MASK
        self.state = state
        return state >> 16

    def batch(self) -> list[int]:
        used: list[int] = []
        while len(used) < DEPTH:
            slot = self._next() % self.slots
            while slot in used:
                slot = self._next() % self.slots
            used.append(slot)
        self._next()  # whether it flushes
        return used


@dataclass
class Crashes:
    """An image, and what must be in it."""

    program: Path
    image: Path
    slots: int
    options: dict[str, Any]
    #: How the image is read to be checked.
    raw: bool = True
    kills: int = 0
    #: Writes that were flushed, and flushes.
    writes: int = 0
    flushes: int = 0
    _number: int = 1
    _there: list[int] = field(default_factory=list)  # by sector: the number of the last write

    def __post_init__(self) -> None:
        self._there = [0] * (self.slots * SLOT // SECTOR)

    def kill(self, seconds: float) -> None:
        """Writes for that long (from the first flush on), kills the process, checks the image."""
        self.kills += 1
        first = self._number
        command = [sys.executable, HERE / "disk_vmm.py", self.program, self.image]
        command += [json.dumps(self.options), str(self.slots), str(self.kills), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            said = self._listen(process, seconds)
            os.kill(process.pid, signal.SIGKILL)
            assert process.stdout
            said += process.stdout.read()
        lines = said.split(b"\n")[:-1]  # a line that was cut short acknowledges nothing
        self.flushes += len(lines)
        flushed = max((int(line.split()[1]) for line in lines), default=first - 1)
        self.writes += flushed - first + 1
        self._check(first, flushed)

    def _listen(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout
        said, end = b"", time.monotonic() + 60
        while time.monotonic() < end:
            if not select.select([process.stdout], [], [], 0.02)[0]:
                continue
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                assert process.stderr
                raise AssertionError(f"the machine ended: {process.stderr.read().decode()}")
            if not said:
                end = time.monotonic() + seconds
            said += data
        assert said, "the guest flushed nothing in a minute"
        return said

    def _check(self, first: int, flushed: int) -> None:
        """Every sector has its last flushed write, or one of the same slot after that."""
        per_slot = SLOT // SECTOR
        last = list(self._there)
        later: dict[int, set[int]] = {}
        writes, number = _Writes(self.slots, self.kills), first
        # What was not flushed can be no more than what is in flight and not yet said.
        while number <= flushed + 20_000:
            batch = writes.batch()
            for slot in batch:
                if number <= flushed:
                    last[slot * per_slot : (slot + 1) * per_slot] = [number] * per_slot
                else:
                    later.setdefault(slot, set()).add(number)
                number += 1
        highest = flushed
        with self._reading() as file:
            for sector in range(len(last)):
                data = file.read(SECTOR)
                found, slot = struct.unpack_from("<QQ", data)
                mine = sector // per_slot
                if found != last[sector] and found not in later.get(mine, ()):
                    raise AssertionError(
                        f"kill {self.kills}: sector {sector} has write {found}; write "
                        f"{last[sector]} was flushed (all up to {flushed} were)"
                    )
                assert found == 0 or slot == mine
                self._there[sector] = found
                highest = max(highest, found)
        self._number = highest + 1

    def _reading(self) -> Any:
        if self.raw:
            return self.image.open("rb")
        # qemu-nbd notices that its client is gone, and lets go of the image.
        check = ["qemu-img", "check", "-q", self.image]
        end = time.monotonic() + 20
        while subprocess.run(check, check=False, capture_output=True).returncode:
            if time.monotonic() > end:
                subprocess.run(check, check=True)
            time.sleep(0.1)
        flat = self.image.with_suffix(".flat")
        subprocess.run(["qemu-img", "convert", "-O", "raw", self.image, flat], check=True)
        return flat.open("rb")


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        image = directory / "disk.img"
        slots = (64 << 20) // SLOT
        with image.open("wb") as file:
            file.truncate(slots * SLOT)
        crashes = Crashes(build(directory), image, slots, {})
        source, start = random.Random(1), time.monotonic()
        while crashes.writes * SLOT < megabytes << 20:
            crashes.kill(source.uniform(0.2, 3))
            done = crashes.writes * SLOT >> 20
            print(f"{crashes.kills} kills: {done} MiB flushed, nothing lost", flush=True)
        print(
            f"{crashes.kills} kills, {crashes.flushes} flushes, {crashes.writes * SLOT >> 20} MiB "
            f"of random writes in {time.monotonic() - start:.0f} s: nothing flushed was lost"
        )


if __name__ == "__main__":
    main()
