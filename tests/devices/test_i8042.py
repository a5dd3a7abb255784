from __future__ import annotations

import pytest

from polyvisor.devices.i8042 import DATA, I8042, STATUS


class Wires:
    def __init__(self) -> None:
        self.resets = 0
        self.a20: list[bool] = []

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def wires() -> Wires:
    return Wires()


@pytest.fixture
def controller(wires: Wires) -> I8042:
    return I8042(reset=wires.reset, a20=wires.a20.append)


def command(controller: I8042, value: int) -> None:
    controller.write(STATUS, 1, value)


def answer(controller: I8042) -> int:
    assert controller.read(STATUS, 1) & 1, "no answer"
    return controller.read(DATA, 1)


def test_what_linux_asks(controller: I8042) -> None:
    assert controller.read(STATUS, 1) & 1 == 0  # nothing to flush
    command(controller, 0x20)
    ctr = answer(controller)
    command(controller, 0x60)
    controller.write(DATA, 1, ctr & ~0x10)
    command(controller, 0x20)
    assert answer(controller) == ctr & ~0x10
    command(controller, 0xAA)
    assert answer(controller) == 0x55
    command(controller, 0xAB)
    assert answer(controller) == 0
    command(controller, 0xD3)  # loop-back test of the mouse port
    controller.write(DATA, 1, 0x5A)
    assert controller.read(STATUS, 1) & 0x20
    assert answer(controller) == 0x5A


def test_nobody_answers_behind_it(controller: I8042) -> None:
    command(controller, 0xAE)
    controller.write(DATA, 1, 0xF2)  # keyboard: identify
    assert controller.read(STATUS, 1) & 0x40  # timeout
    assert answer(controller) == 0xFE
    command(controller, 0xD4)
    controller.write(DATA, 1, 0xF2)  # mouse
    assert answer(controller) == 0xFE
    assert controller.read(STATUS, 1) & 1 == 0


def test_reset_pulse(controller: I8042, wires: Wires) -> None:
    command(controller, 0xFF)  # pulses no line
    assert wires.resets == 0
    command(controller, 0xFE)
    assert wires.resets == 1


def test_output_port(controller: I8042, wires: Wires) -> None:
    command(controller, 0xD0)
    assert answer(controller) == 3
    command(controller, 0xD1)
    controller.write(DATA, 1, 0x01)
    command(controller, 0xD1)
    controller.write(DATA, 1, 0x03)
    assert wires.a20 == [False, True]
    assert wires.resets == 0
    command(controller, 0xD1)
    controller.write(DATA, 1, 0x02)
    assert wires.resets == 1


def test_nothing_a_guest_sends_raises_or_grows(controller: I8042) -> None:
    for _ in range(4):
        for value in range(256):
            command(controller, value)
            controller.write(DATA, 1, value)
            controller.read(STATUS, 4)
            controller.write(DATA, 4, 0xFFFFFFFF)
    assert len(controller.save()) < 128
    assert controller.read(7, 1) == -1


def test_state_round_trip(controller: I8042) -> None:
    command(controller, 0x60)
    command(controller, 0xD2)
    controller.write(DATA, 1, 0x42)
    command(controller, 0xD1)
    state = controller.save()
    other = I8042(reset=lambda: None)
    other.restore(state)
    assert other.save() == state
    other.write(DATA, 1, 3)
    assert answer(other) == 0x42
    for bad in (b"", state[:-1], state + bytes(64), state[:34] + b"\xff" + state[35:]):
        with pytest.raises(ValueError, match="keyboard controller"):
            other.restore(bad)


def test_power_on_clears_everything(controller: I8042) -> None:
    command(controller, 0xAA)
    controller.reset()
    assert controller.read(STATUS, 1) & 1 == 0
