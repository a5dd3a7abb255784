"""--disk, --net, --share, --vsock and --rng: devices of a machine, said on the command line."""

from __future__ import annotations

from polyvisor.errors import ConfigError
from polyvisor.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from polyvisor.machine import Machine

_DISK_OPTIONS = "ro, snapshot, format=, cache=, serial=, queues=, io=, bps=, iops=, transport="
#: Option: the argument of `Machine.add_disk`, and whether it is a number.
_DISK_VALUES = {
    "format": ("format", False),
    "cache": ("cache", False),
    "serial": ("serial", False),
    "io": ("io", False),
    "transport": ("transport", False),
    "queues": ("queues", True),
    "bps": ("bytes_per_second", True),
    "iops": ("operations_per_second", True),
}


class Devices(Record):
    """What the options ask for, as given; checked by `parsed`."""

    disks: Sequence[str] = ()
    nets: Sequence[str] = ()
    shares: Sequence[str] = ()
    vsock: str | None = None
    rng: bool = False

    def parsed(self) -> Parsed:
        """Raises `ConfigError` for what cannot be meant."""
        from polyvisor.virtio import fs, net

        return Parsed(
            [parse_disk(text) for text in self.disks],
            [net.parse(text) for text in self.nets],
            [fs.parse(text) for text in self.shares],
            parse_vsock(self.vsock) if self.vsock is not None else None,
            self.rng,
        )


class Parsed(Record):
    """The same, as arguments of `Machine.add_...`."""

    disks: list[dict[str, Any]]
    nets: list[dict[str, Any]]
    #: (host path, guest path, read-only)
    shares: list[tuple[str, str, bool]]
    vsock: dict[str, Any] | None
    rng: bool

    def plug(self, machine: Machine) -> None:
        """Adds the devices to a machine. Shared folders have the tags share0, share1, ..."""
        for disk in self.disks:
            machine.add_disk(**disk)
        for net in self.nets:
            machine.add_net(**net)
        for number, (path, _, read_only) in enumerate(self.shares):
            machine.add_share(path, share_tag(number), read_only=read_only)
        if self.vsock is not None:
            machine.add_vsock(**self.vsock)
        if self.rng:
            machine.add_rng()


def share_tag(number: int) -> str:
    """How the guest calls a shared folder."""
    return f"share{number}"


def parse_disk(text: str) -> dict[str, Any]:
    """The arguments of `Machine.add_disk` for ``FILE[,ro][,snapshot][,format=qcow2]...``.

    A comma in the file's name is written twice.
    """

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"the disk {text!r} {why}", field="disk")

    path, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    if not path:
        raise refuse("has no file; it is FILE, with options behind commas")
    result: dict[str, Any] = {"path": path}
    for option in options:
        name, equals, value = option.partition("=")
        if name in ("ro", "snapshot") and not equals:
            argument = "read_only" if name == "ro" else "snapshot"
            given: bool | int | str = True
        elif name not in _DISK_VALUES:
            raise refuse(f"has an option {option!r}; there are {_DISK_OPTIONS}")
        elif not value:
            raise refuse(f"has no value for {name!r}")
        else:
            argument, number = _DISK_VALUES[name]
            given = _size(value, name) if number else value
        if argument in result:
            raise refuse(f"has {name!r} twice")
        result[argument] = given
    return result


def parse_vsock(text: str) -> dict[str, Any]:
    """The arguments of `Machine.add_vsock` for ``CID[,PATH]``."""
    number, comma, path = text.partition(",")
    if not number.isdecimal() or (comma and not path):
        raise ConfigError(
            f"a vsock is CID or CID,PATH, such as 3,/run/vm.sock; not {text!r}", field="vsock"
        )
    return {"cid": int(number), **({"path": path} if path else {})}


def _size(value: str, name: str) -> int:
    from polyvisor.config import parse_size

    return parse_size(value, name)
