"""What the benchmarks of process VMs share: their program (process_program.c), and others that run
it: the host itself, strace, bubblewrap with a system call filter."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from measure import children_cpu, peer
from polyvisor import kvm_probe

#: Calls that containers commonly deny: add_key, bpf, delete_module, init_module, kexec_load,
#: keyctl, mount, move_pages, open_by_handle_at, perf_event_open, pivot_root, process_vm_readv,
#: process_vm_writev, ptrace, reboot, request_key, setns, swapoff, swapon, umount2, unshare,
#: userfaultfd.
DENIED = (248, 321, 176, 175, 246, 250, 165, 279, 304, 298, 155, 310, 311, 101, 169, 249, 308, 168)
DENIED += (167, 166, 272, 323)


def need_kvm() -> None:
    """Skips where there is no KVM."""
    found = kvm_probe.probe()
    if found.reason:
        pytest.skip(found.sentence)


def build(folder: Path) -> Path:
    program = folder / "process_program"
    source = Path(__file__).with_name("process_program.c")
    subprocess.run([peer("cc"), "-O2", "-static", "-o", program, source], check=True)
    return program


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Everything on one CPU, which what is started inherits."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def output_of(command: list[str | Path], **more: object) -> str:
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]
    return str(run.stdout)


def cpu_of(command: list[str | Path]) -> float:
    """Seconds of CPU time."""
    before = children_cpu()
    output_of(command)
    return children_cpu() - before


def spawn(command: list[str | Path], **more: object) -> float:
    """Wall seconds from before it is started to after it has ended."""
    arguments = [os.fspath(word) for word in command]
    before = time.perf_counter()
    pid = os.posix_spawn(arguments[0], arguments, os.environ, **more)  # type: ignore[arg-type]
    _, status = os.waitpid(pid, 0)
    after = time.perf_counter()
    assert status == 0
    return after - before


def under_strace() -> list[str | Path]:
    return [peer("strace"), "-f", "-o", "/dev/null", "--"]


def seccomp_filter(denied: tuple[int, ...] = DENIED) -> bytes:
    """A program for the kernel's classic BPF (seccomp(2)) that denies these calls with EPERM."""
    load, jump, jump_from, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    x86_64, x32 = 0xC000003E, 0x40000000
    count = len(denied)
    code = [
        (load, 0, 0, 4),  # its architecture
        (jump, 1, 0, x86_64),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # its number
        (jump_from, count + 1, 0, x32),
        *((jump, count - n, 0, number) for n, number in enumerate(denied)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


@contextlib.contextmanager
def bubblewrap(*, filtered: bool) -> Iterator[tuple[list[str | Path], dict[str, object]]]:
    """A command line to put before another one, and what subprocess.run() needs for it. Skips where
    bubblewrap cannot make what it needs."""
    if platform.machine() != "x86_64":
        pytest.skip("the system call filter is for x86-64")
    command: list[str | Path] = [peer("bwrap"), "--unshare-all", "--ro-bind", "/", "/"]
    trial = subprocess.run([*command, "--", "/bin/true"], capture_output=True, text=True)
    if trial.returncode != 0:
        pytest.skip(f"bubblewrap does not work here: {trial.stderr.strip()}")
    if not filtered:
        yield [*command, "--"], {}
        return
    fd = os.memfd_create("filter", 0)
    try:
        os.write(fd, seccomp_filter())
        yield (
            [*command, "--seccomp", str(fd), "--"],
            {"pass_fds": (fd,), "preexec_fn": lambda: os.lseek(fd, 0, os.SEEK_SET)},
        )
    finally:
        os.close(fd)


def turns(count: int, *measures: Callable[[], float]) -> list[list[float]]:
    """What each of them found, in turns, so that what the host does meanwhile hits all alike."""
    rounds = [[measure() for measure in measures] for _ in range(count)]
    return [list(column) for column in zip(*rounds, strict=True)]


def median_ratio(one: list[float], other: list[float]) -> float:
    """Of turns."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))
