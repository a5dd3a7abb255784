"""What can be asked of a machine, as data: one vocabulary for command lines, files and services.

    action = actions.decode(b'{"action": "send_console", "text": "reboot\\\\n"}')
    answer = actions.apply(machine, action)

Each action is a struct, checked when it is decoded; `apply` is the only place that says what each
one does. To add one: write the struct, add it to `Action`, and give it a case in `apply`.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import msgspec

from polyvisor.errors import ConfigError
from polyvisor.records import asdict

if TYPE_CHECKING:
    from polyvisor.machine import Machine


class _Action(
    msgspec.Struct,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="action",
    tag=lambda name: "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_"),
):
    """The base of all actions: what is common is only how they are written."""


class Start(_Action):
    """Starts the CPUs."""


class Pause(_Action):
    """Holds all CPUs and virtual time."""


class Resume(_Action):
    """Goes on after a pause."""


class Stop(_Action):
    """Ends the machine. Answer: how it ended."""


class PowerButton(_Action):
    """Presses the power button."""


class Wait(_Action):
    """Waits for the end. Answer: how it ended; none when `timeout` seconds are over."""

    timeout: float | None = None


class Nmi(_Action):
    """Sends a non-maskable interrupt."""

    cpu: int = 0


class SendConsole(_Action):
    """Types at a serial port."""

    text: str
    port: int = 0


class ReadConsole(_Action):
    """Answer: what a serial port said since it was last read; waits up to `timeout` seconds."""

    port: int = 0
    timeout: float = 0.0


class ReadMemory(_Action):
    """Answer: `size` bytes of guest memory in base64."""

    gpa: int
    size: int


class WriteMemory(_Action):
    """Stores bytes, given in base64."""

    gpa: int
    data: str


class ReadRegisters(_Action):
    """Answer: all registers of a CPU by name; it must stand still."""

    cpu: int = 0


class WriteRegisters(_Action):
    """Sets registers of a CPU by name; it must stand still."""

    values: dict[str, int]
    cpu: int = 0


class Describe(_Action):
    """Answer: name, state, engine, CPUs, memory, virtual time and counters."""


Action = (
    Start
    | Pause
    | Resume
    | Stop
    | PowerButton
    | Wait
    | Nmi
    | SendConsole
    | ReadConsole
    | ReadMemory
    | WriteMemory
    | ReadRegisters
    | WriteRegisters
    | Describe
)

#: Memory that one action moves at most: the answer is built as a whole.
MAX_BYTES = 16 << 20


def decode(data: bytes | str) -> Action:
    """An action from JSON; raises `ConfigError` when it is none."""
    try:
        action: Action = msgspec.json.decode(data, type=Action)
    except msgspec.DecodeError as error:
        raise ConfigError(f"this is not an action: {error}", field="action") from None
    return action


def encode(action: Action) -> bytes:
    """An action as JSON."""
    return msgspec.json.encode(action)


def apply(machine: Machine, action: Action) -> Any:
    """Does it, and returns the answer as plain data, for most None.

    Raises what the machine raises.
    """
    match action:
        case Start():
            machine.start()
        case Pause():
            machine.pause()
        case Resume():
            machine.resume()
        case Stop():
            return asdict(machine.stop())
        case PowerButton():
            machine.power_button()
        case Wait(timeout=timeout):
            info = machine.wait(timeout)
            return asdict(info) if info is not None else None
        case Nmi(cpu=cpu):
            machine.cpu(cpu).nmi()
        case SendConsole(text=text, port=port):
            machine.serial(port).send(text)
        case ReadConsole(port=port, timeout=limit):
            return machine.serial(port).read(limit)
        case ReadMemory(gpa=gpa, size=size):
            if not 0 <= size <= MAX_BYTES:
                raise ConfigError(f"size is {size}, but at most {MAX_BYTES} fit", field="size")
            return base64.b64encode(machine.memory.read(gpa, size)).decode()
        case WriteMemory(gpa=gpa, data=data):
            try:
                raw = base64.b64decode(data, validate=True)
            except ValueError as error:
                raise ConfigError(f"data is not base64: {error}", field="data") from None
            machine.memory.write(gpa, raw)
        case ReadRegisters(cpu=cpu):
            return machine.cpu(cpu).registers.as_dict()
        case WriteRegisters(cpu=cpu, values=values):
            machine.cpu(cpu).registers.apply(values)
        case Describe():
            return {
                "name": machine.name,
                "state": machine.state,
                "engine": machine.engine,
                "cpus": machine.cpus,
                "memory": machine.memory_size,
                "now": machine.now,
                "counters": machine.stats(),
            }
    return None
