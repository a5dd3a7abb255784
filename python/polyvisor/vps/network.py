"""The network of a VPS: what it has (`Network`), putting it there, and taking it away again.

A private network is a network namespace with one interface, ``eth0``, whose other end ``pv<id>-0``
is a port of a bridge on the host (`network_links`); nftables publish ports, let the bridge's VPSs
out, and keep each to its addresses (`network_rules`). With mode "host" the VPS is in the host's
network namespace, and may use the addresses it was given (`network_host`).

All of it is state of the kernel, found by names that follow from the VPS's number. No process has
to live for it, and `disconnect` needs nothing but the number: see docs/vps-network.md.
"""

from __future__ import annotations

import ipaddress
import os

from polyvisor.errors import ConfigError
from polyvisor.records import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from typing import Any

    Publish = tuple[str, int, int, str]
    Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

MODES = ("private", "none", "host")
DEFAULT_BRIDGE = "pvbr0"
_MAX_NAME = 15  # IFNAMSIZ without its NUL


class Network(Record, kw_only=True):
    """What a VPS has of a network. Checked by `validated()`, not when constructed."""

    #: "private": a namespace with ``eth0`` on a bridge; "none": only the loopback interface;
    #: "host": the host's interfaces, of which only `addresses` may be used.
    mode: str = "private"
    #: IPv4 and IPv6 addresses: "10.9.0.2/24" with the length of the network's prefix when private,
    #: "192.0.2.7" (one of the host's own) with mode "host".
    addresses: Sequence[str] = ()
    #: The host's bridge. It is made when it is not there, with the first address of each network
    #: ("10.9.0.1"), which is the VPSs' gateway; and removed with its last VPS. One that was there
    #: is used as it is.
    bridge: str = DEFAULT_BRIDGE
    #: Ports of the host that lead to ports of the VPS: (the host's address or "" for all, the
    #: host's port, the VPS's port, "tcp" or "udp"). `parse_publish` makes one from text.
    publish: Sequence[Publish] = ()


def validated(network: Network) -> Network:
    """The same, with tuples for sequences and every address in its canonical form.

    Raises:
        ConfigError: a value cannot be used; `field` is its name.
    """
    if network.mode not in MODES:
        raise ConfigError(
            f"network mode {network.mode!r} is not one of {', '.join(MODES)}", field="mode"
        )
    addresses = tuple(_address(text, network.mode) for text in network.addresses)
    if len({address.ip for address in addresses}) != len(addresses):
        raise ConfigError("an address is given twice; give each once", field="addresses")
    if network.mode == "none" and (addresses or network.publish):
        raise ConfigError(
            "network mode 'none' has no addresses and publishes nothing; leave them out or choose "
            "'private'",
            field="addresses" if addresses else "publish",
        )
    if network.mode == "host" and (network.publish or not addresses):
        raise ConfigError(
            "network mode 'host' needs the addresses that may be used, and publishes nothing, as "
            "ports are the host's own there",
            field="publish" if network.publish else "addresses",
        )
    if not 0 < len(network.bridge) <= _MAX_NAME or any(c in " /:%" for c in network.bridge):
        raise ConfigError(
            f"bridge {network.bridge!r} is not an interface's name: 1 to {_MAX_NAME} characters "
            "without space, slash, colon or percent sign",
            field="bridge",
        )
    publish = tuple(_published(tuple(one), addresses) for one in network.publish)
    places = [one[:2] + one[3:] for one in publish]
    if len(set(places)) != len(places):
        raise ConfigError("a port of the host is published twice", field="publish")
    plain = "ip" if network.mode == "host" else "with_prefixlen"
    texts = tuple(str(getattr(address, plain)) for address in addresses)
    return replace(network, addresses=texts, publish=publish)


def parse_publish(text: str) -> Publish:
    """[ADDRESS:]HOST_PORT:PORT[/tcp|/udp], as ``--publish`` takes it, with an IPv6 address in
    brackets.

    Raises:
        ConfigError: the text is none of that.
    """
    place, _, protocol = text.partition("/")
    head, _, port = place.rpartition(":")
    address, _, host_port = head.rpartition(":")
    if not (port.isdecimal() and host_port.isdecimal()):
        raise ConfigError(
            f"{text!r} publishes no port: write [ADDRESS:]HOST_PORT:PORT[/udp], as in 8080:80",
            field="publish",
        )
    return address.removeprefix("[").removesuffix("]"), int(host_port), int(port), protocol or "tcp"


def connect(
    name: str, vps: int, namespace: int, network: Network, cgroup: str | None = None
) -> dict[str, Any]:
    """Gives VPS number `vps`, called `name`, its network, before it executes anything.

    `namespace` is a descriptor of its network namespace (not used with mode "host"), `cgroup` the
    path of its directory in the cgroup v2 tree (only used with mode "host"). Returns a record for
    `disconnect` that JSON can hold. What a VPS of this number left behind is replaced; when it
    fails nothing is left.

    Raises:
        ConfigError: see `validated`; an address that is not the host's with mode "host".
        HostError: the kernel refused (root is needed), or lacks what is needed.
    """
    network = validated(network)
    record: dict[str, Any] = {"id": vps, "name": name, "mode": network.mode}
    record["addresses"] = list(network.addresses)
    if network.mode == "none":
        return record
    if network.mode == "host":
        from polyvisor.vps import network_host

        network_host.confine(cgroup, network.addresses)
        return record
    from polyvisor.vps import network_links

    mac = ":".join(f"{byte:02x}" for byte in (0x02, *os.urandom(5)))
    record |= {"link": link_name(vps), "bridge": network.bridge, "mac": mac}
    record["publish"] = [list(one) for one in network.publish]
    interfaces = [ipaddress.ip_interface(text) for text in network.addresses]
    try:
        network_links.attach(vps, namespace, network.bridge, interfaces, mac, network.publish)
    except BaseException:
        disconnect(record)
        raise
    return record


def disconnect(record: dict[str, Any]) -> None:
    """Removes what `connect` made: all that belongs to ``record["id"]``, and the bridge with its
    last VPS. What is gone already is no error.

    Raises:
        HostError: the kernel refused.
    """
    if record.get("mode") in ("none", "host"):  # nothing, or with the cgroup, which has it
        return
    from polyvisor.vps import network_links

    network_links.detach(record["id"])


def leftovers(known: Collection[int]) -> list[dict[str, Any]]:
    """For each VPS that has something in this network namespace and whose number is not `known`, a
    record for `disconnect`."""
    from polyvisor.vps import network_links

    return [{"id": number} for number in sorted(network_links.numbers() - set(known))]


def link_name(vps: int) -> str:
    """The host's end of VPS number `vps`'s ``eth0``."""
    return f"pv{vps}-0"


def gateway(interface: Interface) -> Interface:
    """The first address of a network, which its bridge has on the host."""
    first = interface.network.network_address + 1
    return ipaddress.ip_interface(f"{first}/{interface.network.prefixlen}")


def target(host: str, addresses: Iterable[Interface]) -> list[Interface]:
    """Those of a VPS's `addresses` that a port published at the host's address `host` leads to: the
    first of each family, or of that address's family."""
    versions = (4, 6) if not host else (ipaddress.ip_address(host).version,)
    found: dict[int, Interface] = {}
    for address in addresses:
        if address.version in versions:
            found.setdefault(address.version, address)
    return list(found.values())


def _address(text: str, mode: str) -> Interface:
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no IP address: {error}", field="addresses") from None
    if mode == "private":
        network = interface.network
        taken = (network.network_address, gateway(interface).ip)
        if network.num_addresses < 4 or interface.ip in taken:
            raise ConfigError(
                f"{text!r} is no VPS's address: write one with its network's prefix, as in "
                "10.9.0.2/24, whose first address is the bridge's",
                field="addresses",
            )
        if interface.version == 4 and interface.ip == network.broadcast_address:
            raise ConfigError(f"{text!r} is its network's broadcast address", field="addresses")
    return interface


def _published(one: Sequence[Any], addresses: Iterable[Interface]) -> Publish:
    if len(one) != 4:
        raise ConfigError(
            f"{one!r} publishes no port: (host address, host port, port, protocol)", field="publish"
        )
    host, host_port, port, protocol = one
    for number in (host_port, port):
        if not isinstance(number, int) or not 0 < number < 65536:
            raise ConfigError(f"{number!r} is no port: 1 to 65535", field="publish")
    if protocol not in ("tcp", "udp"):
        raise ConfigError(f"{protocol!r} is neither 'tcp' nor 'udp'", field="publish")
    try:
        found = target(host, addresses)
    except ValueError as error:
        raise ConfigError(f"{host!r} is no IP address: {error}", field="publish") from None
    if not found:
        raise ConfigError(
            f"port {host_port} cannot be published at {host or 'the host'}: the VPS has no address "
            "of that family",
            field="publish",
        )
    return host, host_port, port, protocol
