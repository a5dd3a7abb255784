"""What programs with limits see of the machine in /proc: as much of it as agrees with the limits.

With lxcfs (a file system in user space, Debian's package of that name) running on the host,
meminfo, cpuinfo, stat, loadavg, uptime, swaps and diskstats are its. Otherwise meminfo and cpuinfo
are files of our own, bound over the kernel's: cpuinfo is right for good, meminfo is as right as the
last `refresh()`. Uptime needs no file, as a time namespace has its own (time_namespaces(7)); stat
and loadavg stay the host's, as no file could be right about them. docs/limits.md.
"""

from __future__ import annotations

import os
from math import ceil

from polyvisor._native import Mount
from polyvisor.vps.limits import CgroupStats, Limits, cpu_numbers

#: Where Debian's lxcfs has its files.
LXCFS = "/var/lib/lxcfs"

_LXCFS_FILES = ("cpuinfo", "diskstats", "loadavg", "meminfo", "stat", "swaps", "uptime")


def mounts(limits: Limits, state_dir: str | os.PathLike[str], *, lxcfs: str = LXCFS) -> list[Mount]:
    """What to mount over /proc, to be given to a launch after its "proc".

    Our own files are made in `state_dir`, which has to stay as long as the mounts.
    """
    if os.path.exists(f"{lxcfs}/proc/meminfo"):
        files = {
            name: f"{lxcfs}/proc/{name}"
            for name in _LXCFS_FILES
            if os.path.exists(f"{lxcfs}/proc/{name}")
        }
    else:
        refresh(limits, None, state_dir)
        files = {name: os.path.join(state_dir, name) for name in _own(limits)}
    return [
        Mount("bind", os.path.abspath(source), f"/proc/{name}", read_only=True)
        for name, source in files.items()
    ]


def refresh(limits: Limits, stats: CgroupStats | None, state_dir: str | os.PathLike[str]) -> None:
    """Writes our own files anew, in place, for what is used now (None: nothing yet)."""
    for name, text in _own(limits, stats).items():
        # In place: a bind mount is of the file, not of its name. A reader never sees it empty.
        fd = os.open(os.path.join(state_dir, name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(fd, text.encode(), 0)
            os.ftruncate(fd, len(text.encode()))
        finally:
            os.close(fd)


def _own(limits: Limits, stats: CgroupStats | None = None) -> dict[str, str]:
    files = {}
    if limits.memory is not None:
        with open("/proc/meminfo") as host:
            files["meminfo"] = meminfo(host.read(), limits, stats)
    if limits.cpuset is not None or limits.cpus is not None:
        with open("/proc/cpuinfo") as host:
            files["cpuinfo"] = cpuinfo(host.read(), limits)
    return files


def meminfo(host: str, limits: Limits, stats: CgroupStats | None) -> str:
    """/proc/meminfo with the lines that can be told of a cgroup; those that cannot are left out.

    proc_meminfo(5)
    """
    there = {name: int(rest.split()[0]) for name, _, rest in _lines(host)}
    total = min(there["MemTotal"], (limits.memory_bytes or 1 << 62) >> 10)
    swap = min(there.get("SwapTotal", 0), (limits.swap_bytes or 0) >> 10)
    used = min(total, ((stats.memory if stats else 0) or 0) >> 10)
    cache = min(used, ((stats.memory_cache if stats else 0) or 0) >> 10)
    free = total - used
    values = {
        "MemTotal": total,
        "MemFree": min(free, there["MemFree"]),
        "MemAvailable": min(free + cache, there["MemAvailable"]),
        "Buffers": 0,
        "Cached": cache,
        "SwapCached": 0,
        "SwapTotal": swap,
        "SwapFree": min(swap, there.get("SwapFree", 0)),
        "Shmem": 0,
        "SReclaimable": 0,
    }
    return "".join(f"{name + ':':<16}{value:>8} kB\n" for name, value in values.items())


def cpuinfo(host: str, limits: Limits) -> str:
    """/proc/cpuinfo with only the CPUs of `limits`, numbered from 0: those of `cpuset`, and no more
    than `cpus` can keep busy."""
    blocks = [block for block in host.split("\n\n") if block.startswith("processor")]
    if limits.cpuset is not None:
        chosen = set(cpu_numbers(limits.cpuset))
        blocks = [block for block in blocks if int(_value(block)) in chosen]
    if limits.cpus is not None:
        blocks = blocks[: max(1, ceil(limits.cpus))]
    numbered = []
    for number, block in enumerate(blocks):
        first, newline, rest = block.rstrip("\n").partition("\n")
        numbered.append(f"{first.partition(':')[0]}: {number}{newline}{rest}\n\n")
    return "".join(numbered)


def _value(block: str) -> str:
    return block.partition("\n")[0].partition(":")[2]


def _lines(text: str) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in text.splitlines() if ":" in line]


__all__ = ["LXCFS", "cpuinfo", "meminfo", "mounts", "refresh"]
