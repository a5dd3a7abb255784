"""The parts of a CPU's state that are not registers: what it is doing, and what it is about to."""

from __future__ import annotations

import pytest

import polyvisor
from polyvisor import InFlightEvent
from polyvisor.errors import StateError

HANDLER, CODE = 0x3000, 0x2000
HLT = b"\xf4"


def test_an_event_in_flight_is_part_of_the_state(engine: str) -> None:
    with polyvisor.Machine(memory="1M", engine=engine) as machine:
        cpu = machine.cpu(0)
        state = cpu.state
        assert state.event is None
        state.event = InFlightEvent("interrupt", 0x41)
        state.nmi_pending = True
        cpu.state = state
        saved = cpu.state
        assert saved == state
        assert saved.nmi_pending
        assert saved.event is not None
        assert saved.event == InFlightEvent("interrupt", 0x41)
        assert saved.event.kind == "interrupt"
        assert saved.event.vector == 0x41
        assert saved.event.error_code is None
        assert "interrupt" in repr(saved.event)
        saved.event = None
        cpu.state = saved
        assert cpu.state.event is None


def test_it_is_delivered_before_the_next_instruction() -> None:
    with polyvisor.Machine(memory="1M", engine="soft") as machine:
        machine.memory.write(CODE, b"\xb0\x01" + HLT)  # mov $1, %al
        machine.memory.write(HANDLER, b"\xb4\x02" + HLT)  # mov $2, %ah
        machine.memory.write(0x41 * 4, HANDLER.to_bytes(4, "little"))
        cpu = machine.cpu(0)
        cpu.enter_real_mode(ip=CODE, sp=0x1000)
        state = cpu.state
        state.event = InFlightEvent("interrupt", 0x41)
        cpu.state = state
        cpu.step()
        assert cpu.registers["rip"] == HANDLER + 2
        assert cpu.registers["rax"] == 0x200
        assert machine.memory.read(0xFFA, 2) == CODE.to_bytes(2, "little")


@pytest.mark.parametrize(
    "event",
    [
        InFlightEvent("nmi", 3),
        InFlightEvent("exception", 40),
        InFlightEvent("exception", 6, error_code=0),
        InFlightEvent("interrupt", 0x20, length=2),
        InFlightEvent("software_interrupt", 0x80),
    ],
)
def test_an_impossible_event_changes_nothing(event: InFlightEvent) -> None:
    with polyvisor.Machine(memory="1M") as machine:
        cpu = machine.cpu(0)
        before = cpu.state
        state = cpu.state
        state["rax"] = 7
        state.event = event
        with pytest.raises(StateError) as caught:
            cpu.state = state
        assert caught.value.field == "event"
        assert cpu.state == before


def test_kinds_of_events() -> None:
    fault = InFlightEvent("exception", 13, error_code=0x18)
    assert fault.error_code == 0x18
    assert fault != InFlightEvent("exception", 13)
    with pytest.raises(StateError, match="software_interrupt"):
        InFlightEvent("trap", 1)
