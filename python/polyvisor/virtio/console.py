"""virtio-console: consoles and named ports (virtio 1.2, 5.3). See docs/console.md."""

from __future__ import annotations

from polyvisor import _native
from polyvisor.console import Console
from polyvisor.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyvisor.machine import Machine
    from polyvisor.virtio.disk import Transport


class VirtioConsole:
    """A virtio console of a machine; what `Machine.add_console` returns.

    Each port is a `polyvisor.console.Console`. Of a named port nothing is ever dropped: the guest
    waits while more than 256 KiB of what it wrote are unread. A console (hvc) never waits, unless
    its `flow_control` is switched on: Linux writes to it with locks held, and waits by spinning.
    """

    def __init__(self, native: _native.VirtioConsole, names: Sequence[str]) -> None:
        self._native = native
        self._names = dict(enumerate(names))
        self._ports: dict[int, Console] = {}
        for number, name in self._names.items():
            self._open(number, flow_control=bool(name))

    def __repr__(self) -> str:
        names = ", ".join(self._names[i] or f"hvc{i}" for i in sorted(self._names))
        return f"<VirtioConsole {names}, virtio-{self._native.transport}>"

    @property
    def native(self) -> _native.VirtioConsole:
        """The bound C++ object: where it is plugged, how its driver is doing."""
        return self._native

    @property
    def console(self) -> Console:
        """The first port: /dev/hvc0 of the guest."""
        return self._ports[0]

    @property
    def ports(self) -> dict[str, Console]:
        """The named ports, which Linux has in /dev/virtio-ports."""
        return {name: self._ports[number] for number, name in self._names.items() if name}

    def is_open(self, port: str | int) -> bool:
        """Whether the guest has the port (its name or number) open."""
        return self._native.guest_open(self._number(port))

    def disconnect(self, port: str | int) -> None:
        """The guest's programs find the host's end of the port closed: an end of file."""
        self._native.set_host_open(self._number(port), False)

    def connect(self, port: str | int) -> None:
        """The host's end is open again, as it is from the beginning."""
        self._native.set_host_open(self._number(port), True)

    def resize(self, rows: int, columns: int) -> None:
        """The consoles' size, from now on. Give `add_console` a size for the guest to look at it
        at all."""
        self._native.resize(*_size(rows, columns))

    def add_port(self, name: str) -> Console:
        """Plugs in a named port, also while the guest runs. Raises `StateMismatch` when there are
        `max_ports` of them, `ConfigError` for a name that is taken."""
        number = self._native.add_port(_name(name), False)
        self._names[number] = name
        return self._open(number, flow_control=True)

    def remove_port(self, port: str | int) -> None:
        """Unplugs a port. What the guest wrote to it can still be read."""
        number = self._number(port)
        self._native.remove_port(number)
        del self._names[number]

    def _open(self, number: int, flow_control: bool) -> Console:
        port = self._ports[number] = Console(self._native.port(number))
        port.flow_control(flow_control)
        return port

    def _number(self, port: str | int) -> int:
        for number, name in self._names.items():
            if port in (number, name):
                return number
        raise ConfigError(f"the console has no port {port!r}", field="port")


def add_console(
    machine: Machine,
    ports: Sequence[str] | str = (),
    *,
    consoles: int = 1,
    size: tuple[int, int] | None = None,
    max_ports: int | None = None,
    transport: Transport = "pci",
    packed: bool = False,
) -> VirtioConsole:
    """See `Machine.add_console`."""
    if consoles < 1:
        raise ConfigError("a virtio console has at least one console", field="consoles")
    named = [ports] if isinstance(ports, str) else list(ports)
    names = [""] * consoles + [_name(name) for name in named]
    native = _native.VirtioConsole(
        machine.native,
        [(name, not name) for name in names],
        max_ports=max_ports or 0,
        size=None if size is None else _size(*size),
        transport=transport,
        packed=packed,
    )
    return VirtioConsole(native, names)


def _name(name: str) -> str:
    if not name or "/" in name or len(name.encode()) > 200 or not name.isprintable():
        raise ConfigError(
            f"a port's name is that of a file in /dev/virtio-ports, not {name!r}", field="name"
        )
    return name


def _size(rows: int, columns: int) -> tuple[int, int]:
    for value in (rows, columns):
        if not 0 < value < 0x10000:
            raise ConfigError(
                f"a console has 1 to 65535 rows and columns, not {value}", field="size"
            )
    return rows, columns
