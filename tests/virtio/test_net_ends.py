"""Taps and Unix sockets as a network card's other end, with Linux in the guests."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from net_peers import read_all, serving

import polyvisor
from polyvisor.errors import ConfigError, HostError
from polyvisor.machine import Machine
from polyvisor.virtio.net import Net

SIZE = 1 << 20
CLONE_NEWNET = 0x40000000


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def own_network() -> Iterator[None]:
    """A network namespace for the test's thread and those it starts; for root."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun")
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip("this root may not make network namespaces")
        yield
        assert libc.setns(before.fileno(), CLONE_NEWNET) == 0


def configure(interface: str, address: str) -> None:
    """Gives an interface an IPv4 address of /24, and switches it on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = interface.encode().ljust(16, b"\0")
        for request, value in ((0x8916, address), (0x891C, "255.255.255.0")):  # SIOCSIFADDR, -MASK
            inet = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, name + inet + bytes(8))
        fcntl.ioctl(control, 0x8914, name + struct.pack("=H22x", 1 | 64))  # SIOCSIFFLAGS: up


def delete(interface: str) -> None:
    """Deletes it, as `ip link del` does."""
    index = socket.if_nametoindex(interface)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
        netlink.send(struct.pack("=IHHII", 16 + len(body), 17, 5, 1, 0) + body)  # RTM_DELLINK
        assert struct.unpack_from("=i", netlink.recv(4096), 16) == (0,)


@pytest.mark.boot
@pytest.mark.needs_root
@pytest.mark.parametrize(("queues", "packed"), [(1, False), (2, True)])
@pytest.mark.usefixtures("own_network")
def test_tap(queues: int, packed: bool) -> None:
    """Data both ways through the host's kernel, which leaves checksums and segments to the card and
    takes them from it; then somebody deletes the interface."""
    data = random.Random(queues).randbytes(SIZE)
    nets: list[Net] = []
    uploads: list[str] = []

    def plug(machine: Machine) -> None:
        nets.append(machine.add_net("tap", tap="pv%d", queues=queues, packed=packed))
        configure(nets[0].backend.removeprefix("tap "), "10.7.0.1")

    def unplug(connection: socket.socket) -> None:
        before = time.thread_time()
        delete(nets[0].backend.removeprefix("tap "))
        time.sleep(0.1)
        assert not nets[0].link
        assert time.thread_time() - before < 0.09

    with serving(
        lambda connection: connection.sendall(data),
        lambda connection: uploads.append(md5(read_all(connection))),
        unplug,
        host="0.0.0.0",
    ) as (down, up, control):
        done = polyvisor.exec(
            ["sh", "-c", f"""
            ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up
            nc 10.7.0.1 {down} < /dev/null > /tmp/data; md5sum < /tmp/data
            nc 10.7.0.1 {up} < /tmp/data
            nc 10.7.0.1 {control} < /dev/null &
            while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.05; done; echo unplugged
            ping -c 1 -W 1 10.7.0.1 > /dev/null || echo gone
            """],
            on_machine=plug,
            cpus=2,
            timeout=60,
        )  # fmt: skip
    assert done.stdout.decode().splitlines() == [f"{md5(data)}  -", "unplugged", "gone"]
    assert uploads == [md5(data)]


@pytest.mark.needs_root
@pytest.mark.usefixtures("own_network")
def test_taps_that_cannot_be() -> None:
    with Machine(memory="16M", engine="soft") as machine:
        made = machine.add_net("tap", tap="pvtest")
        assert made.backend == "tap pvtest"
        with pytest.raises(HostError, match=r"cannot use the tap 'pvtest': .*another program"):
            machine.add_net("tap", tap="pvtest")
        with pytest.raises(HostError, match=r"cannot use the tap 'lo': .*is no tap"):
            machine.add_net("tap", tap="lo")
        with pytest.raises(ConfigError, match="a name has up to 15 characters"):
            machine.add_net("tap", tap="a" * 16)


Kind = Literal["stream", "dgram"]


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.parametrize("kind", ["stream", "dgram"])
def test_two_machines(kind: Kind, tmp_path: Path) -> None:
    """One machine fetches a megabyte from another; nothing but the socket is between them."""
    data = random.Random(kind).randbytes(SIZE)
    ready = threading.Event()
    here, there = tmp_path / "here", tmp_path / "there"

    def first(machine: Machine) -> None:
        if kind == "stream":
            net = machine.add_net("stream", socket=here, listen=True)
            assert not net.link  # nobody is there
        else:
            machine.add_net("dgram", socket=here, peer=there)
        ready.set()

    def second(machine: Machine) -> None:
        if kind == "stream":
            assert machine.add_net("stream", socket=here).link
        else:
            machine.add_net("dgram", socket=there, peer=here)

    def serve() -> None:
        polyvisor.exec(
            ["sh", "-c", "ip addr add 10.5.0.1/24 dev eth0; ip link set eth0 up; "
             "httpd -p 80 -h /www; nc -l -p 9 > /dev/null"],
            on_machine=first,
            files={"/www/data": data},
            timeout=60,
        )  # fmt: skip

    server = threading.Thread(target=serve)
    server.start()
    assert ready.wait(30)
    done = polyvisor.exec(
        ["sh", "-c", """
        ip addr add 10.5.0.2/24 dev eth0; ip link set eth0 up
        for i in 1 2 3 4 5 6 7 8 9 10; do
            wget -q -O /tmp/data http://10.5.0.1/data 2>/dev/null && break; sleep 0.3
        done
        md5sum < /tmp/data; nc 10.5.0.1 9 < /dev/null"""],
        on_machine=second,
        timeout=60,
    )  # fmt: skip
    server.join()
    assert done.stdout.decode() == f"{md5(data)}  -\n"
    assert not here.exists()


def test_stream_of_a_peer(tmp_path: Path) -> None:
    """Without a guest: peers come and go, and one that speaks something else is sent away."""
    path = tmp_path / "cable"
    with Machine(memory="16M", engine="soft") as machine:
        net = machine.add_net("stream", socket=path, listen=True)
        with pytest.raises(HostError, match="is in use by another program"):
            machine.add_net("stream", socket=path, listen=True)
        machine.start()  # the event loop runs; the CPU finds nothing to do

        def becomes(up: bool) -> bool:
            deadline = time.monotonic() + 10
            while net.link != up and time.monotonic() < deadline:
                time.sleep(0.005)
            return net.link == up

        for _ in range(3):
            assert becomes(False)
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                assert becomes(True)
                peer.sendall(struct.pack(">I", 60) + bytes(60))
        assert becomes(False)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            peer.sendall(b"GET / HTTP/1.0\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1) == b""
        assert becomes(False)
        assert net.statistics()["rx_dropped"] == 3  # nobody drives it
    assert not path.exists()
    path.touch()
    with Machine(memory="16M", engine="soft") as machine:
        with pytest.raises(HostError, match="cannot connect to the socket"):
            machine.add_net("stream", socket=path)
        with pytest.raises(ConfigError, match="cannot be a socket's path"):
            machine.add_net("stream", socket="x" * 200)


def test_stale_sockets_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with Machine(memory="16M", engine="soft") as machine:
        machine.add_net("stream", socket=path, listen=True)
