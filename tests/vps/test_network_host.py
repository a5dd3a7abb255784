"""Chosen addresses of the host: what processes in the cgroup can, and what they cannot."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Namespace
from test_network import configure, links

from polyvisor.errors import ConfigError, HostError
from polyvisor.vps import network
from polyvisor.vps.network import Network

pytestmark = pytest.mark.needs_root


def unified() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    return None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    tree = unified()
    if tree is None:
        pytest.skip("no cgroup v2 tree is mounted")
    made = tree / f"pv-test-network-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


@pytest.fixture
def host() -> Iterator[Namespace]:
    space = Namespace()
    outside = Namespace()
    space.run(lambda: links("set", ifname="lo", state="up"))
    peer = {"ifname": "wire", "net_ns_fd": outside.fd}
    space.run(lambda: links("add", ifname="wire", kind="veth", peer=peer))
    for last in (1, 2, 3):
        space.run(lambda last=last: configure("wire", f"192.0.2.{last}", 24))
        space.run(lambda last=last: configure("wire", f"2001:db8::{last}", 64))
    outside.run(lambda: links("set", ifname="wire", state="up"))
    yield space
    outside.close()
    space.close()


# Each line of input is Python; what it evaluates to, or the number of its error, is the answer.
INSIDE = """
import json, socket, sys
from socket import *
sys.stdin.readline()
names = dict(globals())
for line in sys.stdin:
    try:
        answer = eval(line, names)
    except TimeoutError:
        answer = "timeout"
    except OSError as error:
        answer = error.errno
    print(json.dumps(answer, default=str), flush=True)
"""


class Inside:
    """A process in the cgroup that does what it is told."""

    def __init__(self, host: Namespace, cgroup: Path) -> None:
        command = [sys.executable, "-c", INSIDE]
        self.process = host.run(
            lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        (cgroup / "cgroup.procs").write_text(str(self.process.pid))
        self._send("go")

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def __call__(self, line: str) -> object:
        self._send(line)
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=10)


@pytest.fixture
def inside(host: Namespace, cgroup: Path) -> Iterator[Inside]:
    net = Network(mode="host", addresses=["192.0.2.2", "2001:db8::2", "192.0.2.3"])
    record = host.run(lambda: network.connect("web", 1, -1, net, str(cgroup)))
    made = Inside(host, cgroup)
    yield made
    made.close()
    host.run(lambda: network.disconnect(record))


EPERM = 1


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_bind(inside: Inside, kind: str) -> None:
    for family, address, expected in [
        ("AF_INET", "192.0.2.2", "192.0.2.2"),
        ("AF_INET", "192.0.2.3", "192.0.2.3"),
        ("AF_INET", "0.0.0.0", "192.0.2.2"),
        ("AF_INET", "127.0.0.1", "192.0.2.2"),
        ("AF_INET", "127.1.2.3", "192.0.2.2"),
        ("AF_INET", "192.0.2.1", EPERM),
        ("AF_INET6", "2001:db8::2", "2001:db8::2"),
        ("AF_INET6", "::", "2001:db8::2"),
        ("AF_INET6", "::1", "2001:db8::2"),
        ("AF_INET6", "2001:db8::1", EPERM),
        ("AF_INET6", "::ffff:192.0.2.1", EPERM),
    ]:
        made = f"s := socket({family}, {kind})"
        found = inside(f"(({made}), s.bind(('{address}', 0)), s.getsockname()[0])[2]")
        assert found == expected, (family, address)


def test_connect(inside: Inside, host: Namespace) -> None:
    with host.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
        server.bind(("::", 80))
        server.listen()
        for family, address, source in [
            ("AF_INET", "192.0.2.1", "::ffff:192.0.2.2"),
            ("AF_INET6", "2001:db8::1", "2001:db8::2"),
        ]:
            made = f"s := socket({family}, SOCK_STREAM)"
            assert inside(f"(({made}), s.settimeout(5), s.connect(('{address}', 80)))[2]") is None
            there, peer = server.accept()
            there.close()
            assert peer[0] == source
        # The host's services on its loopback interface are out of reach.
        with host.socket(socket.AF_INET, socket.SOCK_STREAM) as local:
            local.bind(("127.0.0.1", 81))
            local.listen()
            made = "s := socket(AF_INET, SOCK_STREAM)"
            line = f"(({made}), s.settimeout(5), s.connect(('127.0.0.1', 81)))[2]"
            assert inside(line) == 111  # ECONNREFUSED, by 192.0.2.2
    # What listens inside is reached by "localhost" from inside, and at its address from the host.
    assert inside("(t := socket(), t.bind(('', 82)), t.listen())[2]") is None
    line = "((s := socket()), s.settimeout(5), s.connect(('127.0.0.1', 82)), s.getpeername()[0])[3]"
    assert inside(line) == "192.0.2.2"
    with host.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.connect(("192.0.2.2", 82))


def test_a_socket_that_nobody_bound(inside: Inside, host: Namespace) -> None:
    """listen() takes a port of every address without asking bind's program."""
    port = inside("(t := socket(), t.listen(), t.getsockname()[1])[2]")
    assert isinstance(port, int)
    for address, reached in (("192.0.2.1", False), ("127.0.0.1", False), ("192.0.2.3", True)):
        with host.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(5 if reached else 0.5)
            refused = contextlib.nullcontext() if reached else pytest.raises(TimeoutError)
            with refused:
                client.connect((address, port))


def test_datagrams(inside: Inside, host: Namespace) -> None:
    for family, server_at, source in [
        (socket.AF_INET, "192.0.2.1", "192.0.2.2"),
        (socket.AF_INET6, "2001:db8::1", "2001:db8::2"),
    ]:
        with host.socket(family, socket.SOCK_DGRAM) as server:
            server.bind((server_at, 80))
            made = f"u := socket({int(family)}, SOCK_DGRAM)"
            line = f"(({made}), u.settimeout(5), u.sendto(b'hello', ('{server_at}', 80)))[2]"
            assert inside(line) == 5
            said, peer = server.recvfrom(16)
            assert (said, peer[0]) == (b"hello", source)
            server.sendto(b"answer", peer)
            assert inside("u.recv(16).decode()") == "answer"
    line = "((u := socket(AF_INET, SOCK_DGRAM)), u.bind(('192.0.2.3', 0)))[1]"
    assert inside(line) is None
    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("192.0.2.1", 80))
        assert inside("u.sendto(b'hello', ('192.0.2.1', 80))") == 5
        assert server.recvfrom(16)[1][0] == "192.0.2.3"


def test_a_family_without_an_address(host: Namespace, cgroup: Path) -> None:
    net = Network(mode="host", addresses=["192.0.2.2"])
    host.run(lambda: network.connect("web", 1, -1, net, str(cgroup)))
    inside = Inside(host, cgroup)
    try:
        assert inside("socket(AF_INET6, SOCK_STREAM).bind(('::', 0))") == EPERM
        assert inside("socket(AF_INET6, SOCK_STREAM).connect(('2001:db8::1', 80))") == EPERM
        assert inside("socket(AF_INET, SOCK_STREAM).bind(('', 0))") is None
    finally:
        inside.close()


def test_what_cannot_be_used(host: Namespace) -> None:
    net = Network(mode="host", addresses=["192.0.2.2"])
    with pytest.raises(HostError, match="cgroup v2"):
        host.run(lambda: network.connect("web", 1, -1, net, None))
    net = Network(mode="host", addresses=["192.0.2.9"])
    with pytest.raises(ConfigError, match="none of this host's") as caught:
        host.run(lambda: network.connect("web", 1, -1, net, None))
    assert caught.value.field == "addresses"
