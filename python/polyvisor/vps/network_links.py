"""Bridges, veth pairs, addresses and the rules for them, in the network namespace of the caller.

A lock file keeps two processes from making and removing the bridge at the same time; what there is,
is asked of the kernel. The bridges that are polyvisor's are in the interface group GROUP.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
from contextlib import contextmanager
from pathlib import Path

from polyvisor.errors import HostError
from polyvisor.vps import network_rules as rules
from polyvisor.vps.network import gateway, link_name, target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from polyvisor.vps.network import Interface, Publish

#: The interface group of polyvisor's bridges: "pv".
GROUP = 0x7076

_LOCK = "/run/polyvisor-network.lock"
_SYSCTL = Path("/proc/sys/net")
_NAME = re.compile(r"pv(\d+)(-0)?")
#: In families IPV4 and IPV6: forwarding is on because of polyvisor, and only for its bridges.
_FORWARD_TABLE = "pv-forward"
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_LINK_LOCAL = ("fe80::", 64)
_UP = 1  # IFF_UP
_NO_DAD = 2  # IFA_F_NODAD
_CLONE_NEWNET = 0x40000000


def attach(
    vps: int,
    namespace: int,
    bridge: str,
    addresses: Sequence[Interface],
    mac: str,
    publish: Sequence[Publish],
) -> None:
    """Puts ``eth0`` into `namespace`, a port of `bridge`, and the rules that belong to it."""
    link = link_name(vps)
    with _locked(), _netlink() as netlink:
        index = _bridge(netlink, bridge, addresses)
        peer = {"ifname": "eth0", "net_ns_fd": namespace, "address": mac}
        ends = {"ifname": link, "kind": "veth", "master": index, "peer": peer}
        ends |= {"flags": _UP, "change": _UP}
        try:
            netlink.link("add", **ends)
        except Exception as error:
            if getattr(error, "code", None) != errno.EEXIST:
                raise
            netlink.link("del", ifname=link)  # of a VPS that was killed
            netlink.link("add", **ends)
        rules.replace(rules.NETDEV, f"pv{vps}", [_own_addresses(link, mac, addresses)])
        if publish:
            rules.replace(rules.INET, f"pv{vps}", _published(publish, addresses, bridge))
        _inside(namespace, lambda: _configure(addresses))


def detach(vps: int) -> None:
    """Removes what `attach` made, and bridges of polyvisor that have no port any more."""
    with _locked(), _netlink() as netlink:
        _delete(netlink, link_name(vps))
        for family, table in rules.tables():
            if table == f"pv{vps}":
                rules.replace(family, table)
        links = netlink.get_links()
        used = {link.get_attr("IFLA_MASTER") for link in links}
        ours = [link for link in links if link.get_attr("IFLA_GROUP") == GROUP]
        idle = [link for link in ours if link["index"] not in used]
        for link in idle:
            name = link.get_attr("IFLA_IFNAME")
            _set(netlink, link["index"], "down")
            rules.replace(rules.INET, name)
            _delete(netlink, name)
        if len(idle) == len(ours):
            _forward_no_more()


def numbers() -> set[int]:
    """The numbers of all VPSs that have a link or a table here."""
    with _netlink() as netlink:
        names = [link.get_attr("IFLA_IFNAME") for link in netlink.get_links()]
    names += [table for _, table in rules.tables()]
    return {int(found[1]) for name in names if (found := _NAME.fullmatch(name))}


def _bridge(netlink: Any, name: str, addresses: Sequence[Interface]) -> int:
    """The index of bridge `name`, which is made if need be."""
    link = _link(netlink, name)
    if link is None:
        netlink.link("add", ifname=name, kind="bridge", group=GROUP)
        link = _link(netlink, name)
    kind = link.get_attr("IFLA_LINKINFO")
    if kind is None or kind.get_attr("IFLA_INFO_KIND") != "bridge":
        raise HostError(
            f"the host's interface {name!r} is no bridge; choose another name",
            errno=errno.EEXIST,
            path=name,
        )
    index: int = link["index"]
    if link.get_attr("IFLA_GROUP") != GROUP:
        return index
    if not link["flags"] & _UP:  # that it is up says that all of this was done
        rules.replace(rules.INET, name, _bridge_chains(name))
        _write(_SYSCTL / "ipv4/conf" / name / "route_localnet", "1")
        _set(netlink, index, "up")
    for address in {gateway(one) for one in addresses}:
        _add_address(netlink, index, address)
    for version in {address.version for address in addresses}:
        _forward(version)
    return index


def _bridge_chains(bridge: str) -> list[rules.Chain]:
    here = rules.meta("oifname", bridge)
    elsewhere = rules.meta("oifname", bridge, equal=False)
    out = [*rules.meta("iifname", bridge), *elsewhere, rules.MASQUERADE]
    # route_localnet lets 127.0.0.1 reach published ports; nobody else gets to use it.
    loopback = [
        *rules.meta("iifname", bridge),
        *rules.meta("nfproto", rules.IPV4),
        *rules.address("ip", "daddr", "127.0.0.0", 8),
        rules.DROP,
    ]
    inward = [
        [*here, *rules.meta("iifname", bridge), rules.ACCEPT],
        [*here, *rules.answers(), rules.ACCEPT],
        [*here, *rules.redirected(), rules.ACCEPT],
        [*here, rules.DROP],
    ]
    return [
        rules.Chain("loopback", "filter", "prerouting", -300, [loopback]),
        rules.Chain("inward", "filter", "forward", 0, inward),
        rules.Chain("outward", "nat", "postrouting", 100, [out]),
    ]


def _own_addresses(link: str, mac: str, addresses: Sequence[Interface]) -> rules.Chain:
    """What leaves a VPS has the MAC address and one of the IP addresses that it was given."""
    accepted: list[rules.Rule] = []
    for address in addresses:
        ip = str(address.ip)
        if address.version == 4:
            for kind, header in ((_IPV4, "ip"), (_ARP, "arp")):
                own = rules.address(header, "saddr", ip)
                accepted.append([*rules.meta("protocol", kind), *own, rules.ACCEPT])
    six = rules.meta("protocol", _IPV6)
    own_six = [(str(one.ip), None) for one in addresses if one.version == 6]
    for ip, prefix in [*own_six, _LINK_LOCAL]:
        own = rules.advertised(ip, prefix)
        accepted.append([*six, *rules.advertises(), *own, rules.ACCEPT])
    accepted.append([*six, *rules.advertises(), rules.DROP])
    for ip, prefix in [*own_six, _LINK_LOCAL, ("::", None)]:  # "::" while it looks for duplicates
        accepted.append([*six, *rules.address("ip6", "saddr", ip, prefix), rules.ACCEPT])
    chain = [[*rules.ether_source_is_not(mac), rules.DROP], *accepted, [rules.DROP]]
    return rules.Chain("own", "filter", "ingress", 0, chain, device=link)


def _published(
    publish: Sequence[Publish], addresses: Sequence[Interface], bridge: str
) -> list[rules.Chain]:
    redirects: list[rules.Rule] = []
    for host, host_port, port, protocol in publish:
        for address in target(host, addresses):
            four = address.version == 4
            rule = rules.meta("nfproto", rules.IPV4 if four else rules.IPV6)
            rule += rules.address("ip" if four else "ip6", "daddr", host) if host else []
            rule += [*rules.to_this_host(), *rules.port(protocol, host_port)]
            redirects.append([*rule, *rules.redirect(str(address.ip), port)])
    # The host's loopback addresses, and neighbours on the bridge whose answers would not come back
    # this way, are seen as the bridge's address.
    masked: list[rules.Rule] = []
    for address in addresses:
        four = address.version == 4
        header = "ip" if four else "ip6"
        rule = rules.meta("nfproto", rules.IPV4 if four else rules.IPV6) + rules.redirected()
        rule += rules.address(header, "daddr", str(address.ip))
        masked.append([*rule, *rules.meta("iifname", bridge), rules.MASQUERADE])
        if four:
            loopback = rules.address("ip", "saddr", "127.0.0.0", 8)
            masked.append([*rule, *loopback, rules.MASQUERADE])
    return [
        rules.Chain("outside", "nat", "prerouting", -100, redirects),
        rules.Chain("host", "nat", "output", -100, redirects),
        rules.Chain("mask", "nat", "postrouting", 90, masked),
    ]


def _configure(addresses: Sequence[Interface]) -> None:
    """In the VPS's namespace: interfaces up, addresses, default routes."""
    with _netlink() as netlink:
        index = netlink.link_lookup(ifname="eth0")[0]
        _set(netlink, netlink.link_lookup(ifname="lo")[0], "up")
        for address in addresses:
            _add_address(netlink, index, address)
        _set(netlink, index, "up")
        routed = set()
        for address in addresses:
            if address.version not in routed:
                routed.add(address.version)
                to = "0.0.0.0/0" if address.version == 4 else "::/0"
                netlink.route("add", dst=to, gateway=str(gateway(address).ip), oif=index)


def _add_address(netlink: Any, index: int, address: Interface) -> None:
    # Nobody else has it: to look for duplicates would make it unusable for a second.
    options = {"flags": _NO_DAD} if address.version == 6 else {}
    try:
        prefix = address.network.prefixlen
        netlink.addr("add", index=index, address=str(address.ip), prefixlen=prefix, **options)
    except Exception as error:
        if getattr(error, "code", None) != errno.EEXIST:
            raise


def _forward(version: int) -> None:
    """Lets the host forward packets to and from polyvisor's bridges. If it was no router it does
    not become one for anything else."""
    switch = _forwarding(version)
    if switch.read_text().strip() != "0":
        return
    chain: list[rules.Rule] = [
        [*rules.meta("iifgroup", GROUP), rules.ACCEPT],
        [*rules.meta("oifgroup", GROUP), rules.ACCEPT],
        [rules.DROP],
    ]
    family = rules.IPV4 if version == 4 else rules.IPV6
    rules.replace(family, _FORWARD_TABLE, [rules.Chain("bridges", "filter", "forward", 10, chain)])
    if version == 6:
        # An interface that learns its routes from routers stops to when the host forwards, unless
        # told otherwise (Documentation/networking/ip-sysctl: accept_ra).
        for accept in _SYSCTL.glob("ipv6/conf/*/accept_ra"):
            if accept.read_text().strip() == "1":
                _write(accept, "2")
    _write(switch, "1")


def _forward_no_more() -> None:
    for family, table in rules.tables():
        if table == _FORWARD_TABLE:
            _write(_forwarding(4 if family == rules.IPV4 else 6), "0")
            rules.replace(family, table)


def _forwarding(version: int) -> Path:
    return _SYSCTL / ("ipv4/ip_forward" if version == 4 else "ipv6/conf/all/forwarding")


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        raise HostError(
            f"{path} could not be set to {value} ({error.strerror}); networks of VPSs need root",
            errno=error.errno or 0,
            path=str(path),
        ) from error


def _link(netlink: Any, name: str) -> Any:
    found = netlink.link_lookup(ifname=name)
    return netlink.get_links(found[0])[0] if found else None


def _set(netlink: Any, index: int, state: str) -> None:
    netlink.link("set", index=index, state=state)


def _delete(netlink: Any, name: str) -> None:
    found = netlink.link_lookup(ifname=name)
    if not found:
        return
    try:
        netlink.link("del", index=found[0])
    except Exception as error:  # a namespace that ended took it along
        if getattr(error, "code", None) != errno.ENODEV:
            raise


@contextmanager
def _netlink() -> Iterator[Any]:
    """pyroute2's IPRoute for this thread's namespace; its errors become HostError."""
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        raise HostError(
            f"the kernel refused a change of the network ({os.strerror(error.code)}); networks of "
            "VPSs need root, veth and bridge",
            errno=error.code,
            path="rtnetlink",
        ) from error


@contextmanager
def _locked() -> Iterator[None]:
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError(
            f"{_LOCK} could not be opened ({error.strerror}); networks of VPSs need root",
            errno=error.errno or 0,
            path=_LOCK,
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _inside(namespace: int, action: Callable[[], None]) -> None:
    """Calls `action` in a thread of its own that is in the network namespace."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            _enter(namespace)
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="polyvisor-network")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _enter(namespace: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise HostError(
            f"the VPS's network namespace could not be entered ({os.strerror(code)}); "
            "networks of VPSs need root",
            errno=code,
            path="setns",
        )
