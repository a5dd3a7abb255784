"""nftables through netlink: tables of rules that are put in place, or taken away, all at once.

What `nft` calls ``ip saddr 10.9.0.2 accept`` is here ``[*address("ip", "saddr", "10.9.0.2"),
ACCEPT]``: expressions that each load something into a register or compare it. They are tuples, and
become pyroute2's messages when `replace` sends them, so that this module costs nothing to import.
"""

from __future__ import annotations

import socket
import struct

from polyvisor.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    Expression = tuple[str, dict[str, Any]]
    Rule = Sequence[Expression]

#: Families of tables: NFPROTO_* of linux/netfilter.h.
INET, IPV4, NETDEV, IPV6 = 1, 2, 5, 10

_LINK, _NETWORK, _TRANSPORT = 0, 1, 2
_META = {"protocol": 1, "iifname": 6, "oifname": 7, "nfproto": 15, "l4proto": 16}
_META |= {"iifgroup": 21, "oifgroup": 22}
_HOOKS = {"ingress": 0, "prerouting": 0, "forward": 2, "output": 3, "postrouting": 4}
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
#: Where addresses are in the headers of IPv4, IPv6 and ARP, and how long they are.
_FIELDS = {
    ("ip", "saddr"): (12, 4),
    ("ip", "daddr"): (16, 4),
    ("ip6", "saddr"): (8, 16),
    ("ip6", "daddr"): (24, 16),
    ("arp", "saddr"): (14, 4),
}
_EQUAL, _DIFFERENT = 0, 1

MASQUERADE: Expression = ("masq", {})


def _verdict(code: int) -> Expression:
    return ("immediate", {"dreg": 0, "data": [("NFTA_VERDICT_CODE", code)]})


DROP, ACCEPT = _verdict(0), _verdict(1)


def _load(value: bytes, register: int) -> Expression:
    return ("immediate", {"dreg": register, "data": value})


def _compare(value: bytes, op: int = _EQUAL) -> Expression:
    return ("cmp", {"sreg": 1, "op": op, "data": value})


def _payload(base: int, offset: int, length: int) -> Expression:
    return ("payload", {"dreg": 1, "base": base, "offset": offset, "len": length})


def _all_of_any(bits: int) -> list[Expression]:
    """Of the 32 bits in the register at least one of `bits` is set."""
    mask, zero = struct.pack("=I", bits), bytes(4)
    change = {"sreg": 1, "dreg": 1, "len": 4, "mask": mask, "xor": zero}
    return [("bitwise", change), _compare(zero, _DIFFERENT)]


def meta(key: str, value: str | int, *, equal: bool = True) -> list[Expression]:
    """A packet whose `key` is (not) `value`: "iifname" a name, "protocol" an EtherType, ..."""
    if isinstance(value, str):
        packed = value.encode().ljust(16, b"\0")
    elif key == "protocol":
        packed = struct.pack("!H", value)
    else:
        packed = struct.pack("=I" if key.endswith("group") else "B", value)
    return [
        ("meta", {"dreg": 1, "key": _META[key]}),
        _compare(packed, _EQUAL if equal else _DIFFERENT),
    ]


def ether_source_is_not(mac: str) -> list[Expression]:
    return [_payload(_LINK, 6, 6), _compare(bytes.fromhex(mac.replace(":", "")), _DIFFERENT)]


def address(header: str, field: str, value: str, prefix: int | None = None) -> list[Expression]:
    """An address in the header "ip", "ip6" or "arp" is `value`, or begins with `prefix` of its
    bits, which are whole bytes."""
    offset, length = _FIELDS[header, field]
    packed = socket.inet_pton(socket.AF_INET if length == 4 else socket.AF_INET6, value)
    if prefix is not None:
        packed = packed[: prefix // 8]
    return [_payload(_NETWORK, offset, len(packed)), _compare(packed)]


def advertises() -> list[Expression]:
    """An ICMPv6 Neighbor Advertisement (RFC 4861 4.4)."""
    icmp = meta("l4proto", socket.IPPROTO_ICMPV6)
    return [*icmp, _payload(_TRANSPORT, 0, 1), _compare(b"\x88")]


def advertised(value: str, prefix: int | None = None) -> list[Expression]:
    """The target address of a Neighbor Advertisement is `value`, or begins as that does."""
    packed = socket.inet_pton(socket.AF_INET6, value)
    packed = packed if prefix is None else packed[: prefix // 8]
    return [_payload(_TRANSPORT, 8, len(packed)), _compare(packed)]


def port(protocol: str, number: int) -> list[Expression]:
    """A packet of `protocol` ("tcp", "udp") to port `number`."""
    to = [_payload(_TRANSPORT, 2, 2), _compare(struct.pack("!H", number))]
    return [*meta("l4proto", _PROTOCOLS[protocol]), *to]


def to_this_host() -> list[Expression]:
    """The destination is one of the host's own addresses."""
    # pyroute2 has NFTA_FIB_RESULT as flags, where bits 0 and 1 make NFT_FIB_RESULT_ADDRTYPE, 3.
    result = {"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"}
    daddr = 1 << 1
    fib = ("fib", {"dreg": 1, "result": result, "flags": daddr})
    rtn_local = 2
    return [fib, _compare(struct.pack("=I", rtn_local))]


def answers() -> list[Expression]:
    """ct state established,related"""
    return [("ct", {"dreg": 1, "key": 0}), *_all_of_any(2 | 4)]


def redirected() -> list[Expression]:
    """ct status dnat"""
    return [("ct", {"dreg": 1, "key": 2}), *_all_of_any(1 << 5)]


def redirect(to: str, number: int) -> list[Expression]:
    """Destination NAT to address `to`, port `number`."""
    family = IPV6 if ":" in to else IPV4
    packed = socket.inet_pton(socket.AF_INET6 if family == IPV6 else socket.AF_INET, to)
    nat = {"type": 1, "family": family, "reg_addr_min": 1, "reg_proto_min": 2}
    return [_load(packed, 1), _load(struct.pack("!H", number), 2), ("nat", nat)]


class Chain:
    """A base chain: where its `rules` are looked at (`kind` "filter" or "nat", `hook`, `priority`;
    `device` for the hook "ingress"). What no rule decides is accepted."""

    def __init__(
        self,
        name: str,
        kind: str,
        hook: str,
        priority: int,
        rules: Iterable[Rule],
        device: str = "",
    ) -> None:
        self.name, self.kind, self.hook, self.priority = name, kind, hook, priority
        self.rules, self.device = list(rules), device


def replace(family: int, table: str, chains: Iterable[Chain] = ()) -> None:
    """Makes `table` hold `chains` and nothing else, in one transaction; without any it is removed.

    Raises:
        HostError: the kernel refused, or has no nf_tables (``errno``); nothing was changed.
    """
    chains = list(chains)
    # To remove what is not there would fail; so it is made first.
    messages = [_message("table", "new", family, name=table)]
    messages.append(_message("table", "del", family, name=table))
    if chains:
        messages.append(_message("table", "new", family, name=table))
    for chain in chains:
        hook: list[tuple[str, int | str]] = [("NFTA_HOOK_HOOKNUM", _HOOKS[chain.hook])]
        hook.append(("NFTA_HOOK_PRIORITY", chain.priority))
        if chain.device:
            hook.append(("NFTA_HOOK_DEV", chain.device))
        fields = {"table": table, "name": chain.name, "hook": {"attrs": hook}, "type": chain.kind}
        messages.append(_message("chain", "new", family, **fields))
        for rule in chain.rules:
            expressions = [_expression(name, values) for name, values in rule]
            place = {"table": table, "chain": chain.name, "expressions": expressions}
            messages.append(_message("rule", "new", family, **place))
    _send(messages, table)


def tables() -> list[tuple[int, str]]:
    """(family, name) of every table in this network namespace; none where nf_tables is missing."""
    from pyroute2.netlink.nfnetlink.nftsocket import NFTSocket

    try:
        with NFTSocket(nfgen_family=0) as netlink:
            from pyroute2.netlink.nfnetlink import nfgen_msg

            found = netlink.request_get(nfgen_msg(), 1)  # NFT_MSG_GETTABLE
    except OSError:
        return []
    return [(one["nfgen_family"], one.get_attr("NFTA_TABLE_NAME")) for one in found]


def _message(thing: str, verb: str, family: int, **fields: Any) -> Any:
    from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST
    from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nftsocket

    message = getattr(nftsocket, f"nft_{thing}_msg")()
    number: int = getattr(nftsocket, f"NFT_MSG_{verb.upper()}{thing.upper()}")
    message["attrs"] = [(message.name2nla(name), value) for name, value in fields.items()]
    message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | number
    create = NLM_F_CREATE | NLM_F_APPEND if verb == "new" else 0
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | create
    message["nfgen_family"] = family
    return message


def _expression(name: str, values: dict[str, Any]) -> dict[str, Any]:
    attributes = []
    for key, value in values.items():
        if isinstance(value, bytes):
            value = {"attrs": [("NFTA_DATA_VALUE", value)]}
        elif isinstance(value, list):
            value = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": value})]}
        attributes.append((f"NFTA_{name.upper()}_{key.upper()}", value))
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": attributes})]}


def _send(messages: list[Any], table: str) -> None:
    from pyroute2.netlink import NLM_F_REQUEST
    from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
    from pyroute2.netlink.nfnetlink.nftsocket import NFTSocket

    def boundary(kind: int) -> Any:
        message = nfgen_msg()
        message["res_id"] = NFNL_SUBSYS_NFTABLES
        message["header"]["type"] = kind
        message["header"]["flags"] = NLM_F_REQUEST
        return message

    begin, end = 0x10, 0x11  # NFNL_MSG_BATCH_*
    try:
        with NFTSocket() as netlink:
            netlink.nlm_request_batch([boundary(begin), *messages, boundary(end)])
    except Exception as error:
        code = getattr(error, "code", None) or getattr(error, "errno", None) or 0
        raise HostError(
            f"nftables: table {table!r} was refused ({error}); publishing ports needs root and a "
            "kernel with nf_tables",
            errno=code,
            path="nf_tables",
        ) from error
