from __future__ import annotations

import pytest

import polyvisor
from polyvisor.errors import ConfigError, StateError, StateMismatch


def test_after_power_on() -> None:
    with polyvisor.Machine(memory="1M", cpus=2) as machine:
        registers = machine.cpu(0).registers
        assert registers["rip"] == 0xFFF0
        assert registers["cs"] == 0xF000
        assert registers["cs.base"] == 0xFFFF0000
        assert registers["cr0"] == 0x60000010
        assert machine.cpu(0).state.activity == "running"
        assert machine.cpu(1).state.activity == "wait_for_sipi"


def test_set_and_get() -> None:
    with polyvisor.Machine(memory="1M") as machine:
        cpu = machine.cpu(0)
        cpu.registers["rax"] = 0x1122334455667788
        cpu.registers.update(rbx=5, rcx=-1)
        assert cpu.registers["rax"] == 0x1122334455667788
        assert cpu.registers["rcx"] == (1 << 64) - 1
        both = cpu.registers.as_dict()
        assert both["rbx"] == 5
        assert set(both) == set(cpu.registers)
        assert len(cpu.registers) == len(both)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eax", 0),  # not a name
        ("rax", 1 << 64),
        ("rax", -(1 << 63) - 1),
        ("cs", 0x10000),
        ("gdtr.limit", 0x12345),
        ("cr0", 0x80000000),  # paging without protection
        ("efer", 0x400),  # long mode active without paging
    ],
)
def test_impossible_values_change_nothing(name: str, value: int) -> None:
    with polyvisor.Machine(memory="1M") as machine:
        cpu = machine.cpu(0)
        before = cpu.state
        with pytest.raises(StateError):
            cpu.registers.apply({"rdx": 99, name: value})
        assert cpu.state == before


def test_registers_cannot_go() -> None:
    with polyvisor.Machine(memory="1M") as machine, pytest.raises(TypeError):
        del machine.cpu(0).registers["rax"]


def test_whole_states_move_between_cpus() -> None:
    with polyvisor.Machine(memory="1M", cpus=2) as machine:
        state = machine.cpu(0).state
        state["r8"] = 8
        state.set_segment("fs", polyvisor.Segment(0x33, 0x1234, 0xFFFF, 0x93))
        copy = state.copy()
        machine.cpu(1).state = state
        assert machine.cpu(1).registers["fs.base"] == 0x1234
        assert machine.cpu(1).state.segment("fs") == copy.segment("fs")
        assert machine.cpu(1).state == copy
        copy["r8"] = 9
        assert copy != state


def test_vector_registers() -> None:
    state = polyvisor.CpuState()
    image = bytearray(512)
    image[160 + 16 : 160 + 32] = bytes(range(16))
    state.fxsave = bytes(image)
    assert state.xmm(1) == bytes(range(16))
    assert state.ymm(1) == bytes(range(16)) + bytes(16)
    with pytest.raises(StateError):
        state.xmm(16)
    with pytest.raises(StateError):
        state.fxsave = b"short"
    with pytest.raises(StateError):
        state.activity = "asleep"


def test_no_such_cpu() -> None:
    with polyvisor.Machine(memory="1M") as machine:
        with pytest.raises(ConfigError):
            machine.cpu(1)
        with pytest.raises(ConfigError):
            machine.cpu(-1)
    with pytest.raises(StateMismatch):
        machine.cpu(0)


def test_modes_are_what_cpus_accept() -> None:
    with polyvisor.Machine(memory="16M") as machine:
        cpu = machine.cpu(0)
        cpu.enter_long_mode(page_tables_at=0x1000, rip=0x100000, rsp=0x8000)
        assert cpu.registers["efer"] == 0x500
        assert cpu.translate(0x123456) == 0x123456
        assert cpu.translate(0xFFFF_FFFF) == 0xFFFF_FFFF
        assert cpu.translate(1 << 32) is None
        machine.memory.write(0x4FFE, b"crossing")
        assert cpu.read_virtual(0x4FFE, 8) == b"crossing"
        with pytest.raises(StateError):
            cpu.read_virtual(1 << 40, 1)
        with pytest.raises(StateError):
            cpu.enter_long_mode(page_tables_at=0x1001, rip=0)
        cpu.enter_protected_mode(rip=0x100000, gdt_at=0x500)
        assert cpu.registers["gdtr.base"] == 0x500
        assert cpu.registers["cr0"] & 0x8000_0001 == 1
        cpu.enter_real_mode(cs=0x100, ip=0x10)
        assert cpu.registers["cs.base"] == 0x1000
