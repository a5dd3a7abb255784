"""Claims: while the CPU is an interpreter, a guest sends to its host, receives from it and
exchanges single bytes with it by user networking at least 0.4 times as fast as in QEMU with TCG
(same kernel, driver and program, turn by turn). And of a frame, at most 6 us of the host's time are
not the CPU engine's, which virtio_net.cpp measures without one."""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import polyvisor
from measure import peer, report
from polyvisor.guest.command import DEFAULT_CMDLINE
from polyvisor.images import initramfs, kernel, modules, vmlinux

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "virtio"))
from net_peers import serving

NATIVE = Path(__file__).parent.parent / "native"
LEAST_RATIO = 0.4
MOST_MICROSECONDS = 6.0
#: Bytes, or exchanges, of each measurement.
AMOUNT = {"send": 64 << 20, "receive": 64 << 20, "echo": 3000}


class Host:
    """Measures what comes, goes, or comes back; MB, or exchanges, per second."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        self.done = threading.Semaphore(0)

    def send(self, connection: socket.socket) -> None:
        total, begin = len(connection.recv(1 << 18)), time.perf_counter()
        first = total
        while data := connection.recv(1 << 18):
            total += len(data)
        self._note("send", (total - first) / 1e6, begin)

    def receive(self, connection: socket.socket) -> None:
        begin = time.perf_counter()
        connection.sendall(bytes(AMOUNT["receive"]))
        assert connection.recv(1) == b"\0"
        self._note("receive", AMOUNT["receive"] / 1e6, begin)

    def echo(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begin = time.perf_counter()
        for _ in range(AMOUNT["echo"]):
            connection.send(b"x")
            assert connection.recv(1) == b"x"
        self._note("echo", AMOUNT["echo"], begin)

    def _note(self, what: str, amount: float, begin: float) -> None:
        self.rates[what] = amount / (time.perf_counter() - begin)
        self.done.release()


@contextlib.contextmanager
def measured() -> Iterator[tuple[Host, str]]:
    """The host's side, and the guest's script that does all three."""
    host = Host()
    with serving(host.send, host.receive, host.echo) as ports:
        calls = [
            f"/net_pair {what} 10.0.2.2 {port} {AMOUNT[what]}"
            for what, port in zip(AMOUNT, ports, strict=True)
        ]
        script = "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; sleep 0.2; "
        yield host, script + "; ".join(calls)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("net") / "net_pair"
    source = Path(__file__).with_name("net_pair.c")
    subprocess.run(["gcc", "-O2", "-static", "-o", path, source], check=True)
    return path.read_bytes()


def ours(program: bytes) -> dict[str, float]:
    with measured() as (host, script):
        polyvisor.exec(
            ["sh", "-c", script],
            files={"/net_pair": program},
            engine="soft",
            memory="256M",
            on_machine=lambda machine: machine.add_net(),
            check=True,
        )
    return host.rates


def qemu(program: bytes, directory: Path, limit: float = 120) -> dict[str, float]:
    cloud = kernel.fetch("cloud")
    wanted = modules.fetch("cloud")[1].closure(["virtio_pci", "virtio_net"])
    initrd = directory / "initrd"
    with measured() as (host, script):
        command = initramfs.Command(["sh", "-c", script])
        initrd.write_bytes(initramfs.build(command, files={"/net_pair": program}, modules=wanted))
        arguments = [
            *(peer("qemu-system-x86_64"), "-M", "q35", "-accel", "tcg,thread=single"),
            *("-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-kernel", str(vmlinux.cached(cloud.image)), "-initrd", str(initrd)),
            *("-append", DEFAULT_CMDLINE, "-serial", "null", "-serial", "null"),
            *("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"),
        ]
        with subprocess.Popen(arguments, stdin=subprocess.DEVNULL) as process:
            try:
                for _ in AMOUNT:
                    assert host.done.acquire(timeout=limit)
            finally:
                process.kill()
    return host.rates


def bench_user_network(benchmark: BenchmarkFixture, program: bytes, tmp_path: Path) -> None:
    mine, theirs = [], []

    def turn() -> None:
        mine.append(ours(program))
        theirs.append(qemu(program, tmp_path))

    benchmark.pedantic(turn, rounds=3)
    figures: dict[str, float] = {}
    for what in AMOUNT:
        own = statistics.median(rates[what] for rates in mine)
        other = statistics.median(rates[what] for rates in theirs)
        figures |= {what: own, f"{what} in tcg": other, f"{what} ratio": own / other}
    report(benchmark, unit="MB/s, exchanges/s", **figures, limit=LEAST_RATIO)
    assert min(figures[f"{what} ratio"] for what in AMOUNT) >= LEAST_RATIO


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """virtio_net.cpp, with the parts of the core that it needs."""
    program = tmp_path_factory.mktemp("net") / "virtio_net"
    virtio = ("net", "net_control", "net_filter", "device", "fake_driver", "fake_guest")
    rings = ("queue", "split_queue", "packed_queue", "chain")
    sources = [NATIVE / "virtio" / f"{name}.cpp" for name in (*virtio, *rings)]
    for folder in ("net", "bus", "memory", "base"):
        sources += sorted((NATIVE / folder).glob("*.cpp"))
    tests = NATIVE.parent / "tests" / "native"
    flags = ["-std=gnu++20", "-O2", "-DNDEBUG", "-fno-tree-slp-vectorize"]
    flags += [f"-I{NATIVE}", f"-I{tests}"]
    inputs = [str(Path(__file__).with_name("virtio_net.cpp")), *map(str, sources)]
    command = [peer("c++"), *flags, "-o", str(program), *inputs, "-pthread"]
    subprocess.run(command, check=True, timeout=300)
    return program


@pytest.mark.parametrize("what", ["user", "send", "segments", "receive"])
def bench_host_time(benchmark: BenchmarkFixture, alone: Path, what: str) -> None:
    """The best of turns."""
    count = 4000 if what == "segments" else 100_000

    def cost() -> float:
        command = [str(alone), what, str(count)]
        runs = [subprocess.run(command, check=True, capture_output=True) for _ in range(5)]
        return min(float(run.stdout) for run in runs) / 1000

    found = benchmark.pedantic(cost, rounds=1)
    report(benchmark, unit="us", frame=found, limit=MOST_MICROSECONDS)
    assert found <= MOST_MICROSECONDS
