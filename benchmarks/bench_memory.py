"""Claim: a process that runs `exec -- true` has at most 60 MB resident beyond the RAM that the
guest has touched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from measure import report

LIMIT_MB = 60.0
#: What guest memory is called in /proc/self/maps.
GUEST = "/memfd:polyvisor"
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \S+ *(.*)")


def resident() -> dict[str, int]:
    """Resident bytes of this process by kind: guest, heap (all that has no file), files, kernel
    (the guest's, whose file is mapped while it is loaded)."""
    kinds: dict[str, int] = defaultdict(int)
    kind = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            name = mapping.group(2)
            if name.startswith(GUEST):
                kind = "guest"
            elif Path(name).name.startswith("vmlinu"):
                kind = "kernel"
            else:
                kind = "files" if name.startswith("/") else "heap"
        elif line.startswith("Rss:"):
            kinds[kind] += int(line.split()[1]) << 10
    return dict(kinds)


def sampled() -> None:
    """Runs in a process of its own: prints the fullest sample of those taken while the guest ran,
    and what was resident before there was a machine."""
    import polyvisor

    samples: list[dict[str, int]] = []

    def sample(*_: object) -> None:
        samples.append(resident())

    sample()
    polyvisor.exec(["true"], engine="soft", timeout=120, on_start=sample, on_idle=sample)
    fullest = max(samples[1:], key=beyond)
    print(json.dumps({"before": samples[0], "fullest": fullest}))


def beyond(sample: dict[str, int]) -> int:
    return sum(sample.values()) - sample["guest"]


def bench_resident(benchmark: BenchmarkFixture) -> None:
    """MB are 10^6 bytes. The samples begin when the machine starts: while the kernel is being
    copied to the guest, for some 40 ms, its file's pages are mapped too."""

    def run() -> dict[str, dict[str, int]]:
        done = subprocess.run(
            [sys.executable, __file__], check=True, capture_output=True, timeout=120
        )
        result: dict[str, dict[str, int]] = json.loads(done.stdout)
        return result

    result = benchmark.pedantic(run, rounds=1)
    fullest, before = result["fullest"], result["before"]
    excess = beyond(fullest) / 1e6
    report(
        benchmark,
        mb_beyond_guest=excess,
        limit=LIMIT_MB,
        guest_mb=fullest["guest"] / 1e6,
        # What it consists of: private memory, and pages of programs and libraries.
        heap_mb=fullest["heap"] / 1e6,
        files_mb=fullest["files"] / 1e6,
        kernel_file_mb=fullest.get("kernel", 0) / 1e6,
        imported_mb=sum(before.values()) / 1e6,
    )
    assert fullest["guest"] > 20e6, "the guest's memory was not recognized"
    assert excess <= LIMIT_MB, f"{excess:.1f} MB beyond the guest's"


if __name__ == "__main__":
    sampled()
