"""Networks of VPSs, with real peers: namespaces that play the host, VPSs and another machine."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from namespaces import Namespace, ask, listen, tell

from leftovers import Leftovers
from polyvisor.errors import ConfigError, HostError
from polyvisor.vps import network, network_links, network_rules
from polyvisor.vps.network import Network

root = pytest.mark.needs_root


class Host:
    """A namespace that plays the host, and those of its VPSs."""

    def __init__(self) -> None:
        self.space = Namespace()
        self.vpses: dict[int, Namespace] = {}
        self.run(lambda: links("set", ifname="lo", state="up"))

    def run(self, action: Callable[[], object]) -> object:
        return self.space.run(action)

    def start(self, number: int, net: Network) -> Namespace:
        space = self.vpses[number] = Namespace()
        self.record = self.run(lambda: network.connect("web", number, space.fd, net))
        return space

    def seen(self) -> object:
        """Everything that a network can leave behind."""

        def look() -> object:
            from pyroute2 import IPRoute

            with IPRoute() as netlink:
                names = sorted(link.get_attr("IFLA_IFNAME") for link in netlink.get_links())
            forwarding = [
                Path("/proc/sys/net", where).read_text()
                for where in ("ipv4/ip_forward", "ipv6/conf/all/forwarding")
            ]
            return names, network_rules.tables(), forwarding

        return self.run(look)

    def close(self) -> None:
        for space in [*self.vpses.values(), self.space]:
            space.close()


def links(command: str, **what: object) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        if command != "add":
            what["index"] = netlink.link_lookup(ifname=what.pop("ifname"))[0]
        netlink.link(command, **what)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


TWO = ["10.9.0.2/24", "fd00:9::2/64"]
THREE = ["10.9.0.3/24", "fd00:9::3/64"]


@root
def test_vpses_reach_each_other_and_the_host(host: Host) -> None:
    one = host.start(1, Network(addresses=[*TWO, "10.8.0.2/16"]))
    two = host.start(2, Network(addresses=THREE))
    for server_in, client_in, address, source in [
        (one, two, "10.9.0.2", "10.9.0.3"),
        (two, one, "10.9.0.3", "10.9.0.2"),
        (one, two, "fd00:9::2", "fd00:9::3"),
        (two, one, "fd00:9::3", "fd00:9::2"),
        (one, host.space, "10.9.0.2", "10.9.0.1"),
        (one, host.space, "10.8.0.2", "10.8.0.1"),
        (one, host.space, "fd00:9::2", "fd00:9::1"),
        (host.space, one, "10.9.0.1", "10.9.0.2"),
        (host.space, two, "fd00:9::1", "fd00:9::3"),
        (one, one, "127.0.0.1", "127.0.0.1"),
        # Of two prefixes: by the bridge's addresses.
        (one, two, "10.8.0.2", "10.9.0.3"),
    ]:
        with listen(server_in, address, 80) as server:
            assert ask(client_in, server, address, 80) == (b"hello", source)


@root
@pytest.mark.parametrize(("protocol", "bridged"), [("tcp", "1"), ("tcp", "0"), ("udp", "0")])
def test_published_ports(host: Host, protocol: str, bridged: str) -> None:
    # With 1 what goes from port to port of a bridge meets the rules of IP, too.
    bridge_rules = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if host.run(bridge_rules.exists):
        host.run(lambda: bridge_rules.write_text(bridged))
    elif bridged == "1":
        pytest.skip("the kernel has no br_netfilter")
    # Another machine, on a wire to the host.
    outside = Namespace()
    host.vpses[0] = outside
    host.run(lambda: links("add", ifname="wire", kind="veth",
                           peer={"ifname": "wire", "net_ns_fd": outside.fd}))  # fmt: skip
    for space, last in ((host.space, 1), (outside, 2)):
        space.run(lambda last=last: configure("wire", f"192.0.2.{last}", 24))
        space.run(lambda last=last: configure("wire", f"2001:db8::{last}", 64))
    publish = [("", 8080, 80, protocol), ("192.0.2.1", 8081, 81, protocol)]
    web = host.start(1, Network(addresses=TWO, publish=publish))
    other = host.start(2, Network(addresses=THREE))
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    say = ask if protocol == "tcp" else tell
    servers = {}
    for port in (80, 81):
        servers[port] = web.socket(socket.AF_INET6, kind)
        servers[port].bind(("::", port))
        if protocol == "tcp":
            servers[port].listen()
    try:
        neighbour = "::ffff:10.9.0.3" if bridged == "1" else "::ffff:10.9.0.1"
        for client, address, port, source in [
            (host.space, "127.0.0.1", 8080, "::ffff:10.9.0.1"),
            (host.space, "192.0.2.1", 8080, "::ffff:192.0.2.1"),
            (host.space, "10.9.0.1", 8080, "::ffff:10.9.0.1"),
            (host.space, "2001:db8::1", 8080, "2001:db8::1"),
            (host.space, "192.0.2.1", 8081, "::ffff:192.0.2.1"),
            (outside, "192.0.2.1", 8080, "::ffff:192.0.2.2"),
            (outside, "2001:db8::1", 8080, "2001:db8::2"),
            (outside, "192.0.2.1", 8081, "::ffff:192.0.2.2"),
            (other, "10.9.0.1", 8080, neighbour),
            (other, "192.0.2.1", 8081, neighbour),
        ]:
            found = say(client, servers[80 if port == 8080 else 81], address, port)
            assert found == (b"hello", source), (address, port)
        # Published at one address only; and the private network is no part of the outside's.
        if protocol == "tcp":
            for client, address, port in [
                (host.space, "127.0.0.1", 8081),
                (outside, "192.0.2.1", 80),
            ]:
                with pytest.raises(ConnectionRefusedError):
                    ask(client, servers[81], address, port)
            outside.run(lambda: route("10.9.0.0/24", "192.0.2.1"))
            with outside.socket(socket.AF_INET, kind) as client:
                client.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    client.connect(("10.9.0.2", 80))
            # To the outside a VPS is the host.
            with listen(outside, "192.0.2.2", 80) as server:
                assert ask(web, server, "192.0.2.2", 80) == (b"hello", "192.0.2.1")
    finally:
        for server in servers.values():
            server.close()


def configure(name: str, address: str, prefix: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        index = netlink.link_lookup(ifname=name)[0]
        netlink.link("set", index=index, state="up")
        options = {"flags": 2} if ":" in address else {}
        netlink.addr("add", index=index, address=address, prefixlen=prefix, **options)


def route(to: str, gateway: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        netlink.route("add", dst=to, gateway=gateway)


@root
def test_a_vps_keeps_to_its_addresses(host: Host) -> None:
    one = host.start(1, Network(addresses=TWO))
    host.start(2, Network(addresses=THREE))
    one.run(lambda: configure("eth0", "10.9.0.77", 24))
    one.run(lambda: configure("eth0", "fd00:9::77", 64))
    for stolen, own, there in [
        ("10.9.0.77", "10.9.0.2", "10.9.0.1"),
        ("fd00:9::77", "fd00:9::2", "fd00:9::1"),
    ]:
        with listen(host.space, there, 80) as server:
            assert ask(one, server, there, 80, source=own)[1] == own
            server.settimeout(0.5)
            with one.socket(server.family, socket.SOCK_STREAM) as client:
                client.settimeout(0.5)
                client.bind((stolen, 0))
                with pytest.raises(TimeoutError):
                    client.connect((there, 80))
        # Nor does it answer for that address: neither ARP nor neighbour discovery find it.
        with (
            host.space.socket(server.family, socket.SOCK_STREAM) as client,
            listen(one, stolen, 80),
        ):
            client.settimeout(0.5)
            with pytest.raises(OSError, match=r"timed out|No route|unreachable"):
                client.connect((stolen, 80))


@root
def test_the_host_loopback_stays_its_own(host: Host) -> None:
    one = host.start(1, Network(addresses=TWO, publish=[("", 8080, 80, "tcp")]))
    one.run(lambda: Path("/proc/sys/net/ipv4/conf/eth0/route_localnet").write_text("1"))
    one.run(lambda: links("set", ifname="lo", state="down"))
    one.run(lambda: route("127.0.0.0/8", "10.9.0.1"))
    with listen(host.space, "127.0.0.1", 80), one.socket(2, socket.SOCK_STREAM) as client:
        client.settimeout(0.5)
        client.bind(("10.9.0.2", 0))
        with pytest.raises(OSError, match=r"timed out|unreachable|Invalid"):
            client.connect(("127.0.0.1", 80))


@root
def test_everything_is_removed(host: Host) -> None:
    before = host.seen()
    left = Leftovers()
    net = Network(addresses=TWO, publish=[("", 8080, 80, "tcp")])
    first = host.start(1, net)
    first_record = host.record
    second = host.start(2, Network(addresses=THREE))
    assert host.run(lambda: network.leftovers([])) == [{"id": 1}, {"id": 2}]
    assert host.run(lambda: network.leftovers([2])) == [{"id": 1}]
    host.run(lambda: network.disconnect(host.record))
    with listen(first, "10.9.0.2", 80) as server:  # the other one's still works
        assert ask(host.space, server, "127.0.0.1", 8080)[0] == b"hello"
    assert isinstance(first_record, dict)
    for _ in range(2):
        host.run(lambda: network.disconnect({"id": 1}))
    assert host.seen() == before
    assert host.run(lambda: network.leftovers([])) == []
    first.close()
    second.close()
    left.check()


STEPS = [
    (network_rules, "replace"),
    (network_links, "_write"),
    (network_links, "_delete"),
    (network_links, "_set"),
]


def killed(action: Callable[[], object], calls: int) -> bool:
    """Whether a process that does `action` was killed, as it is before its step number `calls`."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    try:
        counted = itertools.count()

        def mortal(real: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object) -> object:
                if next(counted) == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            return step

        for module, name in STEPS:
            setattr(module, name, mortal(getattr(module, name)))
        action()
        os._exit(0)
    finally:
        os._exit(1)


@root
@pytest.mark.parametrize("cleaned", [True, False])
def test_killed_at_every_step(host: Host, cleaned: bool) -> None:
    """What a killed process left is found and removed; or the next one builds upon it."""
    before = host.seen()

    net = Network(addresses=TWO, publish=[("", 8080, 80, "tcp")])
    actions: dict[str, Callable[[], object]] = {
        "connect": lambda: network.connect("web", 1, host.vpses[1].fd, net),
        "disconnect": lambda: network.disconnect({"id": 1}),
    }
    for what, least in (("connect", 8), ("disconnect", 4)):
        calls = 0
        if what == "connect":
            host.vpses[1] = Namespace()
        while host.run(lambda what=what, calls=calls: killed(actions[what], calls)):
            calls += 1
            if what == "connect":
                host.vpses[1].close()
                host.vpses[1] = Namespace()
                if cleaned:
                    host.run(actions["disconnect"])
                    assert host.seen() == before
        assert calls >= (least if cleaned else 1)
        if what == "connect":
            with listen(host.vpses[1], "10.9.0.2", 80) as server:
                assert ask(host.space, server, "127.0.0.1", 8080)[0] == b"hello"
    assert host.seen() == before


@root
def test_the_end_of_a_vps_takes_its_interface_along(host: Host) -> None:
    before = host.seen()
    space = host.start(1, Network(addresses=TWO))
    space.close()
    host.run(lambda: network.disconnect({"id": 1}))
    assert host.seen() == before


@root
def test_a_bridge_of_the_administrator_stays(host: Host) -> None:
    host.run(lambda: links("add", ifname="br0", kind="bridge"))
    host.run(lambda: configure("br0", "10.9.0.1", 24))
    before = host.seen()
    one = host.start(1, Network(addresses=["10.9.0.2/24"], bridge="br0"))
    with listen(host.space, "10.9.0.1", 80) as server:
        assert ask(one, server, "10.9.0.1", 80)[0] == b"hello"
    host.run(lambda: network.disconnect(host.record))
    assert host.seen() == before
    with pytest.raises(HostError, match="no bridge"):
        host.start(2, Network(addresses=["10.9.0.2/24"], bridge="lo"))
    assert host.seen() == before


def test_without_a_network() -> None:
    record = network.connect("web", 1, -1, Network(mode="none"))
    assert record == {"id": 1, "name": "web", "mode": "none", "addresses": []}
    network.disconnect(record)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("mode", {"mode": "bridged"}),
        ("addresses", {"addresses": ["10.9.0.300/24"]}),
        ("addresses", {"addresses": ["10.9.0.2"]}),
        ("addresses", {"addresses": ["10.9.0.1/24"]}),
        ("addresses", {"addresses": ["10.9.0.0/24"]}),
        ("addresses", {"addresses": ["10.9.0.255/24"]}),
        ("addresses", {"addresses": ["10.9.0.2/24", "10.9.0.2/16"]}),
        ("addresses", {"mode": "none", "addresses": ["10.9.0.2/24"]}),
        ("addresses", {"mode": "host"}),
        ("bridge", {"bridge": "a-name-that-is-too-long"}),
        ("bridge", {"bridge": "a/b"}),
        ("publish", {"publish": [("", 80, 80, "tcp")]}),
        ("publish", {"addresses": TWO, "publish": [("", 80, 80, "sctp")]}),
        ("publish", {"addresses": TWO, "publish": [("", 0, 80, "tcp")]}),
        ("publish", {"addresses": TWO, "publish": [("", 80, 65536, "tcp")]}),
        ("publish", {"addresses": TWO, "publish": [("x", 80, 80, "tcp")]}),
        ("publish", {"addresses": TWO, "publish": [("", 80)]}),
        ("publish", {"addresses": TWO[:1], "publish": [("::1", 80, 80, "tcp")]}),
        ("publish", {"addresses": TWO, "publish": [("", 80, 1, "tcp"), ("", 80, 2, "tcp")]}),
    ],
)
def test_what_cannot_be_used(field: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        network.validated(Network(**values))
    assert caught.value.field == field


port_numbers = st.integers(1, 65535)
hosts = st.one_of(st.just(""), st.ip_addresses().map(str))


@settings(max_examples=100)
@given(hosts, port_numbers, port_numbers, st.sampled_from(["tcp", "udp"]))
def test_published_ports_as_text(host: str, host_port: int, port: int, protocol: str) -> None:
    text = f"[{host}]:" if ":" in host else f"{host}:" if host else ""
    text += f"{host_port}:{port}"
    assert network.parse_publish(f"{text}/{protocol}") == (host, host_port, port, protocol)
    assert network.parse_publish(text)[3] == "tcp"


@pytest.mark.parametrize("text", ["", "80", "80:", ":80", "a:b", "80:80:x", "-1:80"])
def test_text_that_publishes_nothing(text: str) -> None:
    with pytest.raises(ConfigError):
        network.parse_publish(text)


def test_importing_stays_fast() -> None:
    code = "import sys, polyvisor.vps.network, polyvisor.vps.network_links; "
    code += "print([n for n in sys.modules if 'pyroute2' in n or n == 'asyncio'])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert output == b"[]\n"
