"""virtio-net: network cards of a machine (virtio 1.2, 5.1). See docs/network.md."""

from __future__ import annotations

import ipaddress
import os

from polyvisor import _native
from polyvisor.errors import ConfigError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Protocol, TypeAlias

    from typing_extensions import Buffer

    from polyvisor.machine import Machine
    from polyvisor.virtio.disk import Transport

    BackendName = Literal["user", "tap", "stream", "dgram", "none"]

    class Network(Protocol):
        """A network that is written in Python."""

        def send(self, frame: bytes, /) -> object:
            """A frame that the guest transmitted. An exception stops the machine."""

    Backend: TypeAlias = BackendName | Network

#: Where user networking puts the guest, the host, and the name server.
GUEST_ADDRESS = "10.0.2.15"
HOST_ADDRESS = "10.0.2.2"
NAME_SERVER = "10.0.2.3"


class Forward(Record):
    """A port of the host whose connections, or datagrams, go to a port of the guest."""

    protocol: Literal["tcp", "udp"]
    host_address: str
    #: 0: any that is free; what `Net.forwards` gives has the one that was taken.
    host_port: int
    guest_address: str
    guest_port: int

    def __str__(self) -> str:
        return (
            f"{self.protocol}:{self.host_address}:{self.host_port}"
            f"-{self.guest_address}:{self.guest_port}"
        )

    @classmethod
    def parse(cls, text: str) -> Forward:
        """`[tcp|udp]:[HOST-ADDRESS]:HOST-PORT-[GUEST-ADDRESS]:GUEST-PORT`, as QEMU's hostfwd has
        it. Without an address: 127.0.0.1 of the host (QEMU takes all interfaces; say 0.0.0.0), and
        the address that DHCP gives to the guest. Raises `ConfigError`."""

        def refuse(why: str) -> ConfigError:
            return ConfigError(
                f"the forwarded port {text!r} {why}; an example is tcp:127.0.0.1:2222-:22",
                field="forward",
            )

        protocol, colon, rest = text.partition(":")
        if protocol not in ("tcp", "udp", "") or not colon:
            raise refuse("does not begin with tcp: or udp:")
        host, dash, guest = rest.partition("-")
        if not dash:
            raise refuse("has no '-' between the host's side and the guest's")

        def side(part: str, whose: str, default: str) -> tuple[str, int]:
            address, colon, port = part.rpartition(":")
            if not colon:
                raise refuse(f"has no ':' before the {whose}'s port in {part!r}")
            if not port.isdecimal() or int(port) > 65535:
                raise refuse(f"has {port!r} for the {whose}'s port, which is no number to 65535")
            try:
                ipaddress.IPv4Address(address or default)
            except ValueError:
                raise refuse(f"has {address!r}, which is no IPv4 address") from None
            return address or default, int(port)

        host_address, host_port = side(host, "host", "127.0.0.1")
        guest_address, guest_port = side(guest, "guest", GUEST_ADDRESS)
        if guest_port == 0:
            raise refuse("has no port of the guest")
        kind: Literal["tcp", "udp"] = "udp" if protocol == "udp" else "tcp"
        return cls(kind, host_address, host_port, guest_address, guest_port)

    def native(self) -> tuple[str, str, int, str, int]:
        return (
            self.protocol,
            self.host_address,
            self.host_port,
            self.guest_address,
            self.guest_port,
        )


class Net:
    """A network card of a machine; what `Machine.add_net` returns."""

    def __init__(self, native: _native.VirtioNet) -> None:
        self._native = native

    def __repr__(self) -> str:
        return f"<Net {self.mac}, {self.backend}, virtio-{self.native.transport}>"

    @property
    def native(self) -> _native.VirtioNet:
        """The bound C++ object: where it is plugged, how its driver is doing."""
        return self._native

    @property
    def mac(self) -> str:
        """Its address, as "52:54:00:12:34:56"; the guest's driver may change it."""
        return self._native.mac.hex(":")

    @property
    def backend(self) -> str:
        """What its cable ends in."""
        return self._native.end

    @property
    def link(self) -> bool:
        """Whether the guest sees a carrier. Set it to pull the cable and to plug it in again."""
        return self._native.link

    @link.setter
    def link(self, up: bool) -> None:
        self._native.link = up

    @property
    def queues(self) -> int:
        """Pairs of queues that the guest's driver uses."""
        return self._native.active_queues

    def statistics(self) -> dict[str, int]:
        """Frames and bytes so far as the guest sees them, rx for what it received. `rx_dropped`:
        without a driver or link, or longer than its buffers; `rx_filtered`: not addressed to it;
        `rx_waits`: times it had no buffers; `tx_dropped`: malformed, without link, or refused by
        the backend."""
        return self._native.statistics()

    def receive(self, frame: Buffer) -> bool:
        """Gives the guest an Ethernet frame (14 to 65557 bytes, without checksum). False: it has
        no buffers now, no driver, no link, or does not want frames for this address."""
        return self._native.receive(frame)

    def capture(self, path: str | os.PathLike[str]) -> None:
        """Writes the frames of both directions to a new pcap file, until `stop_capture`. Raises
        `HostError`."""
        self._native.start_capture(os.fspath(path))

    def stop_capture(self) -> None:
        self._native.stop_capture()

    @property
    def forwards(self) -> list[Forward]:
        """The forwarded ports of a user network, with the host's ports that were chosen."""
        return [Forward(*each) for each in self._native.forwards()]  # type: ignore[arg-type]

    def add_forward(self, forward: str | Forward) -> Forward:
        """Forwards a port of the host to the guest, also while the machine runs; see
        `Forward.parse`. Returns it with the host's port. Raises `ConfigError` when that is
        taken."""
        made = self._native.add_forward(_forward(forward).native())
        return Forward(*made)  # type: ignore[arg-type]

    def remove_forward(self, forward: str | Forward) -> None:
        """Connections that exist go on. Raises `ConfigError` when there is no such forward."""
        self._native.remove_forward(_forward(forward).native())


def add_net(
    machine: Machine,
    backend: Backend = "user",
    *,
    mac: str | None = None,
    forward: list[str | Forward] | tuple[str | Forward, ...] = (),
    restrict: bool = False,
    ipv6: bool = True,
    hostname: str = "guest",
    tap: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    listen: bool = False,
    peer: str | os.PathLike[str] | None = None,
    capture: str | os.PathLike[str] | None = None,
    queues: int = 1,
    mtu: int | None = None,
    transport: Transport = "pci",
    packed: bool = False,
) -> Net:
    """See `Machine.add_net`."""
    if mtu is not None and not 68 <= mtu <= 65520:
        raise ConfigError(f"an MTU is 68 to 65520 bytes, not {mtu}", field="mtu")
    given = {
        "forward": bool(forward),
        "restrict": restrict,
        "tap": tap is not None,
        "socket": socket is not None,
        "listen": listen,
        "peer": peer is not None,
    }
    for name, is_given in given.items():
        if is_given and name not in _ARGUMENTS.get(backend if isinstance(backend, str) else "", ()):
            raise ConfigError(f"a network of {backend!r} has no {name}", field=name)
    if backend in ("stream", "dgram") and socket is None:
        raise ConfigError(f"a network of {backend!r} needs socket, a path", field="socket")
    if backend == "dgram" and peer is None:
        raise ConfigError("a network of 'dgram' needs peer, a path", field="peer")
    address = parse_mac(mac) if mac is not None else b"\x52\x54\x00" + os.urandom(3)
    if backend == "user":
        end = _native.net_user(
            machine.native,
            restricted=restrict,
            mtu=mtu or 1500,
            ipv6=ipv6,
            hostname=hostname,
            forwards=[_forward(each).native() for each in forward],
        )
    elif backend == "tap":
        end = _native.net_tap(machine.native, tap or "", queues)
    elif backend == "stream":
        end = _native.net_stream(machine.native, os.fspath(socket or ""), listen)
    elif backend == "dgram":
        end = _native.net_dgram(machine.native, os.fspath(socket or ""), os.fspath(peer or ""))
    elif backend == "none":
        end = _native.net_object(machine.native, _Nothing())
    elif isinstance(backend, str):
        raise ConfigError(
            f"there is no network backend {backend!r}; there are {', '.join(_ARGUMENTS)}, and "
            "objects with send(frame)",
            field="backend",
        )
    else:
        end = _native.net_object(machine.native, backend)
    native = _native.VirtioNet(
        machine.native,
        end,
        mac=address,
        mtu=mtu or 0,
        queues=queues,
        transport=transport,
        packed=packed,
    )
    net = Net(native)
    if backend == "none":
        net.link = False
    if capture is not None:
        net.capture(capture)
    return net


# What belongs to one kind of network only.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "user": ("forward", "restrict"),
    "tap": ("tap",),
    "stream": ("socket", "listen"),
    "dgram": ("socket", "peer"),
    "none": (),
}


class _Nothing:
    """The end of no cable."""

    def send(self, frame: bytes) -> None:
        pass


def _forward(forward: str | Forward) -> Forward:
    return forward if isinstance(forward, Forward) else Forward.parse(forward)


def parse_mac(text: str) -> bytes:
    """The six bytes of "52:54:00:12:34:56". Raises `ConfigError`."""
    parts = text.replace("-", ":").split(":")
    try:
        if len(parts) != 6 or not all(len(part) in (1, 2) for part in parts):
            raise ValueError
        return bytes(int(part, 16) for part in parts)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no MAC address; an example is 52:54:00:12:34:56", field="mac"
        ) from None


# --- The command line ----------------------------------------------------------------------------

_BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def parse(text: str) -> dict[str, Any]:
    """The arguments of `Machine.add_net` for what follows `--net`: a backend, and options behind
    commas, in QEMU's words where it has them::

        user,hostfwd=tcp:127.0.0.1:2222-:22,restrict=on
        tap,ifname=tap0
        stream,path=/run/cable,listen=on
        dgram,path=/run/here,peer=/run/there
        none

    Options of all: mac=, mtu=, queues=, capture=FILE, transport=pci|mmio, packed=on|off. Raises
    `ConfigError` that says which part is wrong."""

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"the network {text!r} {why}", field="net")

    backend, *options = text.split(",")
    if backend not in _OPTIONS:
        raise refuse(
            f"begins with {backend!r}; a network is one of {', '.join(sorted(_OPTIONS))}, with "
            "options behind commas"
        )
    known = _OPTIONS[backend] | _COMMON
    result: dict[str, Any] = {"backend": backend}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in known:
            raise refuse(f"has an option {name!r}; {backend} knows {', '.join(sorted(known))}")
        if not equals or not value:
            raise refuse(f"has no value for {name!r}")
        argument, kind = known[name]
        if argument in result and kind != "forward":
            raise refuse(f"has {name!r} twice")
        if kind == "flag":
            if value not in _BOOLEANS:
                raise refuse(f"has {value!r} for {name!r}, which is on or off")
            result[argument] = _BOOLEANS[value]
        elif kind == "number":
            if not value.isdecimal():
                raise refuse(f"has {value!r} for {name!r}, which is a number")
            result[argument] = int(value)
        elif kind == "forward":
            result.setdefault(argument, []).append(Forward.parse(value))
        else:
            result[argument] = value
    if "mac" in result:
        parse_mac(result["mac"])
    return result


# Option: the argument of add_net, and what its value is.
_COMMON = {
    "mac": ("mac", "text"),
    "mtu": ("mtu", "number"),
    "queues": ("queues", "number"),
    "capture": ("capture", "text"),
    "transport": ("transport", "text"),
    "packed": ("packed", "flag"),
}
_OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "user": {
        "hostfwd": ("forward", "forward"),
        "restrict": ("restrict", "flag"),
        "ipv6": ("ipv6", "flag"),
        "hostname": ("hostname", "text"),
    },
    "tap": {"ifname": ("tap", "text")},
    "stream": {"path": ("socket", "text"), "listen": ("listen", "flag")},
    "dgram": {"path": ("socket", "text"), "peer": ("peer", "text")},
    "none": {},
}
