"""The balloon: what it takes from the guest, the host has back."""

from __future__ import annotations

import random
import struct
import threading
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

import polyvisor
from polyvisor.errors import ConfigError, MemoryRangeError
from polyvisor.virtio.balloon import Balloon, ranges
from polyvisor.virtio.testing import FakeGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    from polyvisor.machine import Machine

INFLATE, DEFLATE, STATISTICS, REPORT = range(4)
PAGE = 4096


def resident() -> int:
    """Bytes of memory files that this process has in memory."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssShmem:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no RssShmem in /proc/self/status")


def pages(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize("seed", range(10))
def test_ranges_are_the_pages(seed: int) -> None:
    rng = random.Random(seed)
    numbers = [rng.randrange(100) for _ in range(rng.randrange(80))]
    found = list(ranges(array("I", numbers)))
    covered = [
        page for start, size in found for page in range(start // PAGE, (start + size) // PAGE)
    ]
    assert covered == sorted(set(numbers))
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(found)), "all joined"


@pytest.mark.parametrize("packed", [False, True])
def test_inflating_gives_memory_back(packed: bool) -> None:
    balloon = Balloon()
    with FakeGuest(balloon, memory="64M", packed=packed) as guest:
        guest.memory.write(16 << 20, b"\xaa" * (32 << 20))
        before = resident()
        numbers = list(range(4096, 4096 + 8192))
        random.Random(1).shuffle(numbers)
        for at in range(0, len(numbers), 256):
            guest.request(INFLATE, pages(numbers[at : at + 256]))
        assert before - resident() > 31 << 20
        assert balloon.inflated_bytes == 32 << 20
        assert guest.memory.read((16 << 20) + 5, 4) == bytes(4)
        guest.request(DEFLATE, pages(numbers[:256]))
        guest.memory.write(16 << 20, b"again")
        assert guest.memory.read(16 << 20, 5) == b"again"


def test_reported_pages_are_given_back() -> None:
    balloon = Balloon()
    with FakeGuest(balloon, memory="16M") as guest:
        guest.memory.write(0x40000, b"\xaa" * (8 << 20))
        before = resident()
        guest.offer(REPORT, b"", [2 << 20, 1 << 20])
        guest.kick(REPORT)
        used = guest.wait(REPORT)
        assert used is not None
        assert used[2] == 0
        assert before - resident() > 5 << 19
        # (Where the buffers are is FakeGuest's choice, and not aligned to pages.)
        assert (3 << 20) - 4 * PAGE <= balloon.reported_bytes <= 3 << 20


def test_without_statistics_the_reporting_queue_is_the_third() -> None:
    balloon = Balloon()
    with FakeGuest(balloon, memory="16M", features=~(1 << 1)) as guest:
        guest.offer(2, b"", 1 << 20)
        guest.kick(2)
        assert guest.wait(2) is not None
        assert balloon.reported_bytes > 0
        assert balloon.statistics() == {}


def test_guests_that_lie() -> None:
    balloon = Balloon()
    with FakeGuest(balloon, memory="1M") as guest:
        for data in (b"", b"\1", pages([0xFFFFFFFF, 256, 1 << 31]), pages([9] * 100) + b"ab"):
            guest.request(INFLATE, data or [], into=1)
        guest.request(DEFLATE, b"x")
        assert balloon.inflated_bytes == PAGE
        assert not guest.needs_reset


def test_target_and_actual() -> None:
    balloon = Balloon("1M")
    balloon.target = "2M"
    with FakeGuest(balloon) as guest:
        assert guest.read_config(0, 8) == struct.pack("<II", 512, 0)
        balloon.target = (3 << 20) + 5
        assert balloon.target == 3 << 20
        assert guest.config_interrupts == 1
        guest.write_config(0, struct.pack("<II", 1, 700))
        assert balloon.actual == 700 * PAGE
        assert guest.read_config(0, 4) == struct.pack("<I", 768), "that is not the driver's"
    with pytest.raises(ConfigError, match="16 TiB"):
        balloon.target = 1 << 44
    with pytest.raises(ConfigError, match="cannot read target"):
        Balloon("a lot")
    with pytest.raises(ConfigError, match="every 0 s"):
        Balloon(interval=0)


def statistics(free: int) -> bytes:
    return struct.pack("<HQHQHQ", 4, free, 5, 1 << 30, 999, 1) + b"tail"


def test_statistics_are_asked_for() -> None:
    balloon = Balloon()
    with FakeGuest(balloon) as guest:
        assert balloon.statistics(0) == {}
        guest.offer(STATISTICS, statistics(100))
        guest.kick(STATISTICS)

        def answer() -> None:
            assert guest.wait(STATISTICS) is not None
            guest.offer(STATISTICS, statistics(200))
            guest.kick(STATISTICS)

        driver = threading.Thread(target=answer)
        driver.start()
        assert balloon.statistics(10) == {"free": 200, "total": 1 << 30}
        driver.join()
        guest.pause()  # the buffer is in the ring, not in the device
        state = guest.save()
        guest.restore(state)
        guest.resume()
        assert balloon.queue(STATISTICS).outstanding == 0
        driver = threading.Thread(target=answer)
        driver.start()
        assert balloon.statistics(10)["free"] == 200
        driver.join()
        assert balloon.statistics(0)["free"] == 200, "a driver that does not answer"


def test_statistics_at_an_interval() -> None:
    balloon = Balloon(interval=0.01)
    with FakeGuest(balloon) as guest:
        for n in range(5):
            guest.offer(STATISTICS, statistics(n))
            guest.kick(STATISTICS)
            assert guest.wait(STATISTICS) is not None
        guest.restart()
    assert threading.active_count() < 50
    assert balloon.statistics()["free"] == 4


# --- Linux's driver -----------------------------------------------------------------------------


def in_guest(
    script: str, add: Callable[[Machine], Balloon], on_idle: Callable[[Balloon, bytes], None]
) -> str:
    """Runs a script; `on_idle` gets the balloon and what the script has said so far."""
    balloons: list[Balloon] = []
    said = bytearray()
    polyvisor.exec(
        ["sh", "-ec", script],
        engine="soft",
        timeout=100,
        on_machine=lambda machine: balloons.append(add(machine)),
        on_stdout=said.extend,
        on_idle=lambda: on_idle(balloons[0], said),
        check=True,
    )
    return said.decode()


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.parametrize(("transport", "packed"), [("pci", False), ("mmio", True)])
def test_linux_inflates_and_deflates(transport: str, packed: bool) -> None:
    """The script waits until the host has seen what it wants to see, by the size of the balloon."""
    seen: dict[str, object] = {}
    script = """
        meminfo() { awk '/MemFree/ { print $2 }' /proc/meminfo; }
        dd if=/dev/zero of=/tmp/big bs=1M count=200 2>/dev/null; rm /tmp/big
        before=$(meminfo); echo ready
        until_gone() {  # until $1 kB are, $2 than that
            for i in $(seq 200); do
                gone=$((before - $(meminfo)))
                [ $gone $2 $1 ] && break
                sleep 0.1
            done
            echo $gone
        }
        until_gone 180000 -gt
        until_gone 20000 -lt
    """

    def on_idle(balloon: Balloon, said: bytes) -> None:
        if "full" not in seen:
            if said == b"ready\n":
                seen.update(full=resident(), statistics=balloon.statistics())
                balloon.target = "200M"
        elif "small" not in seen and balloon.actual == 200 << 20 and said.count(b"\n") == 2:
            seen["small"] = resident()
            balloon.target = 0

    text = in_guest(
        script,
        lambda machine: machine.add_balloon(
            transport=transport, packed=packed, free_page_reporting=False
        ),
        on_idle,
    )
    _, inflated, deflated = text.split()
    assert int(inflated) > 180_000, text
    assert int(deflated) < 20_000, text
    full, small, statistics = seen["full"], seen["small"], seen["statistics"]
    assert isinstance(full, int)
    assert isinstance(small, int)
    assert isinstance(statistics, dict)
    assert full - small > 150 << 20, seen
    assert 250 << 20 < statistics["free"] < statistics["total"] < 512 << 20


@pytest.mark.boot
@pytest.mark.slow
def test_linux_reports_free_pages() -> None:
    sizes: list[int] = []
    script = """
        dd if=/dev/zero of=/tmp/big bs=1M count=200 2>/dev/null; rm /tmp/big
        sleep 4
    """
    balloons: list[Balloon] = []

    def on_idle(balloon: Balloon, said: bytes) -> None:
        balloons[:] = [balloon]
        sizes.append(resident())

    in_guest(script, lambda machine: machine.add_balloon(), on_idle)
    assert balloons[0].reported_bytes > 150 << 20
    assert max(sizes) - sizes[-1] > 130 << 20, [size >> 20 for size in sizes]


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.parametrize("deflate", [True, False])
def test_a_guest_out_of_memory_takes_it_back(deflate: bool) -> None:
    """A program that needs more than the balloon left is killed only if the balloon is greedy."""
    script = """
        for i in $(seq 100); do
            [ $(awk '/MemFree/ { print $2 }' /proc/meminfo) -lt 60000 ] && break
            sleep 0.1
        done
        awk 'BEGIN { s = "xxxxxxxx"; while (length(s) < 60000000) s = s s; print length(s) }'
        echo status $?
    """
    done = polyvisor.exec(
        ["sh", "-c", script],
        engine="soft",
        memory="256M",
        timeout=100,
        on_machine=lambda machine: machine.add_balloon("150M", deflate_on_oom=deflate),
    )
    assert done.text == ("67108864\nstatus 0\n" if deflate else "status 137\n")


@pytest.mark.parametrize("hugepages", ["none", "transparent"])
def test_memory_of_every_kind_is_given_back(hugepages: str) -> None:
    with polyvisor.Machine(memory="64M", engine="soft", hugepages=hugepages) as machine:
        memory = machine.native.memory
        memory.write(8 << 20, b"\xaa" * (32 << 20))

        def size() -> int:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * PAGE

        before = size()
        assert memory.discard((8 << 20) + 1, 32 << 20) == (32 << 20) - PAGE
        assert before - size() > 30 << 20
        assert memory.read((8 << 20), 8) == b"\xaa" * 8, "the first page is not whole"
        assert memory.read((8 << 20) + PAGE, 8) == bytes(8)
        with pytest.raises(MemoryRangeError):
            memory.discard(1 << 40, 4096)
