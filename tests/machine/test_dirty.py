"""Which pages a guest has written: against the memory itself, on each engine."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable

import pytest
from guestcode import HLT, LOOP_FOREVER, real_mode

import polyvisor
from polyvisor.errors import ConfigError, StateMismatch
from polyvisor.memory import DirtyPages

PAGE = 4096
PORT = 0x500


def random_writer(seed: int, writes: int, *, ask: bool = True) -> bytes:
    """Adds 1 to random words of the pages from 0x10000 to 0x8ffff, and after `writes` of them
    writes to PORT; for ever."""
    inner = bytes.fromhex(
        "69db5562"  # imul bx, bx, 25173
        "81c31936"  # add bx, 13849
        "89d8"  # mov ax, bx
        "25007f"  # and ax, 0x7f00
        "050010"  # add ax, 0x1000
        "8ec0"  # mov es, ax
        "89df"  # mov di, bx
        "81e7fe0f"  # and di, 0x0ffe
        "26ff05"  # inc word es:[di]
    )
    inner += b"\xe2" + (-(len(inner) + 2) & 0xFF).to_bytes(1, "little")  # loop
    body = b"\xb9" + writes.to_bytes(2, "little") + inner  # mov cx, writes
    if ask:
        body += b"\xba" + PORT.to_bytes(2, "little") + b"\xee"  # mov dx, PORT; out dx, al
    body += b"\xeb" + (-(len(body) + 2) & 0xFF).to_bytes(1, "little")  # jmp
    return b"\xbb" + seed.to_bytes(2, "little") + body  # mov bx, seed


def pages_of(dirty: DirtyPages) -> set[int]:
    return {page for gpa, size in dirty for page in range(gpa // PAGE, (gpa + size) // PAGE)}


def changed(before: bytes | bytearray, after: bytes) -> set[int]:
    return {
        at // PAGE
        for at in range(0, len(after), PAGE)
        if before[at : at + PAGE] != after[at : at + PAGE]
    }


class Asker:
    """Calls a function whenever the guest asks, `limit` times, and then ends the machine."""

    def __init__(self, machine: polyvisor.Machine, limit: int, call: Callable[[], None]) -> None:
        self.machine, self.limit, self.call = machine, limit, call
        self.asked = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.call()
        self.asked += 1
        if self.asked == self.limit:
            self.machine.stop()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("writes", [1, 7, 200])
def test_exactly_what_changed(engine: str, writes: int) -> None:
    code = random_writer(random.getrandbits(16), writes)
    with real_mode(code, engine=engine) as machine:
        memory = machine.memory
        log = memory.dirty()
        before = memory.read(0, len(memory))
        seen: list[tuple[set[int], set[int]]] = []

        def look() -> None:
            nonlocal before
            dirty = pages_of(log.fetch())
            after = memory.read(0, len(memory))
            seen.append((dirty, changed(before, after)))
            before = after

        machine.add_port_device(PORT, Asker(machine, 30, look), size=1)
        machine.run(timeout=50)
        touched = {0x7C00 // PAGE, *range(0x10, 0x90)}
        for dirty, want in seen:
            # KVM counts what it maps writable, which may be a page that was only read.
            assert want <= dirty <= (want if engine == "soft" else want | touched)
        assert sum(len(want) for _, want in seen) >= 30
        assert not log.fetch().ranges


@pytest.mark.timeout(90)
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_copy_made_while_it_runs(engine: str, cpus: int) -> None:
    with real_mode(random_writer(1, 0xFFFF, ask=False), engine=engine, cpus=cpus) as machine:
        memory = machine.memory
        for cpu in range(1, cpus):
            memory.write(0x6000, random_writer(0x5555, 0xFFFF, ask=False))
            machine.cpu(cpu).enter_real_mode(ip=0x6000, sp=0x5000)
        machine.start()
        with memory.dirty() as log:
            copy = bytearray(memory.read(0, len(memory)))
            rounds = 0
            end = time.monotonic() + 60
            while rounds < 40 and time.monotonic() < end:
                dirty = log.fetch()
                rounds += bool(dirty)
                for gpa, size in dirty:
                    copy[gpa : gpa + size] = memory.read(gpa, size)
                memory.write_int(0xA0000 + rounds * 128, rounds, 4)  # as a device does
            assert rounds == 40
            machine.pause()
            for gpa, size in log.fetch():
                copy[gpa : gpa + size] = memory.read(gpa, size)
            assert changed(copy, memory.read(0, len(memory))) == set()
            assert not log.fetch()


def test_the_hosts_own_writes() -> None:
    with polyvisor.Machine(memory="2M", engine="soft") as machine:
        memory = machine.memory
        memory.write(0x1000, b"before")
        with memory.dirty() as log:
            assert log.active
            assert log.method == "marks"
            assert log.fetch().ranges == []
            memory.write(0x2FFF, b"xy")  # two pages
            memory.write_int(0x4000, 1)
            memory.write(0x1FF000, b"last")
            dirty = log.fetch()
            assert list(dirty) == dirty.ranges == [(0x2000, 0x3000), (0x1FF000, 0x1000)]
            assert len(dirty) == 2
            assert dirty.size == 4 * PAGE
            assert [
                gpa for gpa in (0x1FFF, 0x2000, 0x4FFF, 0x5000, 0x1FFFFF) if dirty.has(gpa)
            ] == [
                0x2000,
                0x4FFF,
                0x1FFFFF,
            ]
            assert not DirtyPages([], {}).has(0)
            (bitmap,) = dirty.bitmaps.values()
            assert list(dirty.bitmaps) == [0]
            assert len(bitmap) == 512 // 8
            assert int.from_bytes(bitmap, "little") == 0b11100 | 1 << 511
            # A view's stores are told by hand.
            memory.view(0x8000, 4)[:] = b"view"
            assert not log.fetch()
            memory.note_write(0x8000, 4)
            assert log.fetch().ranges == [(0x8000, 0x1000)]
            memory.write(0x40000, bytes(80 * PAGE))  # across words of the bitmap
            assert log.fetch().ranges == [(0x40000, 80 * PAGE)]


def test_restoring_a_snapshot_is_a_write(engine: str) -> None:
    with real_mode(HLT + LOOP_FOREVER, engine=engine) as machine:
        snapshot = machine.snapshot()
        with machine.memory.dirty() as log:
            machine.restore(snapshot)
            assert log.fetch().ranges == [(0, len(machine.memory))]


def test_one_log_at_a_time(engine: str) -> None:
    with real_mode(LOOP_FOREVER, engine=engine) as machine:
        memory = machine.memory
        first = memory.dirty()
        with pytest.raises(StateMismatch, match="in use"):
            memory.dirty()
        memory.write(0x9000, b"x")
        assert first.fetch().ranges == [(0x9000, PAGE)]  # the refused one took nothing
        first.stop()
        first.stop()
        assert not first.active
        with pytest.raises(StateMismatch, match="was stopped"):
            first.fetch()
        second = memory.dirty()
        with pytest.raises(StateMismatch, match="was stopped"):
            first.fetch()
        first.stop()  # not the other's
        assert second.active
        assert not second.fetch()
        # One that nobody holds any more is not in the way.
        del second
        gc.collect()
        with pytest.raises(ZeroDivisionError), memory.dirty() as log:
            1 / 0  # noqa: B018
        assert not log.active
        memory.dirty()


def test_a_closed_machine_has_no_log() -> None:
    machine = polyvisor.Machine(memory="2M", engine="soft")
    memory = machine.memory
    with memory.dirty() as log:
        machine.close()
        assert not log.active
        with pytest.raises(StateMismatch, match="closed"):
            log.fetch()
    with pytest.raises(StateMismatch, match="closed"):
        memory.dirty()


@pytest.mark.kvm
@pytest.mark.timeout(60)
def test_rings() -> None:
    """The guest writes until it is told to stop, and the ring is large enough or not."""
    code = random_writer(3, 50)
    with real_mode(code, engine="kvm", dirty_ring=4096) as machine:
        log = machine.memory.dirty()
        assert log.method == "ring"
        machine.add_port_device(PORT, Asker(machine, 300, lambda: None), size=1)
        before = machine.memory.read(0, len(machine.memory))
        machine.run(timeout=50)
        want = changed(before, machine.memory.read(0, len(machine.memory)))
        assert want <= pages_of(log.fetch())
        assert len(want) > 100


@pytest.mark.parametrize("ring", [-1, 3, 1 << 21])
def test_impossible_rings(ring: int) -> None:
    with pytest.raises(ConfigError, match="dirty_ring") as caught:
        polyvisor.Machine(memory="2M", dirty_ring=ring)
    assert caught.value.field == "dirty_ring"


@pytest.mark.kvm
def test_a_ring_that_kvm_refuses() -> None:
    with pytest.raises(ConfigError, match="64 entries") as caught:
        polyvisor.Machine(memory="2M", engine="kvm", dirty_ring=64)
    assert caught.value.field == "dirty_ring"
