from __future__ import annotations

import calendar
from collections.abc import Callable

import pytest

from polyvisor.devices import rtc
from polyvisor.devices.rtc import Rtc

SECOND = 1_000_000_000
START = calendar.timegm((2026, 3, 14, 15, 9, 26))  # a Saturday


class Board:
    """Virtual time, one timer and one wire."""

    def __init__(self) -> None:
        self.now = 0
        self.deadline: int | None = None
        self.callback: Callable[[], None] = lambda: None
        self.level = False
        self.rises = 0

    def timer(self, callback: Callable[[], None]) -> Board:
        self.callback = callback
        return self

    def arm(self, deadline: int) -> None:
        assert deadline > self.now
        self.deadline = deadline

    def disarm(self) -> None:
        self.deadline = None

    def set(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level

    def run_to(self, time: int) -> None:
        while self.deadline is not None and self.deadline <= time:
            self.now, self.deadline = self.deadline, None
            self.callback()
        self.now = time


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def clock(board: Board) -> Rtc:
    return Rtc(
        now=lambda: board.now,
        timer=board.timer,
        irq=board,
        wall_clock=START,
        memory_size=512 << 20,
    )


def get(clock: Rtc, register: int) -> int:
    clock.write(0, 1, register)
    return clock.read(1, 1)


def put(clock: Rtc, register: int, value: int) -> None:
    clock.write(0, 1, register)
    clock.write(1, 1, value)


def test_date_and_time(clock: Rtc, board: Board) -> None:
    registers = (rtc.CENTURY, 9, 8, 7, 6, 4, 2, 0)
    assert [get(clock, r) for r in registers] == [0x20, 0x26, 3, 0x14, 7, 0x15, 9, 0x26]
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_BINARY)
    assert [get(clock, r) for r in registers] == [20, 26, 3, 14, 7, 15, 9, 26]
    put(clock, rtc.REG_B, 0)
    assert get(clock, rtc.HOURS) == 0x83  # 3 PM
    board.now = 35 * SECOND
    assert get(clock, rtc.SECONDS) == 0x01
    assert get(clock, rtc.MINUTES) == 0x10


def test_update_in_progress(clock: Rtc, board: Board) -> None:
    assert not get(clock, rtc.REG_A) & rtc.A_UIP
    board.now = SECOND - 200_000
    assert get(clock, rtc.REG_A) & rtc.A_UIP
    board.now = SECOND
    assert not get(clock, rtc.REG_A) & rtc.A_UIP
    assert get(clock, rtc.REG_D) == rtc.D_VALID


def test_setting_the_time(clock: Rtc, board: Board) -> None:
    put(clock, rtc.REG_B, rtc.B_SET | rtc.B_24H)
    for register, value in ((rtc.CENTURY, 0x20), (9, 0x30), (8, 0x02), (7, 0x31), (4, 0x23)):
        put(clock, register, value)
    put(clock, rtc.MINUTES, 0x59)
    put(clock, rtc.SECONDS, 0x58)
    board.now += 10 * SECOND
    assert get(clock, rtc.SECONDS) == 0x58  # held
    put(clock, rtc.REG_B, rtc.B_24H)
    board.now += 3 * SECOND
    # February has no 31st: it became March 3rd, and is now a day later.
    assert [get(clock, r) for r in (9, 8, 7, 4, 2, 0)] == [0x30, 3, 4, 0, 0, 1]


@pytest.mark.parametrize("register", range(128))
@pytest.mark.parametrize("value", [0, 0x55, 0xFF])
def test_nothing_a_guest_writes_raises(clock: Rtc, board: Board, register: int, value: int) -> None:
    put(clock, register, value)
    board.run_to(3 * SECOND)
    for other in range(128):
        assert 0 <= get(clock, other) <= 255
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_AIE | rtc.B_UIE)
    board.run_to(6 * SECOND)
    assert len(clock.save()) > 128


def test_update_interrupts(clock: Rtc, board: Board) -> None:
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_UIE)
    assert board.deadline == SECOND
    board.run_to(SECOND)
    assert board.level
    assert get(clock, rtc.REG_C) == rtc.C_IRQF | rtc.C_UF | rtc.C_PF
    assert not board.level
    assert get(clock, rtc.REG_C) == 0
    board.run_to(4 * SECOND)  # unread, a second one does not come
    assert board.rises == 2
    put(clock, rtc.REG_B, rtc.B_24H)
    assert not board.level


def test_periodic_interrupts(clock: Rtc, board: Board) -> None:
    put(clock, rtc.REG_A, 0x2A)  # 64 Hz
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_PIE)
    for _ in range(64):
        assert board.deadline is not None
        board.run_to(board.deadline)
        assert get(clock, rtc.REG_C) & rtc.C_PF
    assert board.now == SECOND
    put(clock, rtc.REG_A, 0x20)
    assert board.deadline is None


def test_alarm(clock: Rtc, board: Board) -> None:
    put(clock, rtc.HOURS_ALARM, 0x15)
    put(clock, rtc.MINUTES_ALARM, 0x10)
    put(clock, rtc.SECONDS_ALARM, 0x00)
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_AIE)
    assert board.deadline == 34 * SECOND
    board.run_to(34 * SECOND)
    assert get(clock, rtc.REG_C) & rtc.C_AF
    assert board.deadline == (34 + 86400) * SECOND  # tomorrow again
    put(clock, rtc.HOURS_ALARM, 0xFF)
    put(clock, rtc.MINUTES_ALARM, 0xC0)
    assert board.deadline == 94 * SECOND  # each minute
    put(clock, rtc.SECONDS_ALARM, 0x61)  # there is no such second
    assert board.deadline is None


def test_alarm_flag_without_interrupt(clock: Rtc, board: Board) -> None:
    for register in (rtc.HOURS_ALARM, rtc.MINUTES_ALARM, rtc.SECONDS_ALARM):
        put(clock, register, 0xFF)
    board.now = SECOND
    assert get(clock, rtc.REG_C) & rtc.C_AF
    assert not board.level


def test_cmos_and_ports(clock: Rtc) -> None:
    put(clock, 0x40, 0x77)
    assert get(clock, 0x40) == 0x77
    assert get(clock, 0xC0) == 0x77  # bit 7 of the index is the NMI mask
    assert clock.read(0, 1) == 0xFF
    assert clock.read(0, 2) == 0x77FF
    clock.write(0, 2, 0x1240)
    assert get(clock, 0x40) == 0x12
    assert get(clock, 0x15) | get(clock, 0x16) << 8 == 640
    assert get(clock, 0x34) | get(clock, 0x35) << 8 == (512 - 16) * 16


def test_state_round_trip(clock: Rtc, board: Board) -> None:
    put(clock, 0x33, 0x5A)
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_UIE)
    board.now = 5 * SECOND
    state = clock.save()
    other_board = Board()
    other_board.now = 5 * SECOND
    other = Rtc(now=lambda: other_board.now, timer=other_board.timer, irq=other_board, wall_clock=0)
    other.restore(state)
    assert other.save() == state
    assert get(other, rtc.YEAR) == 0x26
    assert other_board.deadline == 6 * SECOND
    for bad in (b"", state[:-1], state[:128] + b"\xff" + state[129:]):
        with pytest.raises(ValueError, match="RTC"):
            other.restore(bad)


def test_reset_keeps_the_time(clock: Rtc, board: Board) -> None:
    put(clock, rtc.REG_B, rtc.B_24H | rtc.B_UIE)
    board.run_to(SECOND)
    clock.reset()
    assert not board.level
    assert board.deadline is None
    assert get(clock, rtc.SECONDS) == 0x27
