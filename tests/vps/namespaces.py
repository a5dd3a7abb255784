"""Network namespaces for tests: one plays the host, whose own network stays as it is."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 10.0  # seconds
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace that a sleeping process holds; `close` ends both."""

    def __init__(self) -> None:
        command = ["unshare", "-n", "sh", "-c", "echo ready; exec sleep 300"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        self.fd = os.open(f"/proc/{self.process.pid}/ns/net", os.O_RDONLY)

    def run(self, action: Callable[[], T]) -> T:
        """The value of action(), called by a thread in the namespace."""
        values: list[T] = []
        raised: list[BaseException] = []

        def inside() -> None:
            try:
                assert _LIBC.setns(self.fd, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                values.append(action())
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]
        return values[0]

    def socket(self, family: int, kind: int) -> socket.socket:
        made = self.run(lambda: socket.socket(family, kind))
        made.settimeout(PATIENCE)
        return made

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listen(where: Namespace, address: str, port: int) -> socket.socket:
    server = where.socket(family_of(address), socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen()
    return server


def ask(
    where: Namespace, server: socket.socket, address: str, port: int, source: str = ""
) -> tuple[bytes, str]:
    """What reaches `server` when `where` connects to (address, port) and says something, and the
    address that it came from. The answer is checked here."""
    with where.socket(family_of(address), socket.SOCK_STREAM) as client:
        if source:
            client.bind((source, 0))
        client.connect((address, port))
        there, peer = server.accept()
        with there:
            there.settimeout(PATIENCE)
            client.sendall(b"hello")
            said = there.recv(16)
            there.sendall(b"answer")
            assert client.recv(16) == b"answer"
    return said, peer[0]


def tell(where: Namespace, server: socket.socket, address: str, port: int) -> tuple[bytes, str]:
    """The same by UDP."""
    with where.socket(family_of(address), socket.SOCK_DGRAM) as client:
        client.connect((address, port))  # so that the answer must come from there
        client.send(b"hello")
        said, peer = server.recvfrom(16)
        server.sendto(b"answer", peer)
        assert client.recv(16) == b"answer"
    return said, peer[0]
