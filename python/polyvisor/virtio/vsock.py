"""virtio-vsock: sockets between host and guest (virtio 1.2, 5.10). See docs/vsock.md."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from polyvisor import _native
from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from polyvisor.machine import Machine
    from polyvisor.virtio.disk import Transport

_LONGEST_ANSWER = len("OK 4294967295\n")


class Listener:
    """Takes a guest's connections to one port of the host; what `Vsock.listen` returns.

    A guest finds nobody there when more connections wait than the host's kernel keeps (some
    hundred), and once this is closed.
    """

    def __init__(self, channel: socket.socket, port: int) -> None:
        self._channel = channel
        self.port = port

    def accept(self, timeout: float | None = None) -> tuple[socket.socket, int]:
        """The next connection, and the guest's port. Raises `TimeoutError` after `timeout` seconds
        (None: never), `ConnectionAbortedError` when the machine has ended."""
        self._channel.settimeout(timeout)
        data, descriptors, _, _ = socket.recv_fds(self._channel, 4, 1)
        if not descriptors:
            raise ConnectionAbortedError(
                errno.ECONNABORTED, f"nobody will connect to port {self.port}: the machine ended"
            )
        return socket.socket(fileno=descriptors[0]), struct.unpack("=I", data)[0]

    def fileno(self) -> int:
        """To be waited for: readable when `accept` would not wait."""
        return self._channel.fileno()

    def close(self) -> None:
        """The port is free again."""
        self._channel.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Vsock:
    """The vsock of a machine; what `Machine.add_vsock` returns."""

    def __init__(self, native: _native.VirtioVsock) -> None:
        self._native = native

    def __repr__(self) -> str:
        path = f" at {self.path!r}" if self.path else ""
        return f"<Vsock {self.cid}{path}, virtio-{self._native.transport}>"

    @property
    def native(self) -> _native.VirtioVsock:
        """The bound C++ object: where it is plugged, how its driver is doing."""
        return self._native

    @property
    def cid(self) -> int:
        """The guest's context id."""
        return self._native.cid

    @property
    def path(self) -> str:
        """The socket of the host that programs connect to; "" for none."""
        return self._native.path

    @property
    def connections(self) -> int:
        """How many there are, counting those that are not yet, or no more, connected."""
        return self._native.connections

    def connect(self, port: int, timeout: float | None = 10.0) -> socket.socket:
        """A stream to the program of the guest that listens on `port`.

        Raises `ConnectionRefusedError` when none does (or the guest has no driver yet), and
        `TimeoutError` when the guest does not answer within `timeout` seconds.
        """
        stream = socket.socket(fileno=self._native.connect(_port(port)))
        try:
            answer = _first_line(stream, timeout)
            if not answer.startswith(b"OK "):
                raise ConnectionRefusedError(
                    errno.ECONNREFUSED, f"nobody in the guest listens on port {port}"
                )
            stream.settimeout(None)
        except BaseException:
            stream.close()
            raise
        return stream

    def listen(self, port: int) -> Listener:
        """Takes the guest's connections to `port` of the host, before any socket PATH_PORT. Raises
        `ConfigError` when the port is taken."""
        # Messages with a descriptor each; unlike a datagram socket, it hears of the other's end.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._native.listen(_port(port), theirs.detach())
        except BaseException:
            ours.close()
            raise
        return Listener(ours, port)


def add_vsock(
    machine: Machine,
    cid: int = 3,
    path: str | os.PathLike[str] | None = None,
    *,
    transport: Transport = "pci",
    packed: bool = False,
) -> Vsock:
    """See `Machine.add_vsock`."""
    if not 3 <= cid < 0xFFFFFFFF:
        raise ConfigError(f"a guest's CID is a number from 3 to 4294967294, not {cid}", field="cid")
    native = _native.VirtioVsock(
        machine.native,
        cid=cid,
        path=os.fspath(path) if path is not None else "",
        transport=transport,
        packed=packed,
    )
    return Vsock(native)


def _port(port: int) -> int:
    if not 0 <= port <= 0xFFFFFFFF:
        raise ConfigError(f"a vsock port is a number of 32 bits, not {port}", field="port")
    return port


def _first_line(stream: socket.socket, timeout: float | None) -> bytes:
    """What comes before the stream, byte by byte: the rest is not ours to read."""
    deadline = None if timeout is None else time.monotonic() + timeout
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER:
        if deadline is not None:
            stream.settimeout(max(deadline - time.monotonic(), 0.001))
        byte = stream.recv(1)
        if not byte:
            break
        line += byte
    return line
