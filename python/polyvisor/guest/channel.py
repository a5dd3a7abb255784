"""The host's side of the frames that a guest's init and agent send and take (see guest/channel.h).

Pure: bytes in, events out; nothing here waits or knows a machine.
"""

from __future__ import annotations

import struct

from polyvisor.errors import GuestError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

HEADER = 3
MAX_PAYLOAD = 0xFFFF
#: Stdin goes out in frames of at most this size, so that signals do not wait behind a long one.
STDIN_FRAME = 1024
_READY = b"R\x08\x00PVX1"


class Ready(Record):
    """Init listens."""


class Output(Record):
    """Bytes that the command wrote."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class Ended(Record):
    """The command ended: its exit `status`, or the `signal` that killed it."""

    status: int
    signal: int = 0


class NotRun(Record):
    """The command could not be started, at `stage`, for the reason `errno` (Linux's numbers)."""

    stage: Literal["start", "directory", "exec", "module", "file"]
    errno: int
    #: The kernel module that could not be loaded; "" at other stages.
    module: str = ""


class FileInfo(Record):
    """What a file is that the agent is going to send (`mode`, times: as in `os.stat_result`)."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime: int


Event = Ready | Output | Ended | NotRun | FileInfo

_STAGES: tuple[Literal["start", "directory", "exec", "module", "file"], ...] = (
    "start",
    "directory",
    "exec",
    "module",
    "file",
)
_ERRNOS = 4096  # Linux's are smaller
_FILE_INFO = struct.Struct("<IIIQQ")
_SERIAL_ABUSE = (
    "the guest wrote something else than init's messages to its second serial port, which carries "
    "the command's output; do not use /dev/ttyS1 in the guest"
)


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """One frame; `payload` of at most MAX_PAYLOAD bytes."""
    return kind + struct.pack("<H", len(payload)) + payload


class Channel:
    """One command's stdin, stdout, stderr and end, over `send`, which must not block."""

    def __init__(
        self,
        send: Callable[[bytes], None],
        *,
        stdin_frame: int = STDIN_FRAME,
        abuse: str = _SERIAL_ABUSE,
    ) -> None:
        self._send = send
        self._stdin_frame = stdin_frame
        self._abuse = abuse
        self._received = bytearray()
        self._ready = False
        self._stdin = bytearray()
        self._stdin_ended = False
        self._end_sent = False
        self._credit = 0
        #: Stdin waits, whatever the credit, until this is False and `pump` is called.
        self.congested = False
        self._early: list[bytes] = []  # signals and sizes from before init listened

    @property
    def ready(self) -> bool:
        """Whether init has said that it listens."""
        return self._ready

    @property
    def unsent(self) -> int:
        """Bytes of stdin that wait for the guest to take what it has. A reader of a long stdin
        should pause while this is large."""
        return len(self._stdin)

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the guest's port; returns what they mean, in order.

        Raises `GuestError` (reason "channel") on bytes that init never sends: something else in the
        guest wrote to the port.
        """
        self._received += data
        if not self._ready:
            # A kernel may write to the port while it looks what kind it is.
            start = self._received.find(_READY)
            if start < 0:
                del self._received[: -len(_READY)]
                return []
            del self._received[:start]
        events: list[Event] = []
        at = 0
        while len(self._received) - at >= HEADER:
            kind, size = (
                self._received[at],
                int.from_bytes(self._received[at + 1 : at + 3], "little"),
            )
            if len(self._received) - at < HEADER + size:
                break
            payload = bytes(self._received[at + HEADER : at + HEADER + size])
            at += HEADER + size
            event = self._event(kind, payload)
            if event is not None:
                events.append(event)
        del self._received[:at]
        return events

    def request(self, records: bytes) -> None:
        """Tells an agent what to do (see guest/agent.c). It need not be ready."""
        for at in range(0, len(records), MAX_PAYLOAD):
            self._send(frame(b"q", records[at : at + MAX_PAYLOAD]))
        self._send(frame(b"b"))

    def write(self, data: bytes) -> None:
        """Queues stdin; it goes out as the guest gives credit."""
        self._stdin += data
        self.pump()

    def end_input(self) -> None:
        """The end of stdin, behind what was queued."""
        self._stdin_ended = True
        self.pump()

    def signal(self, number: int) -> None:
        """Sends the command (its process group) a signal."""
        self._control(frame(b"s", bytes([number])))

    def resize(self, rows: int, columns: int) -> None:
        """Tells the command's terminal its size."""
        size = struct.pack("<HH", min(rows, 0xFFFF), min(columns, 0xFFFF))
        self._control(frame(b"w", size))

    def _event(self, kind: int, payload: bytes) -> Event | None:
        match chr(kind), len(payload):
            case "R", 8:
                self._ready = True
                self._credit = int.from_bytes(payload[4:], "little")
                for early in self._early:
                    self._send(early)
                self._early.clear()
                self.pump()
                return Ready()
            case "c", 4:
                self._credit += int.from_bytes(payload, "little")
                self.pump()
                return None
            case "o", _:
                return Output("stdout", payload)
            case "r", _:
                return Output("stderr", payload)
            case "x", 2:
                killed, status = payload
                return Ended(0, status) if killed else Ended(status)
            case "f", size if size >= 5 and payload[0] < len(_STAGES):
                number = int.from_bytes(payload[1:5], "little")
                if number < _ERRNOS:
                    name = payload[5:].decode("utf-8", "replace")
                    return NotRun(_STAGES[payload[0]], number, name)
            case "z", _FILE_INFO.size:
                return FileInfo(*_FILE_INFO.unpack(payload))
        raise GuestError(self._abuse, reason="channel")

    def _control(self, data: bytes) -> None:
        if self._ready:
            self._send(data)
        else:
            self._early.append(data)

    def pump(self) -> None:
        """Sends the stdin for which there is credit."""
        while self._stdin and self._credit and not self.congested:
            part = bytes(self._stdin[: min(self._credit, self._stdin_frame)])
            del self._stdin[: len(part)]
            self._credit -= len(part)
            self._send(frame(b"i", part))
        if self._stdin_ended and not self._stdin and self._ready and not self._end_sent:
            self._end_sent = True
            self._send(frame(b"e"))
