"""Sockets: among the processes of one process VM always, to other machines if that is allowed."""

from __future__ import annotations

import socket
import threading

import pytest

from polyvisor import Process

AMONG_THEMSELVES = """
import asyncio, os, socket, threading
a, b = socket.socketpair(); a.send(b"x"); print(b.recv(9))
s = socket.create_server(("127.0.0.1", 0))
def serve():
    c, _ = s.accept(); c.sendall(c.recv(100)[::-1]); c.close()
t = threading.Thread(target=serve); t.start()
c = socket.create_connection(s.getsockname(), timeout=5)
c.sendall(b"hello"); print(c.recv(100)); t.join()
u = socket.socket(socket.AF_UNIX); u.bind("/tmp/u"); u.listen()
if not (pid := os.fork()):
    k = socket.socket(socket.AF_UNIX); k.connect("/tmp/u"); k.send(b"child"); os._exit(0)
k, _ = u.accept(); print(k.recv(10)); os.waitpid(pid, 0)
async def main():
    async def answer(r, w): w.write((await r.readline()).upper()); await w.drain(); w.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    r, w = await asyncio.open_connection(*server.sockets[0].getsockname())
    w.write(b"abc\\n"); print(await r.readline())
asyncio.run(main())
"""
CONNECT = """
import socket, sys
try: print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).recv(100))
except OSError as error: print(error.strerror)
"""


def test_among_themselves(engine: str) -> None:
    with Process(["python3", "-c", AMONG_THEMSELVES], engine=engine) as process:
        result = process.run(timeout=60)
    assert result.stderr == b""
    assert result.text.split() == ["b'x'", "b'olleh'", "b'child'", "b'ABC\\n'"]


def own_address() -> str:
    """Of this host, as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this host has no network")
        return str(probe.getsockname()[0])


def test_other_machines(engine: str) -> None:
    """The host by its address, which its loopback is not."""
    address = own_address()
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"from the host")

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        with Process(["python3", "-c", CONNECT, address, str(port)], engine=engine) as process:
            assert process.run(timeout=60).text == "Network is unreachable\n"
        with Process(
            ["python3", "-c", CONNECT, address, str(port)], engine=engine, network=True
        ) as process:
            assert process.run(timeout=60).text == "b'from the host'\n"
        thread.join()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with Process(
            ["python3", "-c", CONNECT, "127.0.0.1", str(port)], engine=engine, network=True
        ) as process:
            assert process.run(timeout=60).text == "Connection refused\n"
