from __future__ import annotations

import gc

import pytest

import polyvisor
from polyvisor import _fast
from polyvisor.errors import MemoryRangeError, StateMismatch

MIB = 1 << 20


def test_reads_what_was_written() -> None:
    with polyvisor.Machine(memory="4M") as machine:
        memory = machine.memory
        memory.write(0x1234, b"polyvisor")
        assert memory.read(0x1234, 9) == b"polyvisor"
        assert bytes(memory.view(0x1234, 9)) == b"polyvisor"
        memory.write_int(0x2000, 0xDEADBEEF, 4)
        assert memory.read_int(0x2000, 4) == 0xDEADBEEF
        buffer = bytearray(9)
        memory.read_into(0x1234, buffer)
        assert buffer == b"polyvisor"
        assert len(memory) == 4 * MIB
        assert [region.name for region in memory] == ["ram"]


def test_views_are_the_memory_itself() -> None:
    with polyvisor.Machine(memory="4M") as machine:
        view = machine.memory.view(0x3000, 16)
        view[:4] = b"abcd"
        assert machine.memory.read(0x3000, 4) == b"abcd"
        machine.memory.write(0x3004, b"e")
        assert view[4] == ord("e")
        whole = memoryview(machine.memory.region(0))
        assert whole.nbytes == 4 * MIB
        assert not whole.readonly


def test_views_outlive_the_machine() -> None:
    machine = polyvisor.Machine(memory="4M")
    machine.memory.write(0x100, b"still here")
    view = machine.memory.view(0x100, 10)
    machine.close()
    with pytest.raises(StateMismatch):
        machine.memory  # noqa: B018
    del machine
    gc.collect()
    assert bytes(view) == b"still here"
    view[0] = ord("S")
    assert view[0] == ord("S")


@pytest.mark.parametrize(
    ("gpa", "size"), [(4 * MIB, 1), (4 * MIB - 1, 2), (1 << 40, 8), (0, 4 * MIB + 1), (0, 1 << 62)]
)
def test_what_is_not_memory(gpa: int, size: int) -> None:
    with polyvisor.Machine(memory="4M") as machine:
        with pytest.raises(MemoryRangeError):
            machine.memory.read(gpa, size)
        with pytest.raises(MemoryRangeError):
            machine.memory.view(gpa, size)
        if size < 5 * MIB:
            with pytest.raises(MemoryRangeError) as caught:
                machine.memory.write(gpa, bytes(size))
            assert f"{caught.value.gpa:#x}" in str(caught.value)
        assert not any(machine.memory.read(4 * MIB - 16, 16))  # nothing was written before


def test_e820_of_a_large_machine() -> None:
    with polyvisor.Machine(memory="512M") as machine:
        entries = machine.e820()
        assert entries[0] == (0, 0xA0000, 1)
        assert entries[1] == (0xA0000, 0x60000, 2)
        assert entries[2] == (MIB, 511 * MIB, 1)
        machine.memory.write(0xE0000, b"tables")  # backed, though not RAM to the guest


def test_fast_works_on_guest_memory() -> None:
    with polyvisor.Machine(memory="4M") as machine:
        view = machine.memory.view(0, 4 * MIB)
        _fast.store(view, 0x1000, 0x1122334455667788)
        assert machine.memory.read_int(0x1000) == 0x1122334455667788
        assert _fast.load(view, 0x1004, 4) == 0x11223344
        assert _fast.nonzero_pages(view) == [1]
        machine.memory.write(0x20_0010, b"RSD PTR ")
        assert _fast.find(view, b"RSD PTR ", align=16) == 0x20_0010
        assert _fast.find(view, b"RSD PTR ", 0x20_0011) == -1
