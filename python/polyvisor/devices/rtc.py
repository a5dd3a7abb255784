"""The MC146818 real-time clock and its CMOS RAM, at ports 0x70 (index) and 0x71 (data).

Time is virtual: the wall clock at the machine's start plus the machine's own time, so a paused
machine's clock stands still with it. (Linux reads the clock at boot, and then keeps time by the
TSC.)

The update cycle is modelled, since guests wait for it: register A shows UIP for the last 244
microseconds of each second, and the update-ended interrupt comes at the second itself. While
register B's SET is on, the registers hold still.

MC146818A data sheet; the century byte at 0x32 is the PC's convention.
"""

from __future__ import annotations

import struct
import time
from _thread import RLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class IrqLine(Protocol):
        """What the clock needs of its interrupt wire."""

        def set(self, level: bool, /) -> None:
            """Raises or lowers it."""

    class Timer(Protocol):
        """What the clock needs of a timer on virtual time."""

        def arm(self, deadline_ns: int, /) -> None:
            """Calls back at that virtual time."""

        def disarm(self) -> None:
            """Does not call back."""


SECOND = 1_000_000_000  # nanoseconds
UIP_NS = 244_000

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR = 6, 7, 8, 9
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13
CENTURY = 0x32

A_UIP = 0x80
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_BINARY, B_24H, B_DST = (
    0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02, 0x01,
)  # fmt: skip
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
D_VALID = 0x80

_TIME_REGISTERS = {SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY}


_STATE = struct.Struct("<128sBBqqQ")  # CMOS, index, held or not, held seconds, base, seen
MAX_YEAR = 2199  # nanoseconds since 1970 then still fit 63 bits


def _days(year: int, month: int) -> int:
    """Days from 1970 to the first of a month (from 1 on) in the Gregorian calendar."""
    # Years from March on, so that a leap day is a year's last, and months' lengths follow a line.
    year -= month < 3
    return (
        365 * year + year // 4 - year // 100 + year // 400 + (153 * ((month + 9) % 12) + 2) // 5
    ) - 719468


_MAX_WALL = _days(MAX_YEAR + 1, 1) * 86400 - 1


class Rtc:
    """Offset 0 is the index port, offset 1 the data port.

    `now` gives virtual nanoseconds, `timer(callback)` a timer on them, `irq` is IRQ 8. `wall_clock`
    is the time at virtual time 0 in seconds since 1970, UTC.
    """

    def __init__(
        self,
        *,
        now: Callable[[], int],
        timer: Callable[[Callable[[], None]], Timer],
        irq: IrqLine,
        wall_clock: float,
        memory_size: int = 0,
    ) -> None:
        self._now = now
        self._irq = irq
        self._base = int(wall_clock * SECOND)  # wall time at virtual time 0, ns since 1970
        self._lock = RLock()  # CPUs against the timer's thread
        self._timer = timer(self._tick)
        self._index = 0
        self.cmos = bytearray(128)
        self.cmos[REG_A] = 0x26  # 32768 Hz time base, 1024 Hz rate
        self.cmos[REG_B] = B_24H
        self.cmos[REG_D] = D_VALID
        self._describe_memory(memory_size)
        self._held: int | None = None  # wall seconds that the registers show while SET is on
        self._seen = 0  # virtual time up to which periodic, alarm and update events were noticed

    # --- ports -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A wider access reads the index port's neighbours, of which only the data port answers."""
        if size > 1:
            return sum((self.read(offset + i, 1) & 0xFF) << (8 * i) for i in range(size))
        if offset != 1:
            return 0xFF  # the index cannot be read back
        with self._lock:
            return self._read_register(self._index)

    def write(self, offset: int, size: int, value: int) -> None:
        """Selects a register (bit 7 is the NMI mask, which nothing here uses) or stores into it."""
        for i in range(size):
            byte = value >> (8 * i) & 0xFF
            if offset + i == 0:
                self._index = byte & 0x7F
            elif offset + i == 1:
                with self._lock:
                    self._write_register(self._index, byte)

    # --- registers -------------------------------------------------------------------------------

    def _read_register(self, index: int) -> int:
        if index in _TIME_REGISTERS:
            return self._time_register(index)
        if index == REG_A:
            return self.cmos[REG_A] & 0x7F | (A_UIP if self._updating() else 0)
        if index == REG_C:
            self._notice()
            flags = self.cmos[REG_C]
            self.cmos[REG_C] = 0
            self._irq.set(False)
            self._schedule()
            return flags
        return self.cmos[index]

    def _write_register(self, index: int, value: int) -> None:
        if index in _TIME_REGISTERS:
            self._set_time(index, value)
        elif index == REG_A:
            self._notice()
            self.cmos[REG_A] = value & 0x7F
        elif index == REG_B:
            self._notice()
            if value & B_SET:
                if self._held is None:
                    self._held = self._wall() // SECOND
                value &= ~B_UIE  # setting SET clears UIE (data sheet, register B)
            elif self._held is not None:
                self._base += self._held * SECOND - self._wall() // SECOND * SECOND
                self._held = None
            self.cmos[REG_B] = value
            self._update_irq()
        elif index in (REG_C, REG_D):
            return  # read-only
        else:
            self.cmos[index] = value
        self._schedule()

    # --- time ------------------------------------------------------------------------------------

    def _wall(self, now: int | None = None) -> int:
        return self._base + (self._now() if now is None else now)

    def _updating(self) -> bool:
        if self._held is not None or self.cmos[REG_A] & 0x60 == 0x60:  # SET, or divider in reset
            return False
        return SECOND - self._wall() % SECOND <= UIP_NS

    def _encode(self, value: int) -> int:
        if self.cmos[REG_B] & B_BINARY:
            return value
        return value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        if self.cmos[REG_B] & B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self.cmos[REG_B] & B_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.cmos[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _time_register(self, index: int) -> int:
        seconds = self._wall() // SECOND if self._held is None else self._held
        fields = time.gmtime(seconds)
        if index == HOURS:
            return self._encode_hour(fields.tm_hour)
        values = {
            SECONDS: fields.tm_sec,
            MINUTES: fields.tm_min,
            WEEKDAY: (fields.tm_wday + 1) % 7 + 1,  # 1 is Sunday
            DAY: fields.tm_mday,
            MONTH: fields.tm_mon,
            YEAR: fields.tm_year % 100,
            CENTURY: fields.tm_year // 100,
        }
        return self._encode(values[index])

    def _set_time(self, index: int, value: int) -> None:
        now = self._wall() // SECOND if self._held is None else self._held
        fields = time.gmtime(now)
        number = self._decode_hour(value) if index == HOURS else self._decode(value)
        year, month, day = fields.tm_year, fields.tm_mon, fields.tm_mday
        hour, minute, second = fields.tm_hour, fields.tm_min, fields.tm_sec
        if index == SECONDS:
            second = number
        elif index == MINUTES:
            minute = number
        elif index == HOURS:
            hour = number
        elif index == DAY:
            day = number
        elif index == MONTH:
            month = number
        elif index == YEAR:
            year = year // 100 * 100 + number % 100
        elif index == CENTURY:
            year = number * 100 + year % 100
        # The weekday follows from the date; nonsense (month 13) is taken modulo, as it must not
        # raise.
        month = min(max(month, 1), 12)
        year = min(max(year, 1970), MAX_YEAR)
        days = _days(year, month) + max(day, 1) - 1
        after = ((days * 24 + hour) * 60 + minute) * 60 + second
        if self._held is None:
            self._base += (after - now) * SECOND
        else:
            self._held = after

    # --- interrupts ------------------------------------------------------------------------------

    def _period(self) -> int:
        """Nanoseconds of the periodic interrupt, 0 for none (data sheet, table of RS0 to RS3)."""
        rate = self.cmos[REG_A] & 15
        if rate == 0 or self.cmos[REG_A] & 0x70 != 0x20:
            return 0
        shift = rate + 7 if rate < 3 else rate
        return (1 << (shift - 1)) * SECOND // 32768

    def _alarm_matches(self, seconds: int) -> bool:
        fields = time.gmtime(seconds)
        for register, shown in (
            (SECONDS_ALARM, self._encode(fields.tm_sec)),
            (MINUTES_ALARM, self._encode(fields.tm_min)),
            (HOURS_ALARM, self._encode_hour(fields.tm_hour)),
        ):
            wanted = self.cmos[register]
            if wanted & 0xC0 != 0xC0 and wanted != shown:  # the two top bits: any value does
                return False
        return True

    def _next_alarm(self, after: int) -> int | None:
        """The first wall second after `after` that the alarm matches, within a day."""
        hours = range(24) if self.cmos[HOURS_ALARM] & 0xC0 == 0xC0 else None
        wanted = self._decode_hour(self.cmos[HOURS_ALARM]) if hours is None else None
        second = after + 1
        end = after + 86401
        while second < end:
            fields = time.gmtime(second)
            if wanted is not None and fields.tm_hour != wanted:
                second += 3600 - (fields.tm_min * 60 + fields.tm_sec)
                continue
            if self._alarm_matches(second):
                return second
            minute = self.cmos[MINUTES_ALARM]
            if minute & 0xC0 != 0xC0 and self._encode(fields.tm_min) != minute:
                second += 60 - fields.tm_sec
            else:
                second += 1
        return None

    def _notice(self) -> None:
        """Sets the flags of everything that happened since the last look."""
        now = self._now()
        if now <= self._seen:
            return
        flags = 0
        period = self._period()
        if period and now // period > self._seen // period:
            flags |= C_PF
        if self._held is None:
            before, after = self._wall(self._seen) // SECOND, self._wall(now) // SECOND
            if after > before:
                flags |= C_UF
                alarm = self._next_alarm(before)
                if alarm is not None and alarm <= after:
                    flags |= C_AF
        self._seen = now
        self.cmos[REG_C] |= flags
        self._update_irq()

    def _update_irq(self) -> None:
        flags = self.cmos[REG_C] & 0x70
        # The enable bits of register B sit where the flags of register C do.
        if flags & self.cmos[REG_B]:
            self.cmos[REG_C] = flags | C_IRQF
            self._irq.set(True)
        else:
            self.cmos[REG_C] = flags
            self._irq.set(False)

    def _schedule(self) -> None:
        """Arms the timer for the next event that would interrupt; flags alone need none."""
        enabled = self.cmos[REG_B] & ~self.cmos[REG_C]
        now = self._now()
        deadlines = []
        period = self._period()
        if enabled & B_PIE and period:
            deadlines.append((now // period + 1) * period)
        if self._held is None:
            second = self._wall(now) // SECOND
            if enabled & B_UIE:
                deadlines.append((second + 1) * SECOND - self._base)
            if enabled & B_AIE:
                alarm = self._next_alarm(second)
                if alarm is not None:
                    deadlines.append(alarm * SECOND - self._base)
        if deadlines:
            self._timer.arm(min(deadlines))
        else:
            self._timer.disarm()

    def _tick(self) -> None:
        with self._lock:
            self._notice()
            self._schedule()

    # --- the rest of CMOS ------------------------------------------------------------------------

    def _describe_memory(self, size: int) -> None:
        """Where BIOSes note the memory's size; firmware looks, operating systems use E820."""
        extended = min(max(size - (1 << 20), 0) >> 10, 0xFFFF)  # KiB above 1 MiB
        above16m = min(max(min(size, 3 << 30) - (16 << 20), 0) >> 16, 0xFFFF)  # 64 KiB units
        for register, value in ((0x15, 640), (0x17, extended), (0x30, extended), (0x34, above16m)):
            self.cmos[register : register + 2] = value.to_bytes(2, "little")

    def save(self) -> bytes:
        """Registers and RAM, the index, and the wall clock's offset from virtual time."""
        with self._lock:
            return _STATE.pack(
                bytes(self.cmos),
                self._index,
                self._held is not None,
                self._held or 0,
                self._base,
                self._seen,
            )

    def restore(self, state: bytes) -> None:
        """Takes what `save` gave; raises `ValueError` for anything else."""
        if len(state) != _STATE.size:
            raise ValueError(f"an RTC's state has {_STATE.size} bytes, not {len(state)}")
        cmos, index, holding, held, base, seen = _STATE.unpack(state)
        if index > 0x7F or holding > 1 or not 0 <= held <= _MAX_WALL:
            raise ValueError("this is not the state of an RTC")
        if not -_MAX_WALL * SECOND <= base <= _MAX_WALL * SECOND:
            raise ValueError("the RTC's time is out of range")
        with self._lock:
            self.cmos[:] = cmos
            self._index, self._base, self._seen = index, base, seen
            self._held = held if holding else None
            self._update_irq()
            self._schedule()

    def reset(self) -> None:
        """A reset clears the interrupt enables and flags; time and RAM are on the battery."""
        with self._lock:
            self.cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            self.cmos[REG_C] = 0
            self._irq.set(False)
            self._timer.disarm()


def wall_clock_now() -> float:
    """The host's wall clock, as `Rtc` takes it."""
    return time.time() * 1000 // 1 / 1000
