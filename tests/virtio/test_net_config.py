"""What can be said of a network before a machine runs, and what is said of mistakes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from leftovers import Leftovers
from polyvisor.errors import ConfigError, HostError, StateMismatch
from polyvisor.machine import Machine
from polyvisor.virtio.net import Forward, parse, parse_mac


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory="16M", engine="soft") as made:
        yield made


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tcp:127.0.0.1:2222-:22", ("tcp", "127.0.0.1", 2222, "10.0.2.15", 22)),
        ("tcp::2222-:22", ("tcp", "127.0.0.1", 2222, "10.0.2.15", 22)),
        ("::2222-10.0.2.16:22", ("tcp", "127.0.0.1", 2222, "10.0.2.16", 22)),
        ("udp:0.0.0.0:53-:53", ("udp", "0.0.0.0", 53, "10.0.2.15", 53)),
        ("tcp::0-:80", ("tcp", "127.0.0.1", 0, "10.0.2.15", 80)),
    ],
)
def test_forwards(text: str, wanted: tuple[str, str, int, str, int]) -> None:
    forward = Forward.parse(text)
    assert forward.native() == wanted
    assert Forward.parse(str(forward)) == forward


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not begin with tcp: or udp:"),
        ("sctp::1-:2", "does not begin with tcp: or udp:"),
        ("tcp:127.0.0.1:2222", "has no '-'"),
        ("tcp::2222-22", "no ':' before the guest's port in '22'"),
        ("tcp:2222-:22", "no ':' before the host's port"),
        ("tcp::x-:22", "'x' for the host's port"),
        ("tcp::70000-:22", "'70000' for the host's port"),
        ("tcp::2222-:", "'' for the guest's port"),
        ("tcp::2222-:0", "has no port of the guest"),
        ("tcp:1.2.3:2222-:22", "'1.2.3', which is no IPv4 address"),
    ],
)
def test_wrong_forwards(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Forward.parse(text)
    assert complaint in str(caught.value)
    assert caught.value.field == "forward"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("user", {"backend": "user"}),
        ("none", {"backend": "none"}),
        ("tap,ifname=tap0,queues=2", {"backend": "tap", "tap": "tap0", "queues": 2}),
        ("stream,path=/a,listen=on", {"backend": "stream", "socket": "/a", "listen": True}),
        ("dgram,path=/a,peer=/b", {"backend": "dgram", "socket": "/a", "peer": "/b"}),
        (
            "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53,restrict=on",
            {
                "backend": "user",
                "forward": [Forward.parse("tcp::2222-:22"), Forward.parse("udp::53-:53")],
                "restrict": True,
            },
        ),
        (
            "user,mac=52:54:00:00:00:01,mtu=1400,queues=2,packed=on,transport=mmio,capture=a.pcap",
            {
                "backend": "user",
                "mac": "52:54:00:00:00:01",
                "mtu": 1400,
                "queues": 2,
                "packed": True,
                "transport": "mmio",
                "capture": "a.pcap",
            },
        ),
    ],
)
def test_command_line(text: str, wanted: dict[str, Any]) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "begins with ''"),
        ("bridge", "begins with 'bridge'; a network is one of "),
        ("user,speed=3", "an option 'speed'; user knows "),
        ("none,restrict=on", "an option 'restrict'; none knows "),
        ("user,restrict", "no value for 'restrict'"),
        ("user,restrict=", "no value for 'restrict'"),
        ("user,restrict=maybe", "'maybe' for 'restrict', which is on or off"),
        ("user,mtu=x", "'x' for 'mtu', which is a number"),
        ("user,mtu=1400,mtu=1500", "'mtu' twice"),
        ("user,mac=1:2:3", "'1:2:3' is no MAC address"),
        ("user,hostfwd=tcp:22", "has no '-'"),
    ],
)
def test_wrong_command_lines(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert complaint in str(caught.value)


def test_mac_addresses(machine: Machine) -> None:
    assert parse_mac("52-54-0-12-34-56") == bytes.fromhex("525400123456")
    net = machine.add_net("none", mac="52:54:00:12:34:56")
    assert net.mac == "52:54:00:12:34:56"
    assert machine.add_net("none").mac != machine.add_net("none").mac
    with pytest.raises(ConfigError, match="belongs to a group") as caught:
        machine.add_net("none", mac="01:54:00:12:34:56")
    assert caught.value.field == "mac"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"backend": "wire"}, "backend"),
        ({"backend": 7}, "backend"),
        ({"backend": "none", "forward": ["tcp::1-:2"]}, "forward"),
        ({"backend": "none", "restrict": True}, "restrict"),
        ({"tap": "tap0"}, "tap"),
        ({"backend": "stream"}, "socket"),
        ({"backend": "dgram", "socket": "/x"}, "peer"),
        ({"backend": "dgram", "socket": "/x", "listen": True}, "listen"),
        ({"queues": 0}, "queues"),
        ({"queues": 17}, "queues"),
        ({"mtu": 10}, "mtu"),
        ({"mtu": 70000}, "mtu"),
        ({"transport": "isa"}, "transport"),
    ],
)
def test_wrong_arguments(machine: Machine, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        machine.add_net(**arguments)
    assert caught.value.field == field


def test_capture_that_cannot_be(machine: Machine) -> None:
    with pytest.raises(HostError, match="cannot write the capture file '/nowhere/x'"):
        machine.add_net("none", capture="/nowhere/x")


def test_forwarded_ports(machine: Machine) -> None:
    """Ports are taken when they are forwarded, given back when not, and a taken one is told by its
    name."""
    net = machine.add_net(forward=["tcp::0-:22"])
    (ssh,) = net.forwards
    assert ssh.host_port != 0
    with pytest.raises(ConfigError, match=f"tcp:127.0.0.1:{ssh.host_port} is taken") as caught:
        net.add_forward(f"tcp::{ssh.host_port}-:23")
    assert caught.value.field == "forward"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"tcp:127.0.0.1:{port} is taken"):
            machine.add_net(forward=[f"tcp::{port}-:22"])
    udp = net.add_forward("udp::0-:53")
    assert net.forwards == [ssh, udp]
    net.remove_forward(ssh)
    assert net.forwards == [udp]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ssh.host_port), 5).close()
    with pytest.raises(ConfigError, match=r"no port tcp:.* is forwarded"):
        net.remove_forward(ssh)
    with pytest.raises(StateMismatch, match="only a user network forwards ports"):
        machine.add_net("none").add_forward("tcp::0-:22")


def test_many_networks() -> None:
    """Each machine may have many, and none leaves anything behind."""
    before = Leftovers()
    for _ in range(3):
        with Machine(memory="16M", engine="soft") as machine:
            nets = [machine.add_net(forward=["tcp::0-:22", "udp::0-:22"]) for _ in range(8)]
            ports = {forward.host_port for net in nets for forward in net.forwards}
            assert len(ports) >= 8
    with pytest.raises(StateMismatch, match="closed"):
        _ = nets[0].link
    before.check()
