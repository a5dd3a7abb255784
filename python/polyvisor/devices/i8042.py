"""The PC's keyboard controller with nothing plugged in, at ports 0x60 (offset 0) and 0x64 (offset
4).

Its uses here: the reset pulse (command 0xFE) with which Linux reboots, the A20 bit of the output
port, and quick correct answers, so that a guest finds out at once that there is neither keyboard
nor mouse. Without devices it interrupts nobody. (IBM PS/2 Hardware Interface Technical Reference,
"Keyboard and Auxiliary Device Controller".)
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DATA, STATUS = 0, 4

STATUS_OUTPUT_FULL = 0x01
STATUS_SYSTEM = 0x04
STATUS_COMMAND = 0x08
STATUS_NOT_LOCKED = 0x10
STATUS_AUX_DATA = 0x20
STATUS_TIMEOUT = 0x40

#: Output port: bit 0 is the reset line (1: not asserted), bit 1 the A20 gate.
PORT_NO_RESET = 0x01
PORT_A20 = 0x02

#: Command byte: both interrupts off, both interfaces disabled, system flag.
COMMAND_SYSTEM = 0x04
COMMAND_KEYBOARD_OFF = 0x10
COMMAND_AUX_OFF = 0x20

_RESEND = 0xFE
_MAX_ANSWERS = 16
_STATE = struct.Struct("<32sBHB")  # RAM, output port, awaiting (0x100: none), last was a command


class I8042:
    """`reset` is called when the guest pulses the reset line, `a20` when it moves the A20 gate."""

    def __init__(
        self, *, reset: Callable[[], None], a20: Callable[[bool], None] | None = None
    ) -> None:
        self._reset_machine = reset
        self._a20 = a20
        self.ram = bytearray(32)  # byte 0 is the command byte
        self.reset()

    def reset(self) -> None:
        """Power-on: self-test passed, interfaces disabled, A20 open."""
        self.ram[:] = bytes(32)
        self.ram[0] = COMMAND_SYSTEM | COMMAND_KEYBOARD_OFF | COMMAND_AUX_OFF
        self.output_port = PORT_NO_RESET | PORT_A20
        self._output: list[tuple[int, int]] = []  # (byte, status bits that come with it)
        self._awaiting: int | None = None  # the command whose data byte comes next
        self._last_was_command = False

    def save(self) -> bytes:
        """RAM, output port, the command that awaits data, and answers not yet read."""
        awaiting = 0x100 if self._awaiting is None else self._awaiting
        answers = bytes(byte for answer in self._output for byte in answer)
        head = _STATE.pack(bytes(self.ram), self.output_port, awaiting, self._last_was_command)
        return head + answers

    def restore(self, state: bytes) -> None:
        """Takes what `save` gave; raises `ValueError` for anything else."""
        answers = state[_STATE.size :]
        if len(state) < _STATE.size or len(answers) % 2 or len(answers) > 2 * _MAX_ANSWERS:
            raise ValueError("this is not the state of a keyboard controller")
        ram, port, awaiting, command = _STATE.unpack(state[: _STATE.size])
        if awaiting > 0x100 or command > 1:
            raise ValueError("this is not the state of a keyboard controller")
        self.ram[:] = ram
        self.output_port = port
        self._awaiting = None if awaiting == 0x100 else awaiting
        self._last_was_command = bool(command)
        self._output = list(zip(answers[::2], answers[1::2], strict=True))

    def read(self, offset: int, size: int) -> int:
        """The oldest answer, or the status."""
        if offset == STATUS:
            status = STATUS_NOT_LOCKED | (self.ram[0] & STATUS_SYSTEM)
            if self._last_was_command:
                status |= STATUS_COMMAND
            if self._output:
                status |= STATUS_OUTPUT_FULL | self._output[0][1]
            return status
        if offset == DATA:
            return self._output.pop(0)[0] if self._output else 0
        return -1

    def write(self, offset: int, size: int, value: int) -> None:
        """A command for the controller (offset 4) or data for it or a device (offset 0)."""
        value &= 0xFF
        if offset == STATUS:
            self._last_was_command = True
            self._command(value)
        elif offset == DATA:
            self._last_was_command = False
            self._data(value)

    def _answer(self, value: int, status: int = 0) -> None:
        if (
            len(self._output) < _MAX_ANSWERS
        ):  # a guest that never reads must not fill the host's memory
            self._output.append((value, status))

    def _command(self, command: int) -> None:
        self._awaiting = None
        if 0x20 <= command <= 0x3F:
            self._answer(self.ram[command & 0x1F])
        elif 0x60 <= command <= 0x7F or command in (0xD1, 0xD2, 0xD3, 0xD4):
            self._awaiting = command
        elif command == 0xA7:
            self.ram[0] |= COMMAND_AUX_OFF
        elif command == 0xA8:
            self.ram[0] &= ~COMMAND_AUX_OFF
        elif command in (0xA9, 0xAB):  # test of an interface's wires
            self._answer(0x00)
        elif command == 0xAA:  # self-test
            self.ram[0] |= COMMAND_SYSTEM
            self._output.clear()
            self._answer(0x55)
        elif command == 0xAD:
            self.ram[0] |= COMMAND_KEYBOARD_OFF
        elif command == 0xAE:
            self.ram[0] &= ~COMMAND_KEYBOARD_OFF
        elif command == 0xC0:  # input port: keyboard not inhibited
            self._answer(0x80)
        elif command == 0xD0:
            self._answer(self.output_port)
        elif command == 0xE0:  # test inputs: clock and data lines are high
            self._answer(0x03)
        elif command >= 0xF0:  # pulses the lines whose bits are 0; line 0 is reset
            if not command & 1:
                self._reset_machine()

    def _data(self, value: int) -> None:
        command, self._awaiting = self._awaiting, None
        if command is None:
            # For the keyboard, which is not there: the controller reports a timeout.
            if not self.ram[0] & COMMAND_KEYBOARD_OFF:
                self._answer(_RESEND, STATUS_TIMEOUT)
        elif 0x60 <= command <= 0x7F:
            self.ram[command & 0x1F] = value
        elif command == 0xD1:
            self._set_output_port(value)
        elif command == 0xD2:  # as if the keyboard had sent it
            self._answer(value)
        elif command == 0xD3:  # as if the mouse had sent it
            self._answer(value, STATUS_AUX_DATA)
        elif command == 0xD4:  # for the mouse, which is not there either
            self._answer(_RESEND, STATUS_TIMEOUT | STATUS_AUX_DATA)

    def _set_output_port(self, value: int) -> None:
        changed = (self.output_port ^ value) & PORT_A20
        self.output_port = value
        if changed and self._a20 is not None:
            self._a20(bool(value & PORT_A20))
        if not value & PORT_NO_RESET:
            self._reset_machine()
